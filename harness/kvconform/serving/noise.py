"""How far rounding moves an engine's log-probabilities, and how far one wrong token of the prompt does.

Rounding is measured by decode against prefill, both without the cache: the log-probabilities of generated token ``i``
against those of a request whose prompt already ends with the tokens before it. The same request asked twice is no
measure: it differs by nothing on most engines. The floor is what two correct roundings in the dtype may differ by. A
difference counts as an error above the bound; where one wrong token moves too little for that, the engine is *blind*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from kvconform.serving.engine import Completion
from kvconform.serving.model import SEPARATED
from kvconform.serving.session import Session
from kvconform_specs.serving.program import Span, renaming, stream
from kvconform_specs.serving.requests import Request

MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
"""Stored bits of the mantissa."""
ULPS = 2
"""A log-probability is a logit minus a sum that moves by no more than the largest move of a logit: where each logit may
move by one ulp, it moves by two."""
MOST = 300.0
"""The bound is at most so many times the noise, however large the effect."""
DECODED, PROMPTS, CHANGES = 6, 2, 8
REMEDY = "float32 for weights, computation and cache, flash attention off, or a batch-invariant mode"


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; log-probabilities are natural."""

    lengths: tuple[int, ...]
    """Lengths of the prompts, in tokens."""
    noise: float
    """The largest difference between decode and prefill."""
    floor: float
    """What two correct roundings may differ by, from the dtype and the largest log-probability."""
    repeat: float
    """The largest difference between two answers to the same request."""
    effect: float
    """The smallest difference that a changed token made, of those that are more than three times the noise."""
    effect_on_decode: float
    """The same, of those that are more than three times the floor."""
    changes: int
    """How many changed tokens were tried."""
    seen: int
    """How many of them moved an answer by more than three times the noise."""
    void: int = 0
    """How many answers without the cache were read from it all the same, so that they were not used."""

    @property
    def bound(self) -> float | None:
        """The largest difference that is no error; None where the engine is blind."""
        return None if self.seen * 2 < self.changes or self.changes == 0 else between(self.level, self.effect)

    @property
    def level(self) -> float:
        """Noise, or the floor where that is higher."""
        return max(self.noise, self.floor)

    @property
    def decode_bound(self) -> float | None:
        """The bound of decode against prefill, which cannot be taken from their difference: from the floor alone."""
        return None if not self.changes else between(self.floor, self.effect_on_decode)

    @property
    def blind(self) -> str:
        """Why there is no verdict; empty if there is one."""
        if self.bound is not None:
            return ""
        if not self.changes:
            return "no answer without the prefix cache could be had"
        return (
            f"rounding moves log-probabilities by {self.level:.2g}, and {self.seen} of {self.changes} changed tokens "
            f"move them by more than {SEPARATED:g} times that: a wrong token cannot be told from rounding; what helps: "
            f"{REMEDY}"
        )


def between(noise: float, effect: float) -> float | None:
    """A bound that separates the two: their geometric mean, at most ``MOST`` times the noise."""
    return min(math.sqrt(noise * effect), MOST * noise) if effect >= SEPARATED * noise else None


def calibrate(session: Session) -> Calibration:
    """Measures on prompts of the lengths that are judged. Raises Spent, EngineDied."""
    sizes = session.sizes
    lengths = tuple(sorted({sizes.longest + sizes.block, sizes.longest, sizes.block + 1}))
    noise = repeat = largest = 0.0
    effects: list[float] = []
    permutation = session.fresh()
    for length in lengths:
        for seed in range(PROMPTS):
            prompt = tokens(session, permutation, Span(seed=seed, stop=length))
            whole = answered(session, Request(prompt, DECODED))
            if whole is None:
                continue
            largest = max([largest, *(abs(value) for row in whole.logprobs for value in row.values())])
            again = answered(session, Request(prompt, DECODED), again=True)
            repeat = max(repeat, 0.0 if again is None else difference(whole, again))
            for i in range(1, len(whole.ids)):
                scored = answered(session, Request(prompt + whole.ids[:i], 1))
                if scored is not None:
                    noise = max(noise, gap(whole.logprobs[i], scored.logprobs[0]))
            for number in range(CHANGES // PROMPTS):
                at = (length - 1) * number // (CHANGES // PROMPTS)
                changed = (*prompt[:at], *other(session, permutation, seed, at), *prompt[at + 1 :])
                moved = answered(session, Request(changed, DECODED))
                if moved is not None:
                    effects.append(difference(whole, moved))
    floor = ULPS * ulp(largest, session.facts.dtype or "float32")
    visible = [effect for effect in effects if effect >= SEPARATED * max(noise, floor)]
    return Calibration(
        lengths=lengths,
        noise=noise,
        floor=floor,
        repeat=repeat,
        effect=min(visible, default=0.0),
        effect_on_decode=min((effect for effect in effects if effect >= SEPARATED * floor), default=0.0),
        changes=len(effects),
        seen=len(visible),
        void=session.voids,
    )


def ulp(value: float, dtype: str) -> float:
    """The distance of neighbouring numbers of the dtype at this size; of unknown dtypes, quantised ones for example,
    that of bfloat16."""
    return 2.0 ** (math.floor(math.log2(max(value, 1.0))) - MANTISSA.get(dtype, MANTISSA["bfloat16"]))


def tokens(session: Session, permutation: int, piece: Span) -> tuple[int, ...]:
    names = renaming(permutation, session.facts.vocabulary)
    ids = stream(piece.seed, piece.stop, session.facts.vocabulary)[piece.start :]
    return tuple(names[(token + piece.add) % len(names)] for token in ids)


def other(session: Session, permutation: int, seed: int, at: int) -> tuple[int, ...]:
    """Another token than the stream has there."""
    return tokens(session, permutation, Span(seed=seed, start=at, stop=at + 1, add=1))


def answered(session: Session, request: Request, *, again: bool = False) -> Completion | None:
    answer = session.cold(request, again=again)
    return answer.completions[0] if answer is not None and answer.completions else None


def gap(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The largest difference of log-probabilities of the same token; 0 if there is none. Equal infinities agree."""
    return max((apart(one[token], other[token]) for token in one.keys() & other.keys()), default=0.0)


def apart(one: float, other: float) -> float:
    return 0.0 if one == other else abs(one - other)


def difference(one: Completion, other: Completion) -> float:
    """The largest difference up to the first token that differs, that place included; there, that of the chosen tokens
    as well."""
    most = 0.0
    for mine, theirs, a, b in zip(one.logprobs, other.logprobs, one.ids, other.ids, strict=False):
        most = max(most, gap(mine, theirs))
        if a != b:
            return max(most, lead(mine, a, b), lead(theirs, b, a))
    return most


def lead(row: Mapping[int, float], first: int, second: int) -> float:
    """By how much the first token's log-probability exceeds the second's, at least; 0 where the row does not tell."""
    if first not in row or (second not in row and len(row) < 2):
        return 0.0
    return row[first] - row.get(second, min(row.values()))
