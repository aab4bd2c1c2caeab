"""What a run found of a serving engine: how it was reached, and what its numbers are worth."""

from __future__ import annotations

import msgspec


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """A serving engine, which is judged by its own answers without the prefix cache. Log-probabilities are natural."""

    engine: str
    """Name of the engine."""
    version: str
    """Its version, as it tells."""
    model: str
    """The model that it serves, as it tells."""
    dtype: str | None
    """Dtype of computation and cache, as told; null if unknown."""
    vocabulary: int
    """Number of token ids, no unit."""
    context: int
    """The most tokens of prompt and answer together."""
    block: int | None
    """How many tokens are in a block of the prefix cache; null if it does not tell."""
    cache_tokens: int | None
    """Tokens that the cache holds; null if it does not tell."""
    cache_off: str
    """How an answer without the prefix cache is had: `request`, `salt`, `second engine` or `none`."""
    reports_hits: bool
    """Whether an answer says how many tokens came from the cache."""
    alternatives: int
    """How many log-probabilities a generated token comes with, no unit."""
    abilities: list[str]
    """What it can do that not every engine can."""
    assumed: list[str] = []
    """What was assumed about it, one sentence each."""
    requests: int = 0
    """Number of requests that were sent, no unit."""
    hits: int = 0
    """Number of answers that read tokens from the cache, as the engine reported."""
    preemptions: int = 0
    """Number of requests that were preempted, as the engine reported."""
    void: int = 0
    """Number of answers that should not have read the cache and did."""
    noise: float = 0.0
    """The largest difference of a log-probability between decode and prefill, without the cache; no unit."""
    floor: float = 0.0
    """What two correct roundings in the dtype may differ by; no unit."""
    repeat: float = 0.0
    """The largest difference between two answers to one request, without the cache; no unit."""
    effect: float = 0.0
    """The smallest effect of one changed token of the prompt, of those that can be told from noise; no unit."""
    changes: int = 0
    """Number of changed tokens that were tried."""
    seen: int = 0
    """How many of them can be told from noise."""
    bound: float | None = None
    """The largest difference of a log-probability that is no error, no unit; null if a wrong token cannot be told from
    rounding."""
    lengths: tuple[int, ...] = ()
    """Lengths of the prompts on which this was measured, in tokens."""
    reference: str = ""
    """Address of the weights that the engine serves, by which it was judged as well; empty: none was given."""
    reference_bound: float | None = None
    """The largest difference of a log-probability from that of these weights that is no error, of one prompt, no unit;
    null without them."""
    reference_effect: float | None = None
    """The smallest effect of one changed token of the prompt on their log-probabilities, no unit; null without them."""
    seconds_to_first: list[FirstToken] = []
    """Times to the first token, cold and warm; empty unless the engine conforms and was timed."""


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """The time to the first token of prompts of one length."""

    length: int
    """Tokens of the prompt."""
    cached: int
    """Tokens that were read from the cache, of the warm ones, as reported."""
    cold: float
    """Median time without the cache, in seconds."""
    warm: float
    """Median time with the prompt cached, in seconds."""
    ratio: float
    """Median of the ratios cold to warm, by pairs; no unit."""
    low: float
    """Lower end of the 95 % interval of that median, no unit."""
    high: float
    """Its upper end, no unit."""
    pairs: int
    """Number of pairs that were timed."""
