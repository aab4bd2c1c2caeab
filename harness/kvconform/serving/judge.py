"""Answers of a program compared with their references: the first mismatch, as data, or what was compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from kvconform.errors import Raised
from kvconform.judging.mismatch import Kind, Mismatch, json_number
from kvconform.serving.engine import Answer, Completion
from kvconform.serving.model import Array
from kvconform.serving.noise import Calibration, apart, lead
from kvconform.serving.session import Sent, Session
from kvconform_specs.serving.clauses import Served, ServingClause
from kvconform_specs.serving.program import Program

Reference = Literal["cold", "prefill", "repeated", "model"]
Row = Mapping[int, float]


@dataclass
class Judged:
    """What came of a program. ``hits``: how many answers that read the cache were judged. ``worst``: the largest
    difference as a fraction of its bound. ``void``: how many references were read from the cache, so that nothing was
    compared with them."""

    mismatch: Mismatch | None = None
    compared: int = 0
    hits: int = 0
    preempted: int = 0
    void: int = 0
    worst: float | None = None

    def add(self, other: Judged) -> None:
        """The counts of another program as well."""
        self.compared += other.compared
        self.hits += other.hits
        self.preempted += other.preempted
        self.void += other.void
        if other.worst is not None:
            self.worst = max(self.worst or 0.0, other.worst)


def judged(clause: ServingClause, program: Program, session: Session, gauge: Calibration) -> Judged:
    """Sends the program's requests, then asks for what they are compared with. Raises Spent, EngineDied."""
    found = Judged()
    preempted = session.preempted()
    steps = session.run(program)
    found.preempted = max(session.preempted() - preempted, 0)  # an engine that was started again counts from 0
    for step, sent in enumerate(steps):
        for number, one in enumerate(sent):
            void = found.void
            too_long = program.steps[step].asks[number].too_long  # type: ignore[union-attr]  # a reset has no answers
            for relation in clause.relations:
                mismatch = RELATIONS[relation](one, too_long, session, gauge, found)
                if mismatch is not None:
                    call = called(one, number, len(sent))
                    found.mismatch = msgspec.structs.replace(mismatch, program=0, step=step, row=number, call=call)
                    return found
            found.hits += bool(one.answer.cached) and found.void == void  # else it was compared with nothing
    return found


def called(one: Sent, number: int, together: int) -> str:
    """A request in words."""
    r = one.request
    words = [f"a request of {len(r.prompt)} tokens, {r.tokens} to generate"]
    words += [f"n {r.n}"] * (r.n > 1) + [f"salt {r.salt}"] * (r.salt is not None)
    words += [f"adapter {r.adapter}"] * (r.adapter is not None)
    words += [f"{one.answer.cached} from the cache"] * bool(one.answer.cached)
    words += [f"number {number} of {together} at the same time"] * (together > 1)
    return ", ".join(words)


# --- relations ---
def _cold(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    return None if gauge.bound is None else _against_cold(one, too_long, session, gauge.bound, found)


def _bitwise(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    return _against_cold(one, too_long, session, 0.0, found)


def _against_cold(one: Sent, too_long: bool, session: Session, bound: float, found: Judged) -> Mismatch | None:
    if too_long:
        return None
    want = session.cold(one.request)
    if want is None:
        found.void += 1
        return None
    if want.error is not None:
        return None  # alone it is refused as well
    if one.answer.error is not None:
        return None if one.beside else _refused(one.answer)
    whole = one.request.abort_after is None
    if whole and len(one.answer.completions) != one.request.n:
        return Mismatch(kind=Kind.COUNT, counted="completions", got=len(one.answer.completions), want=one.request.n)
    for completion in one.answer.completions:
        mismatch = compared(completion, want.completions[0], bound, "cold", found, whole=whole)
        if mismatch is not None:
            return mismatch
    return None


def _repeated(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    first, again = session.cold(one.request), session.cold(one.request, again=True)
    if first is None or again is None:
        found.void += 1
        return None
    if first.error is not None or again.error is not None:
        return None
    return compared(again.completions[0], first.completions[0], 0.0, "repeated", found)


def _rescored(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    bound = gauge.decode_bound
    if bound is None or not one.answer.completions:
        return None
    completion = one.answer.completions[0]
    for place in range(1, len(completion.ids)):
        scored = session.cold(replace(one.request, prompt=one.request.prompt + completion.ids[:place], tokens=1))
        if scored is None or scored.error is not None:
            found.void += scored is None
            continue
        mine = Completion(completion.ids[place : place + 1], completion.logprobs[place : place + 1])
        mismatch = compared(mine, scored.completions[0], bound, "prefill", found, start=place)
        if mismatch is not None:
            return mismatch
    return None


def _prompt(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    if not one.request.score or gauge.bound is None or one.answer.error is not None:
        return None
    want = session.cold(one.request)
    if want is None or want.error is not None:
        found.void += want is None
        return None
    rows, wanted = one.answer.prompt_logprobs, want.prompt_logprobs
    if len(rows) != len(one.request.prompt) - 1:
        return Mismatch(kind=Kind.COUNT, counted="scored", got=len(rows), want=len(one.request.prompt) - 1)
    for place, (row, right) in enumerate(zip(rows, wanted, strict=False)):
        mismatch = _row(row, right, gauge.bound, "cold", found)
        if mismatch is not None:
            return _at(mismatch, place + 1, "prompt")
    return None


def _counts(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    answer, r = one.answer, one.request
    if answer.error is not None:
        return None
    checks: list[tuple[Literal["cached", "prompt", "generated"], int | None, int]] = [
        ("prompt", answer.prompt_tokens, len(r.prompt))
    ]
    if r.abort_after is None:
        checks.append(("generated", sum(len(c.ids) for c in answer.completions), r.tokens * r.n))
        checks.append(("generated", answer.completion_tokens, r.tokens * r.n))
    if answer.cached is not None:
        found.compared += 1
        if answer.cached > one.shared:
            return Mismatch(kind=Kind.COUNT, counted="cached", got=answer.cached, want_max=one.shared)
    for counted, got, want in checks:
        if got is not None:
            found.compared += 1
            if got != want:
                return Mismatch(kind=Kind.COUNT, counted=counted, got=got, want=want)
    return None


def _refusal(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    if too_long and session.facts.refuses_longer:
        found.compared += 1
        return Mismatch(kind=Kind.SERVED) if one.answer.error is None else None
    return None


def _beside(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    if too_long or one.answer.error is None:
        return None
    want = session.cold(one.request)
    return None if want is None or want.error is not None else _refused(one.answer)


def _refused(answer: Answer) -> Mismatch:
    return Mismatch(kind=Kind.REFUSED, error=Raised("refused", (answer.error or "")[:500]))


def _model(one: Sent, too_long: bool, session: Session, gauge: Calibration, found: Judged) -> Mismatch | None:
    """Each token is judged after those that the engine chose before it: a legal tie ends nothing."""
    if session.model is None or too_long or one.request.adapter is not None or one.answer.error is not None:
        return None
    prompt, rows = one.request.prompt, one.answer.prompt_logprobs
    for completion in one.answer.completions:
        ids = prompt + completion.ids
        start = 0 if rows else len(prompt) - 1
        right = session.model.rows(ids[:-1], start)
        for place, row in enumerate([*rows, *completion.logprobs][: len(right.bound)]):
            position = start + place + 1
            part: Literal["prompt", "answer"] = "prompt" if position < len(prompt) else "answer"
            within = position - len(prompt) if part == "answer" else position
            want, bound = right.value[place], float(right.bound[place])
            mismatch = _row(row, {token: float(want[token]) for token in row}, bound, "model", found)
            if mismatch is None and part == "answer":
                mismatch = _chosen(ids[position], want, bound)
            if mismatch is not None:
                return _at(mismatch, within, part)
    return None


def _chosen(token: int, want: Array, bound: float) -> Mismatch | None:
    """The lead of one logit over another moves by no more than the bound of a log-probability."""
    best = int(want.argmax())
    by = float(want[best] - want[token])
    if by <= bound:
        return None
    return Mismatch(kind=Kind.CHOICE, got=token, want=best, lead=by, bound=bound, reference="model")


Relation = Callable[[Sent, bool, Session, Calibration, Judged], Mismatch | None]
RELATIONS: dict[Served, Relation] = {
    Served.COLD: _cold,
    Served.BITWISE: _bitwise,
    Served.REPEATED: _repeated,
    Served.RESCORED: _rescored,
    Served.PROMPT: _prompt,
    Served.COUNTS: _counts,
    Served.REFUSED: _refusal,
    Served.BESIDE: _beside,
    Served.MODEL: _model,
}


# --- completions ---
def compared(
    got: Completion,
    want: Completion,
    bound: float,
    reference: Reference,
    found: Judged,
    *,
    start: int = 0,
    whole: bool = True,
) -> Mismatch | None:
    """The first mismatch of two completions. Where they chose different tokens and the lead is within twice the bound,
    both are right, and they are compared no further. ``start``: index of the first of these tokens in the answer."""
    for place, (a, b, mine, theirs) in enumerate(_places(got, want), start):
        mismatch = _row(mine, theirs, bound, reference, found)
        if mismatch is not None:
            return _at(mismatch, place, "answer")
        if a != b:
            by = max(lead(theirs, b, a), lead(mine, a, b))
            if not by <= 2 * bound:
                wrong = Mismatch(kind=Kind.CHOICE, got=a, want=b, lead=by, bound=2 * bound, reference=reference)
                return _at(wrong, place, "answer")
            if a in mine and b in theirs and not apart(mine[a], theirs[b]) <= bound:
                # the largest log-probability moves by no more than the one that moves most
                return _at(_logprob(b, mine[a], theirs[b], bound, reference), place, "answer")
            return None
    if whole and len(got.ids) != len(want.ids):
        return Mismatch(kind=Kind.COUNT, counted="generated", got=len(got.ids), want=len(want.ids))
    return None


def _places(got: Completion, want: Completion) -> Iterator[tuple[int, int, Row, Row]]:
    return zip(got.ids, want.ids, got.logprobs, want.logprobs, strict=False)


def _row(mine: Row, theirs: Row, bound: float, reference: Reference, found: Judged) -> Mismatch | None:
    """The log-probabilities of the tokens that both rows name; one with NaN is wrong."""
    for token in sorted(mine.keys() & theirs.keys()):
        off = apart(mine[token], theirs[token])
        found.compared += 1
        if not off <= bound:
            return _logprob(token, mine[token], theirs[token], bound, reference)
        if bound:
            found.worst = max(found.worst or 0.0, off / bound)
    return None


def _logprob(token: int, got: float, want: float, bound: float, reference: Reference) -> Mismatch:
    return Mismatch(
        kind=Kind.LOG_PROBABILITY,
        token=token,
        got=json_number(got),
        want=json_number(want),
        bound=bound,
        reference=reference,
    )


def _at(mismatch: Mismatch, position: int, part: Literal["prompt", "answer"]) -> Mismatch:
    return msgspec.structs.replace(mismatch, position=position, part=part)
