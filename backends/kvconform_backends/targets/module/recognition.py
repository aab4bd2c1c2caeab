"""Detects a target's calling convention, its inputs and its cache by trial.

Every call that the names allow is tried on a few tokens. Trials only choose between ways of calling: an exception or a
wrong result under the best of them is left for the suite to report. Refusals of more than one row, and of long inputs
by the uncached forward, become claims.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from kvconform_backends.targets.module import identifiers, signature
from kvconform_backends.targets.module.beginnings import Beginnings
from kvconform_backends.targets.module.calls import leaves
from kvconform_backends.targets.module.conventions import Convention
from kvconform_backends.targets.module.held import held
from kvconform_backends.targets.module.measurements import Measurements
from kvconform_backends.targets.module.past import contents
from kvconform_backends.targets.module.recognised import ProbedTarget, Recognised
from kvconform_backends.targets.module.refusals import Unrecognised, guess
from kvconform_backends.targets.module.signature import ForwardSignature, signature_of, written
from kvconform_backends.targets.module.trials import FINE, LENGTH, PROMPTED, ROUGH, parts
from kvconform_backends.targets.third_party import ThirdPartyError, guarded


def recognise(
    target: ProbedTarget, overrides: Mapping[str, Any], claims: Mapping[str, Any] = MappingProxyType({})
) -> Recognised:
    """Raises Unrecognised if no convention matches, or none under which a cached call agrees or appends its tokens.
    ``overrides``: fields of the convention given by the user; ``claims``: claims given by the user, whose limits no
    trial exceeds."""
    target.chunk, target.rows = claims.get("max_chunk"), claims.get("max_batch")
    try:
        sig = signature_of(target.module, target.name)
    except ValueError as error:
        raise Unrecognised(f"{error}, whose parameters have no names") from error
    if "call" in overrides:
        return Recognition(target, sig, overrides).found()
    first = _tried(target, sig, overrides)
    if isinstance(first, Recognised) and first.judged:
        return first
    for found in _others(target, sig, overrides):
        if isinstance(found, Recognised) and found.judged and (all(found.rank) or found.convention.sequence_first):
            return found
    if isinstance(first, Unrecognised):
        raise first
    c = first.convention
    line = {name: getattr(c, name) for name in ("call", "output", "present", "empty", "begin") if getattr(c, name)}
    call = signature.concrete(c.call, {})
    raise Unrecognised(f"{sig.text}: called as {call}, {first.disagreement}", {**line, "call": call})


def _tried(target: ProbedTarget, sig: ForwardSignature, overrides: Mapping[str, Any]) -> Recognised | Unrecognised:
    try:
        if sig.unknown_required:
            name = sig.unknown_required[0]
            raise Unrecognised(f"{sig.text}, whose required parameter {name!r} is unknown", guess(sig))
        return Recognition(target, sig, overrides).found()
    except Unrecognised as words:
        return words


def _others(
    target: ProbedTarget, sig: ForwardSignature, overrides: Mapping[str, Any]
) -> Iterator[Recognised | Unrecognised]:
    """Less likely ways to call it, of which only agreement shows that they are meant: a past with an unusual name, and
    tokens in the first axis."""
    if not sig.pasts and not sig.flags:
        for name in sig.unknown:
            yield _tried(target, signature_of(target.module, target.name, name), overrides)
    if "sequence_first" not in overrides:
        yield _tried(target, sig, {**overrides, "sequence_first": True, "batched": True})


class Recognition(Measurements):
    """The search for the convention of one target."""

    def __init__(self, target: ProbedTarget, sig: ForwardSignature, overrides: Mapping[str, Any]) -> None:
        super().__init__(target, Beginnings(target, sig, overrides))
        self.sig, self.overrides = sig, overrides
        contexts = {name: self.context_forms(sig, name) for name in sig.contexts}
        required = {name: forms for name, forms in contexts.items() if sig.required(name)}
        self.wanted = [required, contexts][: 1 + (required != contexts)]  # optional ones if nothing runs

    def found(self) -> Recognised:
        best = self._best()
        if best is None:
            raise Unrecognised(f"{self.sig.text}, whose calls show no cache{self._raised()}", guess(self.sig))
        if best.batch == 2 and not all(best.rank):  # the cache may support only one row
            best = self._of_one_row(best)
        if not all(best.rank):
            self.rank(best)
            best = self.one_by_one(best) or self.one_token_each(best) or best
        if not any(best.rank[2:]):
            refused = self.error  # by this way of calling: what trials of others raise says nothing about it
            found = self._given_all(best) or self._roughly()
            self.error = refused
            best = found or self.one_token_each(best, refused=True) or self.right_for_one_token(best) or best
        self._settle(best)
        if not best.judged:
            return best
        self.measure_contexts(best)
        self.measure_rows(best)
        self.measure_tokens(best)
        if best.rank[1]:
            self.measure_shape(best)
            best.convention = best.convention.overridden(self.overrides)
        if all(best.rank):
            self.measure_slots(best)
            self.measure_kept(best)
            best.held = held(self, best)
            self.measure_truncation(best)
            self.measure_ragged(best)
            self.measure_fork(best)
            self.measure_reorder(best)
        if best.rank[0] and not all(best.rank):
            self._add_hints(best)
        return best

    def _best(self) -> Recognised | None:
        best: Recognised | None = None
        for made in self._uncached():
            for convention in self._cached(made):
                found = replace(made, convention=convention)
                self.rank(found)
                better = best is None or found.rank > best.rank  # the first of equals is the likeliest
                if better or (convention.begin and all(found.rank)):
                    best = found
                if all(found.rank) and (convention.begin or not self._states() or self.repeats(found)):
                    return found
        return best

    def _roughly(self) -> Recognised | None:
        """The convention under which all cached calls agree if a cache of few bits is allowed for."""
        self.tolerance = ROUGH
        best = self._best()
        if best is None or not all(best.rank):
            self.tolerance = FINE
            return None
        best.disagreement = (
            "its cached calls agreed with its forward without a cache to one digit only; if its cache is lossy, claim "
            "its precision: --claim kv_bits=8, or --claim cache_dtype=float16"
        )
        return best

    def _of_one_row(self, best: Recognised) -> Recognised:
        """The same with one row, if that works better and two rows were refused."""
        self.error = None
        self.rank(best)
        refused, one = self.error, replace(best, rows=1, refusal=self.raised)
        if refused is None or (best.rank[0] and not refused.deliberate):
            return best
        self.rank(one)
        return one if one.rank > best.rank else best

    def _given_all(self, best: Recognised) -> Recognised | None:
        """The same where each call is given all tokens of the sequence, if that agrees and the past has an effect."""
        if "call" in self.overrides:
            return None
        call = written(self.sig, {**self._given_of(best)}, inputs="sofar")
        for output in (best.convention.output, f"{best.convention.output}[:, -new:]"):
            made = replace(best, convention=replace(best.convention, call=call, output=output))
            self.rank(made)
            if all(made.rank) and self.past_matters(made):
                return made
        return None

    def _given_of(self, best: Recognised) -> dict[str, str]:
        return {**self._pasts(), **dict.fromkeys(self.sig.flags, "True"), **best.given}

    def _settle(self, best: Recognised) -> None:
        """Whether a verdict on this convention is one on the target, and why not."""
        if not best.begins:
            self.rank(best, afresh=True)
        if any(best.rank[2:]) or "call" in self.overrides:
            return
        first = "its first cached call agreed" if best.begins else "no cached call agreed"
        how = f"; the next raised {self.likeliest}" if not best.rank[1] and self.likeliest else ""
        best.disagreement = f"{first} with its forward without a cache, and none after it{how}"
        best.judged = best.begins and self.remembers(best)

    def _add_hints(self, best: Recognised) -> None:
        """Records which omitted parameters would make cached calls agree. They stay omitted: the module's defaults are
        part of what is judged."""
        forms = {name: signature.position_forms(self.sig, name) for name in self.sig.positions}
        forms |= {name: signature.mask_forms(name) for name in self.sig.masks}
        for name in (name for name in forms if name not in best.given):
            for form in forms[name]:
                call, uncached = (
                    signature.extended(text, name, form) for text in (best.convention.call, best.convention.uncached)
                )
                trial = replace(best, convention=replace(best.convention, call=call, uncached=uncached))
                self.rank(trial)
                if all(trial.rank):
                    best.hints[name] = f"; given as {signature.concrete(form, {})}, cached calls would agree"
                    break

    def _raised(self) -> str:
        return f" (the trial that came furthest raised {self.likeliest})" if self.likeliest else ""

    # --- the uncached forward ---
    def _uncached(self) -> list[Recognised]:
        """Ways to call it without a cache, for the first kind of inputs that works: those that are causal, if any, and
        among them those that omit optional masks."""
        for takes, size, arrays, batched in self._kinds():
            running: list[Recognised] = []
            for contexts in self.wanted:
                for given in () if running else signature.settings(self.sig, contexts):
                    for form in self._uncached_forms(given):
                        convention = replace(form, takes=takes, arrays=arrays, batched=batched)
                        start = Recognised(
                            self.sig, convention.overridden(self.overrides), given, chunk=self.target.chunk
                        )
                        made = self._tried(start, size)
                        if made is not None:
                            running.append(made)
                            if self.sig.pasts:
                                break
            if running:
                plain = [made for made in running if not self._optional_mask(made)]
                causal = [made for made in running if self._causal(made)]
                return [made for made in causal if made in plain] or causal or plain or running
        raise Unrecognised(f"{self.sig.text}, which accepts no inputs that were tried{self._raised()}", guess(self.sig))

    def _optional_mask(self, made: Recognised) -> bool:
        return any(name in self.sig.masks and not self.sig.required(name) for name in made.given)

    def _kinds(self) -> Iterator[tuple[str, int, str, bool]]:
        """Kinds of input: tokens or states, their width, the array type, and whether there is a batch axis."""
        module, first = self.target.module, self.sig.inputs[0]
        embeds = isinstance(module, nn.Module) and any(isinstance(m, nn.Embedding) for m in module.modules())
        kinds = ["tokens", "states"] if first in identifiers.TOKENS or embeds else ["states", "tokens"]
        types = ("torch",) if isinstance(module, nn.Module) else ("torch", "numpy")
        asked = self.overrides
        for arrays in (asked["arrays"],) if "arrays" in asked else types:
            for batched in (asked["batched"],) if "batched" in asked else (True, False):
                for takes in (asked["takes"],) if "takes" in asked else kinds:
                    for size in [0] if takes == "tokens" else self.widths():
                        yield takes, size, arrays, batched

    def _uncached_forms(self, given: Mapping[str, str]) -> Iterator[Convention]:
        sig = self.sig
        if "call" in self.overrides and "uncached" not in self.overrides:  # the given call, on an empty past
            owned = not self._caller_keeps()
            uncached = re.sub(r"\bsofar\b", "x", self.overrides["call"])
            begins = [("", ())] if "begin" in self.overrides or not owned else self.beginnings.begins()
            for empty, imports in [("None", ())] if owned else self.beginnings.empties():
                for begin, used in begins:
                    names = (*imports, *used)
                    yield Convention(uncached=uncached, empty=empty, begin=begin, always=owned, imports=names)
            return
        off = {name: "False" for name in sig.flags if sig.required(name) or sig.default(name) is not False}
        if sig.pasts and all(map(sig.required, sig.pasts)):
            for empty, imports in self.beginnings.empties():
                call = written(sig, {**self._pasts(), **off, **given})
                yield Convention(uncached=call, empty=empty, imports=imports)
        elif sig.pasts or sig.flags:
            yield Convention(uncached=written(sig, {**off, **given}))
        else:
            if sig.positions and not any(name in given for name in sig.positions):
                yield Convention(uncached=written(sig, given))  # giving positions may be what enables the cache
            for begin, imports in self.beginnings.begins():
                yield Convention(uncached=written(sig, given), begin=begin, always=True, imports=imports)

    def _tried(self, made: Recognised, size: int) -> Recognised | None:
        """What the uncached forward takes and gives, or None if it raises or gives no output. Two rows are tried first,
        then one; token ids are 0 and 1, which every vocabulary has."""
        made.width, made.vocabulary = (0, 2) if made.convention.takes == "tokens" else (size, 0)
        for rows in (self.target.rows, 1) if made.convention.batched else (1,):
            made.rows = rows
            try:
                with guarded():
                    return self._tried_once(made)
            except ThirdPartyError as error:
                self.note(error)
                made.refusal = self.raised
        return None

    def _tried_once(self, made: Recognised) -> Recognised | None:
        x, caller = self.sample(made, LENGTH), self.caller(made.convention)
        out = caller.called(made.convention.uncached, caller.first(len(x)), x)["out"]
        output = next(self.outputs(out, x, made.convention), None)
        if output is None:
            self.note(ThirdPartyError(f"nothing, and returned {_kind(out)}"))
            return None
        expression, made.uncached_last = output
        made.convention = replace(made.convention, uncached_output=expression).overridden(self.overrides)
        made.outputs = self.caller(made.convention).uncached(x).shape[-1]
        if made.convention.takes == "tokens":
            made.vocabulary = self.vocabulary(made)
        return made

    def _causal(self, made: Recognised) -> bool:
        """Whether all outputs are finite and changing the last token changes no bit of the others."""
        if made.uncached_last:
            return True  # there are no other outputs
        caller, x = self.caller(made.convention), self.sample(made, LENGTH)
        other = x.copy()
        other[:, -1] = (x[:, -1] + 1) % made.vocabulary if made.vocabulary else -x[:, -1]
        one, two = caller.uncached(x), caller.uncached(other)
        return bool(np.isfinite(one).all() and np.array_equal(one[:, :-1], two[:, :-1]))

    # --- cached calls ---
    def _cached(self, made: Recognised) -> Iterator[Convention]:
        """Every way to call it with a cache that the names allow and the first call does not rule out."""
        if "call" in self.overrides:
            if self._caller_keeps() and "present" not in self.overrides:
                yield from self._passed(made, self.overrides["call"])
            else:
                yield replace(made.convention, call=self.overrides["call"])
            return
        on = dict.fromkeys(self.sig.flags, "True")
        if self.sig.pasts:
            call = written(self.sig, {**self._pasts(), **on, **made.given})
            yield from self._passed(made, call)
            for begin, imports in self._states():
                stateful = replace(made, convention=replace(made.convention, begin=begin))
                yield from self._passed(stateful, call, imports)
        elif self.sig.flags or made.convention.always:
            if self.sig.flags or self.sig.positions or self.beginnings.begins() != [("", ())]:
                yield from self._owned(made, {**on, **made.given})
        else:
            told = {name: (made.given[name],) for name in self.sig.contexts if name in made.given}
            for given in signature.settings(self.sig, told, placed=True):
                yield from self._owned(made, given)

    def _states(self) -> list[tuple[str, tuple[str, ...]]]:
        """Calls that empty a state which the module has beside a past that the caller keeps."""
        return [(begin, imports) for begin, imports in self.beginnings.begins() if begin and self.sig.pasts]

    def _caller_keeps(self) -> bool:
        """Whether the caller keeps the past, in a call that the user gave."""
        return bool(self.overrides.get("present")) or re.search(r"\bpast\b", self.overrides["call"]) is not None

    def _pasts(self) -> dict[str, str]:
        one = len(self.sig.pasts) == 1
        return {name: "past" if one else f"past[{i}]" for i, name in enumerate(self.sig.pasts)}

    def _passed(self, made: Recognised, call: str, used: tuple[str, ...] = ()) -> Iterator[Convention]:
        x = self.sample(made, made.prompt)
        for empty, imports in self.beginnings.empties():
            if made.convention.empty != "None" and empty != made.convention.empty:
                continue  # the past is required, so that the empty one is known
            start = replace(made.convention, call=call, empty=empty, imports=(*imports, *used))
            try:
                with guarded():
                    caller = self.caller(start)
                    sequence = caller.start(len(x))
                    before = contents(sequence.past)
                    out = caller.called(call, sequence, x)["out"]
            except ThirdPartyError as error:
                self.note(error, PROMPTED)
                continue
            changed = sequence.past is not None and contents(sequence.past) != before
            for output, _last in self.outputs(out, x, start):
                for present in self._presents(out, output, changed):
                    yield replace(start, output=output, present=present).overridden(self.overrides)

    def _owned(self, made: Recognised, given: Mapping[str, str]) -> Iterator[Convention]:
        call, x = written(self.sig, given), self.sample(made, made.prompt)
        for begin, imports in self.beginnings.begins():
            start = replace(made.convention, call=call, begin=begin, imports=imports)
            try:
                with guarded():
                    caller = self.caller(start)
                    out = caller.called(call, caller.start(len(x)), x)["out"]
                    output = next(self.outputs(out, x, start), (made.convention.uncached_output, False))[0]
            except ThirdPartyError as error:  # the suite reports it
                self.note(error, PROMPTED)
                output = made.convention.uncached_output
            yield replace(start, output=output).overridden(self.overrides)

    def _presents(self, out: Any, output: str, changed: bool) -> Iterator[str]:
        """Expressions for what the caller keeps: containers first, since bare tensors may be attention weights."""
        pieces = [(e, v) for e, v in parts(out, identifiers.PRESENTS) if e != "out" and not output.startswith(e)]
        held = [(e, v) for e, v in pieces if leaves(v)]
        bare = [e for e, v in held if hasattr(v, "shape")]
        if len(self.sig.pasts) < 2:
            yield from (e for e, v in held if not hasattr(v, "shape"))
        if changed:
            yield "past"
        if len(bare) > 1:
            yield f"({bare[0]}, {bare[1]})"  # key and value returned separately
        yield from bare


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
