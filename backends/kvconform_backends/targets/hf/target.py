"""``hf:`` targets: a causal language model of transformers as a black box, judged by its own uncached forward.

The target is a local directory with a ``config.json``, or the name of a config class (``LlamaConfig``), of which a
tiny instance is built (``opening.py``). Nothing is downloaded. A step does what ``generate`` does between two tokens,
for any number of them: ``prepare_inputs_for_generation`` with an attention mask and the positions, then the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from kvconform.backend import BlackBox
from kvconform.errors import Unavailable
from kvconform_backends.targets import black_box
from kvconform_backends.targets.hf import script
from kvconform_backends.targets.hf.recipe import Calls, Recipe
from kvconform_backends.targets.hf.variants import Variant, variants
from kvconform_backends.torch import device_time
from kvconform_backends.validation import check_length, check_rows
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Program

Array = NDArray[Any]


@dataclass
class HfSequence:
    """A cache of transformers, None before the model makes its own; the token ids ``(b, s)`` and the attention mask
    ``(b, s)``, 0 where a column holds no token."""

    cache: Any
    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def batch(self) -> int:
        return len(self.ids)


class Transformers(BlackBox):
    """One model with one cache design; ``open_hf`` creates a subclass with the class attributes."""

    claims: Claims
    configs: Mapping[str, Config]
    recognised: str
    assumed: tuple[str, ...]
    source: str
    parameters: int
    recipe: Recipe
    calls: Calls
    made: Any

    def __init__(self, config: Config, weights: Mapping[str, NDArray[np.float32]], device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} finds no CUDA device on this machine")
        torch.set_float32_matmul_precision("highest")  # no TF32
        self.config, self.device = config, device
        self.model: Any = self.made.to(device)
        self.seen_on: str | None = None  # the device of the last logits
        self.copies: black_box.Perturbed | None = None
        self.noise: black_box.Noise | None = None  # perturbs its weights

    # --- the cache ---
    def cache(self) -> Any:
        """An empty cache, as created by ``generate``; None if the model makes its own."""
        text = self.model.config.get_text_config(decoder=True)
        if not self.calls.makes_cache:
            return None
        made: Any = getattr(transformers, self.recipe.cache_class)
        return made(config=text, **self.recipe.cache_arguments(self.config))

    def start(self, batch: int) -> HfSequence:
        none = torch.zeros(batch, 0, dtype=torch.long, device=self.device)
        return HfSequence(self.cache(), none, none)

    @torch.no_grad()
    def step(
        self, sequence: HfSequence, tokens: Array, counts: Array | None = None, padding: str = "right"
    ) -> tuple[Array, HfSequence]:
        """Columns without a token are masked out, as by ``generate``: those of a prompt, on the left."""
        new = torch.from_numpy(tokens).to(self.device)
        mask = torch.ones_like(new)
        if counts is not None:
            for row, count in enumerate(counts.tolist()):
                mask[row, : new.shape[1] - count] = 0
        logits = [self._logits(sequence, part, held) for part, held in self._parts(sequence, new, mask)]
        return self._given(torch.cat(logits, 1)), sequence

    def _parts(
        self, sequence: HfSequence, new: torch.Tensor, mask: torch.Tensor
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """The columns that the model is given in one call, with their mask."""
        alone = self.calls.one_by_one
        if alone == "always" or (alone == "after the first" and sequence.ids.shape[1]):
            return zip(torch.split(new, 1, 1), torch.split(mask, 1, 1), strict=True)
        return [(new, mask)]

    def _logits(self, sequence: HfSequence, new: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        first = not sequence.ids.shape[1]
        sequence.ids, sequence.mask = torch.cat([sequence.ids, new], 1), torch.cat([sequence.mask, mask], 1)
        output = self.model(**self._inputs(sequence, new, first), return_dict=True)
        if self.calls.returned_as:
            sequence.cache = getattr(output, self.calls.returned_as)
        # a model may drop its cache and compute all tokens again, for example where its rotary factors change
        logits: torch.Tensor = output.logits[:, -new.shape[1] :]
        return logits

    def _inputs(self, sequence: HfSequence, new: torch.Tensor, first: bool) -> dict[str, Any]:
        """The arguments of the call that appends the ``new`` tokens, which ``sequence`` holds already."""
        given = {} if sequence.cache is None else {self.calls.given_as: sequence.cache}
        if self.calls.positions:
            given["position_ids"] = (sequence.mask.cumsum(-1) - 1).masked_fill(sequence.mask == 0, 0)
        if not self.calls.prepared:
            if self.calls.positions:
                given["position_ids"] = given["position_ids"][:, -new.shape[1] :]
            return {"input_ids": new, "attention_mask": sequence.mask, "use_cache": True, **given}
        inputs: dict[str, Any] = self.model.prepare_inputs_for_generation(
            sequence.ids,
            next_sequence_length=new.shape[1],
            attention_mask=sequence.mask,
            use_cache=True,
            is_first_iteration=first,
            **given,
        )
        inputs.pop("logits_to_keep", None)  # some models keep those of the last token only
        return inputs

    def length(self, sequence: HfSequence) -> list[int]:
        columns, held = sequence.mask.shape[1], int(sequence.cache.get_seq_length())
        return [held - columns + int(tokens) for tokens in sequence.mask.sum(1)]

    def reset(self, sequence: HfSequence) -> HfSequence:
        sequence.cache.reset()
        sequence.ids = sequence.mask = sequence.ids[:, :0]
        return sequence

    def truncate(self, sequence: HfSequence, length: int) -> HfSequence:
        """``crop`` takes the number of tokens to drop, and drops all if there are fewer."""
        held = min(self.length(sequence))
        check_length(length, held)
        if not bool(sequence.mask.all()):
            raise ValueError("crop cannot cut rows of different lengths to one length")
        if length < held:
            sequence.cache.crop(length - held)
            sequence.ids, sequence.mask = sequence.ids[:, :length], sequence.mask[:, :length]
        return sequence

    @torch.no_grad()
    def reorder(self, sequence: HfSequence, rows: list[int]) -> HfSequence:
        """An empty cache keeps its original batch size (transformers#42454): it is created again."""
        check_rows(rows, sequence.batch)
        if not sequence.ids.shape[1]:
            return self.start(len(rows))
        sequence.cache.reorder_cache(torch.tensor(rows, device=self.device))
        sequence.ids, sequence.mask = sequence.ids[rows], sequence.mask[rows]
        return sequence

    def fork(self, sequence: HfSequence) -> HfSequence:
        """A deep copy of the cache, as used for prefix reuse in practice."""
        return copy.deepcopy(sequence)

    @torch.no_grad()
    def poison(self, sequence: HfSequence, keys: float | None, values: float | None) -> None:
        """Static layers: a layer with a window has no unused slot from the window on."""
        length = int(sequence.cache.get_seq_length())
        for layer in sequence.cache.layers:
            if layer.is_initialized:
                for number, buffer in ((keys, layer.keys), (values, layer.values)):
                    if number is not None:
                        buffer[:, :, length:] = number

    # --- reference ---
    @torch.no_grad()
    def uncached_forward(self, tokens: Array) -> Array:
        ids = torch.from_numpy(tokens).to(self.device)
        model = self.copies.of(self.noise) if self.copies is not None and self.noise is not None else self.model
        return self._given(model(input_ids=ids, use_cache=False, return_dict=True).logits)

    def _given(self, logits: torch.Tensor) -> Array:
        self.seen_on = logits.device.type
        return black_box.widened(logits[..., : self.config.vocabulary])

    def perturbed(self, storage: float, accumulation: float, seed: int) -> Transformers:
        """The copies of one model share its memory: each is made when it is used (``black_box.Perturbed``)."""
        if self.copies is None:
            self.copies = black_box.Perturbed(self.model)
        other = copy.copy(self)
        other.noise = storage, accumulation, seed
        return other

    def variants(self) -> dict[str, Changed]:
        return {words: Changed(self, forward) for words, forward in variants(self.model)}

    # --- what ran ---
    def runtime_info(self) -> dict[str, Any]:
        cache = self.cache()
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "model": type(self.model).__name__,
            "cache": type(cache).__name__,
            "layers": [type(layer).__name__ for layer in getattr(cache, "layers", ())],
            "attention": self.model.config._attn_implementation,
            "experts": experts(self.model),
            "device": self.seen_on,
            "precision": device_time.precision(self.model.dtype, self.device),
        }

    def synchronise(self) -> None:
        device_time.synchronise(self.device)

    def script_setup(self) -> str:
        return script.setup(self.recipe, self.calls, self.config)

    def script(self, program: Program, tag: str) -> str:
        return script.steps(program, tag)


@dataclass(frozen=True)
class Changed:
    """A variant of a model."""

    target: Transformers
    forward: Variant

    @torch.no_grad()
    def uncached_forward(self, tokens: Array) -> Array:
        return black_box.widened(self.forward(torch.from_numpy(tokens).to(self.target.device)).logits)


def experts(model: Any) -> str | None:
    """The experts implementation of a model; None without experts or choice."""
    names = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else {}
    return dict(names).get("")
