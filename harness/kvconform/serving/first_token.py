"""The time to the first token, cold and warm, of an engine that conforms.

Each pair is one prompt that the engine has not seen: one request without the cache, and one after the prompt was asked
for once, in random order. The ratio is taken within the pair, so that slow minutes of the machine cancel; the interval
of the median is that of the sign test, over pairs: a server is not restarted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median

from kvconform.bench.analysis.intervals import interval
from kvconform.results.serving import FirstToken
from kvconform.serving.noise import tokens
from kvconform.serving.session import Sent, Session, Spent
from kvconform_specs.serving.program import Span
from kvconform_specs.serving.requests import Request

PAIRS = 15
LONGEST = 2048
"""Tokens of the longest prompt that is timed, as far as the context allows."""


def first_tokens(session: Session, seed: int) -> list[FirstToken]:
    """By length of the prompt; lengths that the limits leave no room for are left out. Raises EngineDied."""
    longest = min(session.facts.context - 2, LONGEST)
    lengths = sorted({min(2 * session.sizes.block + 1, longest), longest // 2, longest})
    found, order = [], random.Random(seed)
    for length in lengths:
        try:
            pairs = [_pair(session, length, order) for _ in range(PAIRS)]
        except Spent:
            break
        hit = [pair for pair in pairs if pair is not None]
        if hit:
            found.append(summary(length, hit))
    return found


def _pair(session: Session, length: int, order: random.Random) -> tuple[float, float, int] | None:
    """Seconds cold and warm, and how many tokens the warm one read from the cache; None where it read none."""
    prompt = tokens(session, session.fresh(), Span(seed=0, stop=length))
    took: dict[bool, float] = {}
    cached = 0
    for warm in order.sample((False, True), 2):
        if warm:
            session.send([Request(prompt, 1)])
        seconds, sent = timed(session, Request(prompt, 1, cached=warm))
        took[warm] = seconds
        cached = sent.answer.cached or 0 if warm else cached
        if sent.answer.error is not None or (sent.answer.cached and not warm):
            return None
    return (took[False], took[True], cached) if cached else None


def timed(session: Session, one: Request) -> tuple[float, Sent]:
    """The time of a request for one token, by the engine's own client where it takes it."""
    began = time.perf_counter()
    (sent,) = session.send([one])
    seconds = time.perf_counter() - began
    return sent.answer.seconds_to_first or seconds, sent


def summary(length: int, pairs: Sequence[tuple[float, float, int]]) -> FirstToken:
    ratios = [cold / warm for cold, warm, _ in pairs]
    ratio, low, high = interval(ratios)
    return FirstToken(
        length=length,
        cached=min(cached for _, _, cached in pairs),
        cold=median(cold for cold, _, _ in pairs),
        warm=median(warm for _, warm, _ in pairs),
        ratio=ratio,
        low=low,
        high=high,
        pairs=len(pairs),
    )
