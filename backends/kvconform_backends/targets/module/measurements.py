"""Measures a target by trial: its vocabulary, how many rows and tokens it takes, and the shape of its past."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from kvconform_backends.targets.module import identifiers, signature, slots
from kvconform_backends.targets.module.beginnings import Beginnings
from kvconform_backends.targets.module.calls import leaves
from kvconform_backends.targets.module.conventions import Convention
from kvconform_backends.targets.module.copies import Copies
from kvconform_backends.targets.module.limits import Limits
from kvconform_backends.targets.module.operations import Operations
from kvconform_backends.targets.module.past import contents, described, frozen, grown_axis, sizes
from kvconform_backends.targets.module.recognised import PROMPT, ProbedTarget, Recognised
from kvconform_backends.targets.module.signature import ForwardSignature
from kvconform_backends.targets.module.trials import LENGTH, Array, close
from kvconform_backends.targets.third_party import ThirdPartyError, guarded, largest

MOST_CONTEXTS = 3
MOST_WIDTHS = 8
"""Widths of encoder states that are tried."""


class Measurements(Limits, Operations, Copies):
    """Each ``measure_`` method stores its results in the given ``Recognised``."""

    def __init__(self, target: ProbedTarget, beginnings: Beginnings) -> None:
        super().__init__(target)
        self.beginnings = beginnings

    def vocabulary(self, made: Recognised) -> int:
        """The number of token ids: the size of the embedding that receives them, else the largest that works."""
        tables = self._embeddings(made)
        made.reserved = tuple(m.padding_idx for m in tables if m.padding_idx is not None)
        known = [m.num_embeddings for m in tables]
        known += [value for value, _name in self.target.reported(identifiers.VOCABULARIES)]
        for count in (*known, made.outputs):
            if self.runs(replace(made, vocabulary=count), LENGTH, count - 1):
                return count
        return largest(2, max(2, made.outputs), lambda count: self.runs(made, LENGTH, count - 1))

    def _embeddings(self, made: Recognised) -> list[nn.Embedding]:
        """The embeddings that are called with the token ids themselves."""
        if not isinstance(self.target.module, nn.Module):
            return []
        x = self.sample(made, LENGTH)
        found: list[nn.Embedding] = []

        def seen(table: Any, inputs: tuple[Any, ...]) -> None:
            ids = inputs[0]
            if isinstance(ids, Tensor) and ids.numel() == x.size and np.array_equal(ids.numpy().reshape(x.shape), x):
                found.append(table)

        caller = self.caller(made.convention)
        tables = [m for m in caller.module.modules() if isinstance(m, nn.Embedding)]
        hooks = [table.register_forward_pre_hook(seen) for table in tables]
        caller.uncached(x)
        for hook in hooks:
            hook.remove()
        return found

    def widths(self) -> list[int]:
        """Candidates for the width of hidden states, the likeliest first."""
        target = self.target
        found = [value for value, _name in target.reported(identifiers.WIDTHS)]
        if isinstance(target.module, nn.Module):
            for part in target.module.modules():
                if isinstance(part, nn.Linear):
                    found.append(part.in_features)
                elif isinstance(part, nn.LayerNorm):
                    found.append(part.normalized_shape[-1])
            matrices: list[Any] = list(target.module.parameters())
        else:
            matrices = leaves(dict(target.namespace), 2) + leaves(target.module, 2)
        found += [int(size) for x in matrices if x.ndim > 1 for size in x.shape]
        return list(dict.fromkeys(found))

    def context_forms(self, sig: ForwardSignature, name: str) -> tuple[str, ...]:
        """Values for a parameter that takes the sequence's context."""
        known = [value for value, _name in self.target.reported(identifiers.STATE_WIDTHS)]
        widths = list(dict.fromkeys((*known, *self.widths())))[:MOST_WIDTHS]
        return signature.context_forms(sig, name, widths, str(self.target.dtype))

    def measure_contexts(self, made: Recognised) -> None:
        """How a context is given, and how many there are: none unless the uncached forward depends on it."""
        for convention, given in self._told(made):
            trial = replace(made, convention=convention, given=given)
            trial.contexts = self._contexts(trial)
            if trial.contexts > 1:
                self.rank(trial)
                if trial.rank >= made.rank:
                    made.convention, made.given, made.contexts = convention, given, trial.contexts
                    return

    def _told(self, made: Recognised) -> Iterator[tuple[Convention, dict[str, str]]]:
        """Ways to give a context: those that are in use already, a method, or an optional argument."""
        c, sig, module = made.convention, made.signature, self.target.module
        if any(name in made.given for name in sig.contexts):
            yield c, made.given
        for name in identifiers.SET_ADAPTER:
            if callable(getattr(module, name, None)):
                held = [place for place in identifiers.ADAPTER_NAMES if _named(getattr(module, place, None))]
                for form in ("context", *(f"list(module.{place})[context]" for place in held)):
                    yield replace(c, tell=f"module.{name}({form})"), made.given
        for name in identifiers.ACTIVE:
            if type(getattr(module, name, None)) is int:
                yield replace(c, tell=f"setattr(module, {name!r}, context)"), made.given
        for name in sig.contexts:
            for form in () if name in made.given else self.context_forms(sig, name):
                call, uncached = (signature.extended(text, name, form) for text in (c.call, c.uncached))
                yield replace(c, call=call, uncached=uncached), {**made.given, name: form}

    def _contexts(self, made: Recognised) -> int:
        """How many contexts, up to ``MOST_CONTEXTS``, give the same tokens outputs that differ, each from each."""
        outputs: list[Array] = []
        x = self.sample(made, LENGTH)
        try:
            with guarded():
                for context in range(MOST_CONTEXTS):
                    output = self.caller(made.convention).uncached(x, context)
                    if not np.isfinite(output).all() or any(close(output, other) for other in outputs):
                        break
                    outputs.append(output)
        except ThirdPartyError as error:
            self.note(error)
        return max(1, len(outputs))

    def measure_shape(self, made: Recognised) -> None:
        """Heads and layers, from the past if possible, else from attributes."""
        target = self.target
        width = made.width or target.number(identifiers.WIDTHS, next(iter(self.widths()), 1))
        made.heads = target.number(identifiers.HEADS, 1)
        made.kv_heads = target.number(identifiers.KV_HEADS, made.heads)
        made.head_dim = target.number(identifiers.HEAD_DIMS, max(1, width // made.heads))
        made.layers = self.beginnings.layers()
        if made.convention.owned:
            self._note_operations(made, None)
        else:
            self._measure_past(made)
        if made.heads % made.kv_heads:
            made.heads = made.kv_heads

    def _note_operations(self, made: Recognised, past: Any) -> None:
        """What the module and its past can do, or take, that no call uses."""
        held = past[0] if isinstance(past, list | tuple) and past else past
        owners = ((self.target.module, "the module"), (held, "its past"))
        found = [
            f"{name} of {words}"
            for owner, words in owners
            for name in identifiers.OPERATIONS
            if not isinstance(owner, Tensor | np.ndarray | Mapping) and callable(getattr(owner, name, None))
        ]
        found += [f"its argument {name}" for name in made.signature.unknown if name in identifiers.LENGTHS]
        made.operations = tuple(found)

    def measure_kept(self, made: Recognised) -> None:
        """Whether what it keeps of a step is the memory of the inputs itself."""
        caller, x = self.caller(made.convention), np.ascontiguousarray(self.sample(made, PROMPT))
        caller.shares = True
        x = x[:, : made.chunk or PROMPT]
        _output, sequence = caller.step(caller.start(len(x)), x)
        first: int = x.__array_interface__["data"][0]
        starts = (
            leaf.data_ptr() if isinstance(leaf, Tensor) else leaf.__array_interface__["data"][0]
            for leaf in (*leaves(sequence.past), *leaves(caller.module))
        )
        made.keeps_inputs = any(first <= start < first + x.nbytes for start in starts)

    def measure_slots(self, made: Recognised) -> None:
        """Where its steps write their tokens, if it has a slot for each."""
        caller, x, ends, start = self.caller(made.convention), self.sample(made, LENGTH), (PROMPT, PROMPT + 1), 0
        sequence, states = caller.start(len(x)), list[dict[str, Tensor]]()
        for end in ends:
            _output, sequence = self.appended(caller, sequence, x[:, start:end], made.chunk)
            states.append(slots.copied(slots.arrays(caller.module, sequence.past)))
            start = end
        made.slots = slots.slots(states, ends)

    def _measure_past(self, made: Recognised) -> None:
        """What the past consists of, which axis grows, and which expression gives its length."""
        convention = made.convention
        caller, x = self.caller(convention), self.sample(made, LENGTH)
        _output, first = self.appended(caller, caller.start(len(x)), x[:, :PROMPT], made.chunk)
        before, held = dict(sizes(first.past)), contents(first.past)
        addresses = {leaf.data_ptr() for leaf in leaves(first.past) if isinstance(leaf, Tensor)}
        _output, second = caller.step(first, x[:, PROMPT : PROMPT + 1])
        after = dict(sizes(second.past))
        apart = not any(leaf.data_ptr() in addresses for leaf in leaves(second.past) if isinstance(leaf, Tensor))
        made.immutable = apart and convention.present != "past" and frozen(first.past)
        made.immutable &= contents(first.past) == held
        counts = [at for at, size in before.items() if size == PROMPT and after.get(at) == PROMPT + 1]
        axes = {at: grown_axis(shape, after.get(at)) for at, shape in before.items()}
        grown = {at: axis for at, axis in axes.items() if axis is not None}
        made.past = described(second.past)
        self._note_operations(made, second.past)
        if grown:
            at, axis = next(iter(grown.items()))
            shape = after[at]
            assert isinstance(shape, tuple)
            counts.insert(0, f"{at}.shape[{axis}]")
            made.layers = max(1, len(grown) // 2)
            rows = ["b"] if convention.batched else []
            letters = {2: ["h", "s", "d"], 3: ["s", "h", "d"]}.get(len(shape) - axis, [])
            if len(shape) == len(rows) + 2 and letters[:1] == ["h"]:
                made.past += f", ({', '.join([*rows, 's', 'd'])})"
            elif letters and len(shape) > len(rows) + 2:
                made.kv_heads, made.head_dim = shape[letters.index("h") - 3], shape[-1]
                more = len(shape) > len(rows) + 3
                made.past += f", ({', '.join([*(['...'] if more else rows), *letters])})"
        else:
            made.past += ", of constant size"
        if any(self.target.reported(identifiers.WINDOWS)):  # its length stops growing
            counts = []
        length = next((count for count in counts if self._counts_all(made, count)), "")
        made.convention = replace(convention, length=length)

    def _counts_all(self, made: Recognised, length: str) -> bool:
        """Whether the expression gives the length of a sequence up to the capacity: a past may evict tokens and say
        nothing of it. An exception on the way is left for the suite to report."""
        caller, x = self.caller(replace(made.convention, length=length)), self.sample(made, made.capacity)
        try:
            with guarded():
                sequence = caller.start(len(x))
                for token in range(made.capacity):
                    _output, sequence = caller.step(sequence, x[:, token : token + 1])
                    if caller.length(sequence) != token + 1:
                        return False
        except ThirdPartyError:
            pass
        return True


def _named(value: Any) -> bool:
    """Whether an attribute lists adapters by name."""
    return isinstance(value, Mapping | nn.ModuleDict | list | tuple) and all(isinstance(name, str) for name in value)
