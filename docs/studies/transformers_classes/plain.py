"""What a user of transformers sees, without kvconform: ``python -m transformers_classes.plain NAME...``.

For a tiny model of each config class, the logits of ``generate`` with its cache are compared with the model's own
forward without one, on the same tokens: one row, two rows, two rows of different lengths with padding on the left, a
prompt given in chunks, and a prompt of one token after another prompt. A beam search with the cache is compared with
the same search without it. Prints one JSON object a line: the largest difference as a fraction of the logits' standard
deviation (of beams: of the scores, log-probabilities), or the exception.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from kvconform_backends.targets.hf.recipe import decoder_part
from kvconform_backends.targets.hf.sizes import tiny
from kvconform_backends.targets.third_party import ThirdPartyError, guarded

PROMPT, NEW, PAD, BEAMS = 9, 6, 0, 3

REFUSALS = ("Cannot use prefill chunking", "cannot use beam search with a cache")
"""Where transformers says that it cannot do a thing, there is no deviation."""


def tokens(rows: int) -> torch.Tensor:
    return torch.stack([torch.arange(3 + 20 * row, 3 + 20 * row + PROMPT) for row in range(rows)])


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, **arguments: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )


def greedy(model: Any, rows: int = 1, padding: int = 0, length: int = PROMPT, **arguments: Any) -> float:
    """``padding``: columns of the last row that hold no token."""
    ids = tokens(rows)[:, :length]
    mask = torch.ones_like(ids)
    ids[-1, :padding], mask[-1, :padding] = PAD, 0
    made = generated(model, ids, mask, **arguments)
    worst = 0.0
    for row in range(rows):
        kept = made.sequences[row : row + 1, padding if row == rows - 1 else 0 :]
        whole = model(input_ids=kept, use_cache=False).logits[0]
        for number, logits in enumerate(made.logits):
            at = kept.shape[1] - NEW - 1 + number
            worst = max(worst, float((logits[row].float() - whole[at].float()).abs().max() / whole.std()))
    return worst


def beams(model: Any) -> float:
    """Of one search with the cache and one without it, by how much the scores of the sequences differ."""
    ids = tokens(2)
    search = partial(generated, model, ids, torch.ones_like(ids), num_beams=BEAMS, output_scores=True)
    scores = [search(use_cache=cached).sequences_scores for cached in (True, False)]
    return float((scores[0] - scores[1]).abs().max())


CASES: dict[str, Callable[[Any], float]] = {
    "one row": greedy,
    "two rows": partial(greedy, rows=2),
    "left padding": partial(greedy, rows=2, padding=4),
    "chunked prompt": partial(greedy, prefill_chunk_size=4),
    "one token after another prompt": partial(greedy, length=1),
    "beams": beams,
}


@torch.no_grad()
def measured(name: str) -> dict[str, float | str]:
    """By case, the largest difference, or the exception as one line; nothing where ``generate`` needs other inputs."""
    torch.manual_seed(0)
    plain = getattr(transformers, name)()
    if decoder_part(plain) is not plain:
        return {}  # its generate needs what an encoder gives
    make: Any = AutoModelForCausalLM
    model = make.from_config(type(plain)(**tiny(plain))).eval()
    found: dict[str, float | str] = {}
    for case, run in CASES.items():
        try:
            with guarded():
                found[case] = float(f"{run(model):.2g}")
        except ThirdPartyError as error:
            if any(words in str(error) for words in REFUSALS):
                continue
            found[case] = str(error)
    return found


if __name__ == "__main__":
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    for name in sys.argv[1:]:
        print(json.dumps({name: measured(name)}), flush=True)
