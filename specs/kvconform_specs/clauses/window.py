"""With a window of W a token attends to itself and the W - 1 tokens before it, by position, however they are stored."""

from __future__ import annotations

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.any_history import histories
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation, ordinary
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.strategies import Draw, appends, at_once, batches, fitted, landing, seeds, splits, swapped


def _windowed(config: Config) -> bool:
    return ordinary(config) and config.window is not None


def _hybrid(config: Config) -> bool:
    return _windowed(config) and config.window_every > 1


@st.composite
def _edge(draw: Draw, config: Config, claims: Claims) -> Case:
    """A sequence longer than the window, with the newest token that a query cannot see, or the oldest that it can,
    changed."""
    w = config.window or 1
    drawn: tuple[int, ...] = draw(splits(config, claims, capacity=3 * w))
    sizes = landing(list(drawn), w + 1 + draw(st.integers(0, w)), claims)
    seed, ends = draw(seeds), fitted(sizes, config.capacity)
    base = clipped(config, appends("a", ends, 1, seed))
    places = {place for place in (sum(ends) - w - 1, sum(ends) - w) if place >= 0}
    return Case((base, *(swapped(base, "a", 0, place, seed + 1_000_003) for place in sorted(places))))


@st.composite
def _by_one(draw: Draw, config: Config, claims: Claims) -> Case:
    """A prompt that does not fill the window, then decode steps over W - 1, W, W + 1 and 2 W."""
    w = config.window or 1
    prompt = draw(st.integers(0, w - 1))
    sizes = (*at_once(prompt, claims), *(1,) * (2 * w + 1 - prompt))
    return Case((clipped(config, appends("a", sizes, draw(batches(claims)), draw(seeds))),))


@st.composite
def _chunk(draw: Draw, config: Config, claims: Claims) -> Case:
    """A chunk of more tokens than the window, on a cache that holds some tokens, then decode steps."""
    w = config.window or 1
    past, chunk, new = draw(st.integers(0, 2 * w)), draw(st.integers(w, 3 * w)), draw(st.integers(0, 3))
    sizes = (*at_once(past, claims), *at_once(chunk, claims), *(1,) * new)
    steps = appends("a", fitted(sizes, config.capacity), draw(batches(claims)), draw(seeds))
    return Case((clipped(config, steps),))


@st.composite
def _layers(draw: Draw, config: Config, claims: Claims) -> Case:
    """More tokens than the window, by prompts, chunks and decode steps, or any history."""
    if draw(st.booleans()):
        return Case((draw(histories(config, claims)),))
    drawn: tuple[int, ...] = draw(splits(config, claims))
    sizes = landing(list(drawn), (config.window or 1) * draw(st.integers(2, 4)), claims)
    steps = appends("a", fitted(sizes, config.capacity), draw(batches(claims)), draw(seeds))
    return Case((clipped(config, steps),))


def _around(more: int) -> reach.Situation:
    def possible(config: Config, claims: Claims) -> bool:
        return config.window is not None and 1 <= config.window + more <= config.capacity

    words = f"a sequence of W{more:+d} tokens" if more else "a sequence of W tokens"
    return reach.append(words, lambda v: v.longest == (v.config.window or 0) + more, possible)


def _twice(config: Config, claims: Claims) -> bool:
    return config.window is not None and 2 * config.window <= config.capacity


def _long_chunk(visit: reach.Visit) -> bool:
    return visit.past > 0 and visit.new > (visit.config.window or 0)


def _takes_long_chunks(config: Config, claims: Claims) -> bool:
    w = config.window or 1
    return claims.longest(config.capacity - 1) > w


CLAUSES = (
    Clause(
        name="window.width",
        text="A query attends to exactly W tokens, its own included, once there are that many: not to the one W "
        "positions back, but to the one after it.",
        why=(
            "https://github.com/microsoft/onnxruntime/pull/25927",
            "https://github.com/huggingface/transformers/issues/29623",
            "https://github.com/huggingface/transformers/issues/39408",
        ),
        strategy=_edge,
        relations=(Relation.PARITY, Relation.INSENSITIVE, Relation.SENSITIVE),
        applies=_windowed,
        situations=(reach.PAST_WINDOW,),
    ),
    Clause(
        name="window.step-by-step",
        text="The outputs are those of the definition when a window fills, overflows or wraps: decoding over W - 1, W, "
        "W + 1 and 2 W tokens.",
        why=(
            "https://github.com/huggingface/transformers/issues/37574",
            "https://github.com/EricLBuehler/mistral.rs/issues/246",
        ),
        strategy=_by_one,
        relations=(Relation.PARITY,),
        applies=_windowed,
        situations=(
            reach.PAST_WINDOW,
            _around(-1),
            _around(0),
            _around(1),
            reach.append("a sequence of 2 W tokens", lambda v: v.longest == 2 * (v.config.window or 0), _twice),
        ),
    ),
    Clause(
        name="window.long-chunk",
        text="A chunk may be longer than the window: its first queries still attend to the cached tokens in their "
        "window, before anything is evicted.",
        why=("https://github.com/Lightning-AI/litgpt/issues/2182", "https://github.com/pytorch/executorch/pull/22358"),
        strategy=_chunk,
        relations=(Relation.PARITY,),
        applies=_windowed,
        situations=(reach.append("a chunk longer than the window, on a cache", _long_chunk, _takes_long_chunks),),
    ),
    Clause(
        name="window.hybrid",
        text="Where some layers have a window and others do not, each layer uses its own: length, mask and capacity of "
        "one kind are not those of the other.",
        why=(
            "https://github.com/huggingface/transformers/pull/38156",
            "https://github.com/huggingface/transformers/pull/39737",
            "https://github.com/huggingface/transformers/pull/31786",
        ),
        strategy=_layers,
        relations=(Relation.PARITY, Relation.LENGTHS),
        applies=_hybrid,
        situations=(reach.PAST_WINDOW, reach.DECODE),
    ),
)
