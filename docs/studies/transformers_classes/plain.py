"""What a user of transformers sees, without kvconform: ``python -m transformers_classes.plain NAME...``.

For a tiny model of each config class, the logits of ``generate`` with its cache are compared with the model's own
forward without one, on the same tokens: one row, two rows, two rows of different lengths with padding on the left, and
a prompt given in chunks. Prints one JSON object a line: the largest difference as a fraction of the logits' standard
deviation, or the exception.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from kvconform_backends.targets.hf.sizes import tiny
from kvconform_backends.targets.third_party import ThirdPartyError, guarded

PROMPT, NEW, PAD = 9, 6, 0
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one row": (1, 0, {}),
    "two rows": (2, 0, {}),
    "left padding": (2, 4, {}),
    "chunked prompt": (1, 0, {"prefill_chunk_size": 4}),
}
"""Rows, padding columns of the last row, and arguments of ``generate``."""


@torch.no_grad()
def difference(model: Any, rows: int, padding: int, arguments: dict[str, Any]) -> float:
    ids = torch.stack([torch.arange(3 + 20 * row, 3 + 20 * row + PROMPT) for row in range(rows)])
    mask = torch.ones_like(ids)
    ids[-1, :padding], mask[-1, :padding] = PAD, 0
    made = model.generate(
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
    worst = 0.0
    for row in range(rows):
        kept = made.sequences[row : row + 1, padding if row == rows - 1 else 0 :]
        whole = model(input_ids=kept, use_cache=False).logits[0]
        for number, logits in enumerate(made.logits):
            at = kept.shape[1] - NEW - 1 + number
            worst = max(worst, float((logits[row].float() - whole[at].float()).abs().max() / whole.std()))
    return worst


def measured(name: str) -> dict[str, float | str]:
    """By case, the largest difference in standard deviations, or the exception as one line."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    make: Any = AutoModelForCausalLM
    model = make.from_config(kind(**tiny(kind()))).eval()
    found: dict[str, float | str] = {}
    for case, (rows, padding, arguments) in CASES.items():
        try:
            with guarded():
                found[case] = float(f"{difference(model, rows, padding, arguments):.2g}")
        except ThirdPartyError as error:
            if "Cannot use prefill chunking" in str(error):
                continue  # transformers says that it cannot, which is no deviation
            found[case] = str(error)
    return found


if __name__ == "__main__":
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    for name in sys.argv[1:]:
        print(json.dumps({name: measured(name)}), flush=True)
