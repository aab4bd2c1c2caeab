"""Finds out by trial which convention a target follows, and what its inputs and its cache look like.

Every call that the names allow is tried on a few tokens. Trials choose between ways of calling and judge nothing: what
raises or is wrong under the best of them is left for the suite to find. Refusals of more than one row, and of long
inputs by the forward without a cache, become claims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kvconform_backends.targets.foreign import Raised, foreign
from kvconform_backends.targets.module import conventions
from kvconform_backends.targets.module.beginnings import Beginnings
from kvconform_backends.targets.module.calls import leaves
from kvconform_backends.targets.module.conventions import Convention, Signature
from kvconform_backends.targets.module.past import contents, described, frozen, grown_axis, sizes
from kvconform_backends.targets.module.recognised import CAPACITY, Recognised, Target
from kvconform_backends.targets.module.trials import CROWD, LENGTH, PROMPT, SHORTEST, Trials, parts

Array = NDArray[Any]


class Unrecognised(Exception):
    """No known convention: what was found, in words."""


def recognise(target: Target, overrides: Mapping[str, Any]) -> Recognised:
    """Raises Unrecognised, or ValueError for a field that a convention has not. ``overrides``: fields of the convention
    that a person gives."""
    try:
        signature = conventions.signature_of(target.module, target.name)
    except ValueError as error:
        raise Unrecognised(f"{error}, whose parameters have no names") from error
    if "call" in overrides:
        return Recognition(target, signature, overrides).found()
    try:
        if signature.strange:
            raise Unrecognised(f"{signature.text}, and nothing says what {signature.strange[0]!r} should be given")
        return Recognition(target, signature, overrides).found()
    except Unrecognised:
        if not signature.pasts and not signature.flags:
            for name in signature.unknown:  # a past by a name of its own, if cached calls agree with it
                found = _with_past(target, name, overrides)
                if found is not None:
                    return found
        raise


def _with_past(target: Target, name: str, overrides: Mapping[str, Any]) -> Recognised | None:
    signature = conventions.signature_of(target.module, target.name, name)
    if signature.strange:
        return None
    try:
        found = Recognition(target, signature, overrides).found()
    except Unrecognised:
        return None
    return found if all(found.rank) else None


class Recognition(Trials):
    """One target's trials."""

    def __init__(self, target: Target, signature: Signature, overrides: Mapping[str, Any]) -> None:
        super().__init__(target)
        self.sig, self.overrides = signature, overrides
        self.beginnings = Beginnings(target, signature, overrides)

    def found(self) -> Recognised:
        best: Recognised | None = None
        for made in self._wholes():
            for convention in self._cached(made):
                found = replace(made, convention=convention)
                self.ranked(found)
                if best is None or found.rank > best.rank:  # of equals the first, which is likelier
                    best = found
                if all(found.rank):
                    break
        if best is None:
            raise Unrecognised(f"{self.sig.text}, whose calls show no cache{self._words()}")
        if not best.rank[0] and best.batch == 2:  # it may be a cache for one row
            self.ranked(best)
            one = replace(best, rows=1, refusal=self.raised)
            self.ranked(one)
            best = one if one.rank[0] else best
        self._crowded(best)
        self._limited(best)
        if best.rank[1]:
            self._shaped(best)
        if best.rank[0] and not all(best.rank):
            self._hinted(best)
        return best

    def _hinted(self, best: Recognised) -> None:
        """Whether it would agree if parameters were given that may be left out: told, and not done. What a module makes
        of their absence is its own doing."""
        forms = {name: conventions.position_forms(self.sig, name) for name in self.sig.positions}
        forms |= {name: conventions.mask_forms(name) for name in self.sig.masks}
        for name in (name for name in forms if name not in best.given):
            for form in forms[name]:
                calls = (
                    conventions.extended(text, name, form) for text in (best.convention.call, best.convention.whole)
                )
                call, whole = calls
                trial = replace(best, convention=replace(best.convention, call=call, whole=whole))
                self.ranked(trial)
                if all(trial.rank):
                    best.hints[name] = f"; given as {conventions.concrete(form, {})}, cached calls would agree"
                    break

    # --- the forward without a cache ---
    def _wholes(self) -> list[Recognised]:
        """The ways to call it without a cache, on the first inputs that it takes; if any, those under which no token
        sees its future, and among them those that leave out masks that may be left out."""
        for takes, size, arrays, batched in self._kinds():
            running: list[Recognised] = []
            for given in conventions.settings(self.sig):
                for form in self._whole_forms(given):
                    convention = replace(form, takes=takes, arrays=arrays, batched=batched).overridden(self.overrides)
                    made = self._tried(Recognised(self.sig, convention, given), size)
                    if made is not None:
                        running.append(made)
                        if self.sig.pasts:
                            break
            if running:
                free = [made for made in running if not self._optional_mask(made)]
                calm = [made for made in running if self._causal(made)]
                return [made for made in calm if made in free] or calm or free or running
        raise Unrecognised(f"{self.sig.text}, and no inputs that it takes{self._words()}")

    def _words(self) -> str:
        return f" (the last trial raised {self.raised})" if self.raised else ""

    def _optional_mask(self, made: Recognised) -> bool:
        return any(name in self.sig.masks and not self.sig.required(name) for name in made.given)

    def _kinds(self) -> Iterator[tuple[str, int, str, bool]]:
        """What may go in: tokens or states, their width, in which arrays, with a batch axis or without."""
        module, first = self.target.module, self.sig.inputs[0]
        embeds = isinstance(module, nn.Module) and any(isinstance(m, nn.Embedding) for m in module.modules())
        kinds = ["tokens", "states"] if first in conventions.TOKENS or embeds else ["states", "tokens"]
        foreign = ("torch",) if isinstance(module, nn.Module) else ("torch", "numpy")
        asked = self.overrides
        for arrays in (asked["arrays"],) if "arrays" in asked else foreign:
            for batched in (asked["batched"],) if "batched" in asked else (True, False):
                for takes in (asked["takes"],) if "takes" in asked else kinds:
                    for size in [0] if takes == "tokens" else self._widths():
                        yield takes, size, arrays, batched

    def _widths(self) -> list[int]:
        """Candidates for the width of hidden states, the likeliest first."""
        target = self.target
        found = [value for value, _name in target.told(conventions.WIDTHS)]
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

    def _whole_forms(self, given: Mapping[str, str]) -> Iterator[Convention]:
        sig = self.sig
        off = {name: "False" for name in sig.flags if sig.required(name) or sig.default(name) is not False}
        if sig.pasts and all(map(sig.required, sig.pasts)):
            for empty, imports in self.beginnings.empties():
                call = conventions.written(sig, {**self._pasts(), **off, **given})
                yield Convention(whole=call, empty=empty, imports=imports)
        elif sig.pasts or sig.flags:
            yield Convention(whole=conventions.written(sig, {**off, **given}))
        else:
            if sig.positions and not any(name in given for name in sig.positions):
                yield Convention(whole=conventions.written(sig, given))  # given positions may be what asks for a cache
            for begin, imports in self.beginnings.begins():
                yield Convention(whole=conventions.written(sig, given), begin=begin, always=True, imports=imports)

    def _tried(self, made: Recognised, size: int) -> Recognised | None:
        """What the whole forward takes and gives, or None where it raises or gives no output. Of two rows, else of one;
        token ids are first 0 and 1, which every vocabulary has."""
        made.width, made.vocabulary = (0, 2) if made.convention.takes == "tokens" else (size, 0)
        for rows in (None, 1) if made.convention.batched else (1,):
            made.rows = rows
            try:
                with foreign():
                    return self._tried_once(made)
            except Raised as error:  # one row, or another way of calling, may do
                self.raised = made.refusal = str(error)
        return None

    def _tried_once(self, made: Recognised) -> Recognised | None:
        x, caller = self.sample(made, LENGTH), self.caller(made.convention)
        names = caller.called(made.convention.whole, caller.first(len(x)), x)
        output = next(self.outputs(names["out"], x, made.convention), None)
        if output is None:
            self.raised = f"nothing, and returned {_kind(names['out'])}"
            return None
        expression, made.whole_last = output
        made.convention = replace(made.convention, whole_output=expression).overridden(self.overrides)
        made.outputs = self.caller(made.convention).whole(x).shape[-1]
        if made.convention.takes == "tokens":
            made.vocabulary = self._vocabulary(made)
        return made

    def _vocabulary(self, made: Recognised) -> int:
        """How many token ids there are: those of the table that the ids go to, else as many as it takes."""
        tables = self._reached(made)
        made.reserved = tuple(m.padding_idx for m in tables if m.padding_idx is not None)
        known = [m.num_embeddings for m in tables]
        known += [value for value, _name in self.target.told(conventions.VOCABULARIES)]
        for count in (*known, made.outputs):
            if self.runs(replace(made, vocabulary=count), LENGTH, count - 1):
                return count
        low, high = 2, max(2, made.outputs)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.runs(made, LENGTH, middle - 1) else (low, middle - 1)
        return low

    def _reached(self, made: Recognised) -> list[nn.Embedding]:
        """The embeddings that are given the token ids themselves."""
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
        caller.whole(x)
        for hook in hooks:
            hook.remove()
        return found

    def _causal(self, made: Recognised) -> bool:
        """Whether no output moves by a bit when the last token changes, and all are finite."""
        if made.whole_last:
            return True  # there is no output that could move
        caller, x = self.caller(made.convention), self.sample(made, LENGTH)
        other = x.copy()
        other[:, -1] = (x[:, -1] + 1) % made.vocabulary if made.vocabulary else -x[:, -1]
        one, two = caller.whole(x), caller.whole(other)
        return bool(np.isfinite(one).all() and np.array_equal(one[:, :-1], two[:, :-1]))

    def _asked(self, made: Recognised) -> tuple[bool, ...]:
        """Which calls limit it: without a cache, and the first one with it, if nothing of earlier trials is in it."""
        return (False, True) if made.rank[0] and made.restarts else (False,)

    def _crowded(self, made: Recognised) -> None:
        """How many rows it takes, if it takes two."""
        for cached in self._asked(made) if made.batch == 2 else ():
            if not self.runs(made, PROMPT, cached=cached, rows=CROWD):
                made.refusal, low, high = self.raised, 2, CROWD - 1
                while low < high:
                    middle = (low + high + 1) // 2
                    runs = self.runs(made, PROMPT, cached=cached, rows=middle)
                    low, high = (middle, high) if runs else (low, middle - 1)
                made.rows = low if made.rows is None else min(low, made.rows)

    def _limited(self, made: Recognised) -> None:
        """How many tokens a sequence has: what it tells, as far as its forward without a cache takes them."""
        for made.capacity, made.capacity_from in (
            (min(value, CAPACITY), name) for value, name in self.target.told(conventions.CAPACITIES)
        ):
            break
        for cached in self._asked(made):
            if not self.runs(made, made.capacity, cached=cached):
                low, high = LENGTH, made.capacity
                while low < high:
                    middle = (low + high + 1) // 2
                    low, high = (middle, high) if self.runs(made, middle, cached=cached) else (low, middle - 1)
                made.capacity, made.capacity_from = low, f"longest {'prompt' if cached else 'input without a cache'}"
                if low < SHORTEST:
                    raise ValueError(f"it takes {low} tokens ({self.raised}), and a sequence needs {SHORTEST} of them")

    # --- cached calls ---
    def _cached(self, made: Recognised) -> Iterator[Convention]:
        """Every way to call it with a cache that the names allow and the first call does not rule out."""
        if "call" in self.overrides:
            yield made.convention
            return
        on = dict.fromkeys(self.sig.flags, "True")
        if self.sig.pasts:
            yield from self._passed(made, {**self._pasts(), **on, **made.given})
        elif self.sig.flags or made.convention.always:
            if self.sig.flags or self.sig.positions or self.beginnings.begins() != [("", ())]:
                yield from self._owned(made, {**on, **made.given})
        else:
            for given in conventions.settings(self.sig, placed=True):
                yield from self._owned(made, given)

    def _pasts(self) -> dict[str, str]:
        one = len(self.sig.pasts) == 1
        return {name: "past" if one else f"past[{i}]" for i, name in enumerate(self.sig.pasts)}

    def _passed(self, made: Recognised, given: Mapping[str, str]) -> Iterator[Convention]:
        call = conventions.written(self.sig, given)
        x = self.sample(made, PROMPT)
        for empty, imports in self.beginnings.empties():
            if made.convention.empty != "None" and empty != made.convention.empty:
                continue  # its past is required: the empty one is known
            start = replace(made.convention, call=call, empty=empty, imports=imports)
            try:
                with foreign():
                    caller = self.caller(start)
                    held = caller.start(len(x))
                    before = contents(held.past)
                    names = caller.called(call, held, x)
            except Raised as error:
                self.raised = str(error)
                continue
            changed = held.past is not None and contents(held.past) != before
            for output, _last in self.outputs(names["out"], x, start):
                for present in self._presents(names["out"], output, changed):
                    yield replace(start, output=output, present=present).overridden(self.overrides)

    def _owned(self, made: Recognised, given: Mapping[str, str]) -> Iterator[Convention]:
        call = conventions.written(self.sig, given)
        x = self.sample(made, PROMPT)
        for begin, imports in self.beginnings.begins():
            start = replace(made.convention, call=call, begin=begin, imports=imports)
            try:
                with foreign():
                    caller = self.caller(start)
                    out = caller.called(call, caller.start(len(x)), x)["out"]
                    output = next(self.outputs(out, x, start), (made.convention.whole_output, False))[0]
            except Raised as error:  # that it raises is for the suite to find
                self.raised = str(error)
                output = made.convention.whole_output
            yield replace(start, output=output).overridden(self.overrides)

    def _presents(self, out: Any, output: str, changed: bool) -> Iterator[str]:
        """Expressions for what the caller keeps: containers before bare tensors, which may be attention weights."""
        pieces = [(e, v) for e, v in parts(out, conventions.PRESENTS) if e != "out" and not output.startswith(e)]
        held = [(e, v) for e, v in pieces if leaves(v)]
        bare = [e for e, v in held if hasattr(v, "shape")]
        if len(self.sig.pasts) == 1:
            yield from (e for e, v in held if not hasattr(v, "shape"))
        if changed:
            yield "past"
        if len(bare) > 1:
            yield f"({bare[0]}, {bare[1]})"  # a pair that is returned flat
        yield from bare

    def _shaped(self, made: Recognised) -> None:
        """Heads and layers, by what the past is made of, else by what attributes tell."""
        target = self.target
        width = made.width or target.number(conventions.WIDTHS, self._widths()[0] if self._widths() else 1)
        made.heads = target.number(conventions.HEADS, 1)
        made.kv_heads = target.number(conventions.KV_HEADS, made.heads)
        made.head_dim = target.number(conventions.HEAD_DIMS, max(1, width // made.heads))
        made.layers = self.beginnings.layers()
        if not made.convention.owned:
            self._past(made)
        if made.heads % made.kv_heads:
            made.heads = made.kv_heads

    def _past(self, made: Recognised) -> None:
        """What the past is made of, which axis of it grows, and which expression tells how many tokens it holds."""
        convention = made.convention
        caller, x = self.caller(convention), self.sample(made, LENGTH)
        _output, first = caller.step(caller.start(len(x)), x[:, :PROMPT])
        before, held = dict(sizes(first.past)), contents(first.past)
        places = {leaf.data_ptr() for leaf in leaves(first.past) if isinstance(leaf, Tensor)}
        _output, second = caller.step(first, x[:, PROMPT : PROMPT + 1])
        after = dict(sizes(second.past))
        apart = not any(leaf.data_ptr() in places for leaf in leaves(second.past) if isinstance(leaf, Tensor))
        made.functional = apart and convention.present != "past" and frozen(first.past)
        made.functional &= contents(first.past) == held
        counts = [at for at, size in before.items() if size == PROMPT and after.get(at) == PROMPT + 1]
        axes = {at: grown_axis(shape, after.get(at)) for at, shape in before.items()}
        grown = {at: axis for at, axis in axes.items() if axis is not None}
        made.past = described(second.past)
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
            made.past += ", of a size that does not change"
        windowed = any(self.target.told(conventions.WINDOWS))
        length = "" if windowed or not counts else counts[0]
        made.convention = replace(convention, length=length).overridden(self.overrides)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
