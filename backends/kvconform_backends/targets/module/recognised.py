"""What is known of a target before its first call, and what trials found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvconform_backends.targets.module.conventions import Convention
from kvconform_backends.targets.module.signature import ForwardSignature, concrete
from kvconform_backends.targets.module.slots import Slots
from kvconform_backends.targets.third_party import ThirdPartyError, guarded

Rank = tuple[bool, bool, bool, bool]
"""Whether the prompt ran, one more token ran, that token agreed with the uncached forward, and a chunk after it did."""
PROMPT = 3
"""Tokens of the first call of a trial, if it takes so many."""
CAPACITY = 40
"""Maximum length of a sequence: programs stay short."""


@dataclass
class ProbedTarget:
    """The object under trial, its origin, and its constructor arguments."""

    module: Any
    name: str
    namespace: Mapping[str, Any]
    init: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    rebuilt: Callable[[], tuple[Any, Mapping[str, Any]]] | None = None
    """Executes the file again: another target with the same weights, and the names of its file."""
    copyable: bool = True
    chunk: int | None = None
    rows: int | None = None
    """The most tokens of a cached call, and the most rows, as they are claimed from outside."""

    def copied(self, stateful: bool) -> tuple[Any, Mapping[str, Any]]:
        """The target with a state of its own and shared weights, and the names of its file. One that cannot be copied
        is built again if it is known to be ``stateful``, and is otherwise itself."""
        if not isinstance(self.module, nn.Module):
            return self.module, self.namespace
        if self.copyable:
            shared = {id(weight): weight for weight in self.module.parameters()}
            with suppress(ThirdPartyError), guarded():
                return copy.deepcopy(self.module, shared), self.namespace
            self.copyable = False
        return self.rebuilt() if stateful and self.rebuilt is not None else (self.module, self.namespace)

    def reported(self, names: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        """The values of these names in its arguments, attributes or config objects, each with its name."""
        places = list(self._places())
        for name in names:
            for place in places:
                value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    yield value, name

    def number(self, names: tuple[str, ...], otherwise: int) -> int:
        return next(self.reported(names), (otherwise, ""))[0]

    def _places(self) -> Iterator[Any]:
        holders = [self.module]
        if isinstance(self.module, nn.Module):
            holders += [m for m in self.module.modules() if not type(m).__module__.startswith("torch.")]
        yield from (self.init, *(value for value in self.init.values() if isinstance(value, Mapping)))
        for holder in holders:
            yield holder
            for name in ("config", "cfg", "args", "params"):
                value = getattr(holder, name, None)
                if value is not None and not callable(value):
                    yield value
        if not isinstance(self.module, nn.Module):
            yield self.namespace


@dataclass
class Recognised:
    """A convention, and what trials found.

    vocabulary: the number of token ids. outputs: the size of one token's output. rows: the maximum batch, and
    ``refusal`` the exception beyond it. given: the arguments for masks and positions. past: a description of the past.
    keeps_inputs: whether the cache holds the memory of the inputs. slots: arrays with a slot for each token.
    chunk: the most tokens of a cached call, and ``chunk_refusal`` the exception beyond them. refuses: whether it
    raises beyond the capacity. judged: whether trials showed that the convention is the one that is meant; if none
    agreed, ``disagreement`` says so. begins: whether the first cached call agreed with the reference. ragged_later:
    whether rows may take different numbers of tokens in later calls, too. truncated_new, reordered_new: whether a
    truncation, or a reordering, gives another past. rollback: see ``Claims``.
    hints: what giving an omitted argument would change. operations: methods of the module or its past that nothing
    calls, in words. contexts: the number of contexts that a sequence can have. held: as in ``BlackBox``.
    """

    signature: ForwardSignature
    convention: Convention
    given: dict[str, str] = field(default_factory=dict)
    width: int = 0
    vocabulary: int = 0
    outputs: int = 0
    uncached_last: bool = False
    last_only: bool = False
    rows: int | None = None
    refusal: str = ""
    capacity: int = CAPACITY
    capacity_from: str = ""
    past: str = ""
    layers: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    immutable: bool = False
    keeps_inputs: bool = False
    slots: Slots = field(default_factory=dict)
    reserved: tuple[int, ...] = ()
    contexts: int = 1
    held: Mapping[str, int] | None = None
    hints: dict[str, str] = field(default_factory=dict)
    operations: tuple[str, ...] = ()
    chunk: int | None = None
    chunk_refusal: str = ""
    refuses: bool = False
    rollback: int | None = None
    ragged_later: bool = False
    truncated_new: bool = False
    reordered_new: bool = False
    begins: bool = False
    judged: bool = True
    disagreement: str = ""
    rank: Rank = (False, False, False, False)

    @property
    def batch(self) -> int:
        return 1 if self.rows == 1 or not self.convention.batched else 2

    @property
    def prompt(self) -> int:
        """Tokens of the first call of a trial."""
        return min(PROMPT, self.chunk or PROMPT)

    @property
    def restarts(self) -> bool:
        """Whether a sequence can be emptied: by an empty past, a method, or a call at position 0."""
        return bool(self.convention.present or self.convention.begin or "cached" in self.convention.call)

    @property
    def words(self) -> str:
        """How it is called, in words."""
        c, names = self.convention, " and ".join(self.signature.pasts)
        if c.present == "past":
            how = f"{names} passed and modified in place, {self.past}"
        elif c.present:
            how = f"{names} passed and returned as {self.past}"
        else:
            how = "the module owns the cache" + (f", emptied by {c.begin}" if c.begin else "")
        one = "" if c.batched else ", without a batch axis"
        arrays = ", numpy arrays" if c.arrays == "numpy" else ""
        kind = "token ids" if c.takes == "tokens" else "hidden states"
        return f"{kind} in{one}{arrays}, {how}; called as {concrete(c.call, {})}"

    @property
    def doubts(self) -> Iterator[str]:
        """What trials found against the convention, in sentences."""
        c = self.convention
        if self.disagreement and all(self.rank):
            yield f"in trials {self.disagreement}"
        elif self.disagreement:
            yield (
                f"it is called as meant, although in trials {self.disagreement}; if not, give the call: --option "
                f'\'convention={{"call": "{concrete(c.call, {})}"}}\''
            )

    @property
    def assumed(self) -> Iterator[str]:
        """The assumptions made, one sentence each."""
        c, sig = self.convention, self.signature
        uncached = concrete(c.uncached, {"past": c.empty})
        if c.always:
            begun = f"the first {uncached} after {c.begin}" if c.begin else f"{uncached} at position 0"
            yield f"the reference is {begun}, in a separate process: every call uses the cache"
        else:
            yield f"the reference is {uncached}"
        if c.present and c.empty != "None":
            yield f"an empty past is {c.empty}"
        if c.owned and not c.begin:
            yield "the cache cannot be emptied: a sequence starts with " + (
                "a call at position 0" if sig.positions else "the next call"
            )
        if c.owned or c.begin:
            yield "the module holds one sequence at a time"
        told = concrete(c.tell, {}) or " and ".join(name for name in sig.contexts if name in self.given)
        if self.contexts > 1:
            yield f"the context of a sequence, one of {self.contexts}, is given by {told} in each call"
        elif told:
            yield f"{told} makes no difference to the reference, and is not judged"
        for name, form in ((n, form) for n, form in self.given.items() if n not in sig.contexts):
            counts = " (cached and new tokens)" if "new" in form else " (the number of cached tokens)"
            yield f"{name} is given as {concrete(form, {})}" + counts * ("cached" in form)
        for name in (*sig.masks, *sig.positions):
            if name not in self.given:
                yield f"{name} is omitted{self.hints.get(name, '')}"
        if c.sequence_first:
            yield "the tokens are in the first axis, the rows in the second"
        if "sofar" in c.call:
            yield "each call is given all tokens of the sequence so far (sofar)"
        if c.truncate:
            yield f"a sequence is truncated by {concrete(c.truncate, {})}"
        if c.ragged:
            yield f"rows that take different numbers of tokens are appended by {concrete(c.ragged, {})}"
        if c.fork:
            yield f"a sequence is forked by {concrete(c.fork, {})}"
        if c.reorder:
            yield f"rows are reordered by {concrete(c.reorder, {})}"
        if c.one_by_one:
            why = f": given several, it raised {self.chunk_refusal}" if self.chunk_refusal else ""
            yield f"after the first call it is given one token at a time{why}"
        if self.rollback is not None:
            yield f"the last {self.rollback} tokens can be undone at most: more was refused"
        if self.chunk is not None and self.chunk_refusal:
            words = "one token" if self.chunk == 1 else f"{self.chunk} tokens"
            yield f"a cached call takes at most {words}: more raised {self.chunk_refusal}"
        if self.refusal:
            rows = "one row" if self.rows == 1 else f"{self.rows} rows"
            yield f"it takes at most {rows}: more raised {self.refusal}"
        if self.keeps_inputs:
            yield "its cache holds the inputs of earlier calls themselves, which the caller must not overwrite"
        if self.last_only:
            yield "a call returns only the output of its last token"
        source = f", from its {self.capacity_from}" if self.capacity_from else ", as it reports no limit"
        yield f"a sequence has at most {self.capacity} tokens{source}"
