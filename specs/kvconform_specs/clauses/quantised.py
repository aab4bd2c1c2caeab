"""The error of a quantised cache is that of its quantiser: for integers at most half a step of their own scale."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import ReadCache, Step
from kvconform_specs.strategies import Draw, appends, at_once, batches, fitted, seeds, splits, steadily


def _case(config: Config, claims: Claims, steps: tuple[Step, ...]) -> Case:
    return Case((clipped(config, (*steps, ReadCache("a")) if claims.can("contents") else steps),))


@st.composite
def _prompt(draw: Draw, config: Config, claims: Claims) -> Case:
    size = draw(st.integers(1, config.capacity))
    return _case(config, claims, appends("a", (*at_once(size, claims), 1), draw(batches(claims)), draw(seeds)))


@st.composite
def _steps(draw: Draw, config: Config, claims: Claims) -> Case:
    sizes = (*at_once(draw(st.integers(0, 4)), claims), *(1,) * draw(st.integers(1, 24)))
    return _case(config, claims, appends("a", fitted(sizes, config.capacity), draw(batches(claims)), draw(seeds)))


def _lopsided(config: Config, claims: Claims) -> SearchStrategy[Case]:
    def made(drawn: tuple[tuple[int, ...], int, int]) -> Case:
        sizes, batch, seed = drawn
        steps = appends("a", sizes, batch, seed)
        return _case(config, claims, tuple(replace(step, distribution="small_keys_large_values") for step in steps))

    return st.tuples(splits(config, claims), batches(claims), seeds).map(made)


@st.composite
def _newest(draw: Draw, config: Config, claims: Claims) -> Case:
    """Lengths around the residual window and its multiples, reached by chunks or by decode steps."""
    r = _period(claims)
    first = max(r * draw(st.integers(1, 3)) + draw(st.integers(-1, 1)), 1)
    more = (1,) * draw(st.integers(0, r + 1)) if draw(st.booleans()) else at_once(draw(st.integers(1, 2 * r)), claims)
    sizes = fitted((*at_once(first, claims), *more), config.capacity)
    return _case(config, claims, appends("a", sizes, draw(batches(claims)), draw(seeds)))


def _stored(config: Config, claims: Claims) -> SearchStrategy[Case]:
    """Decode steps, a prompt, or small appends up to the capacity."""

    def made(drawn: tuple[tuple[int, ...], int, int]) -> Case:
        sizes, batch, seed = drawn
        return _case(config, claims, appends("a", sizes, batch, seed))

    return _steps(config, claims) | st.tuples(steadily(config, claims), batches(claims), seeds).map(made)


def _period(claims: Claims) -> int:
    """The number of tokens after which some are quantised: the residual window, and a group of tokens."""
    return claims.residual + (claims.quantiser.group or 0 if claims.quantiser.by_channel else 0)


def _beyond(windows: int) -> reach.Situation:
    def possible(config: Config, claims: Claims) -> bool:
        return config.capacity > windows * _period(claims)

    words = "more tokens than the residual window" if windows == 1 else f"more tokens than {windows} residual windows"
    return reach.append(words, lambda visit: visit.longest > windows * _period(visit.claims), possible)


ATTENTION = ("attention",)
CLAUSES = (
    Clause(
        name="quantised.prefill",
        text="A prompt's outputs are within the bound that follows from the steps of its tokens' own scales.",
        why=(
            "https://github.com/flashinfer-ai/flashinfer/issues/1023",
            "https://github.com/ggml-org/llama.cpp/issues/5652",
        ),
        strategy=_prompt,
        relations=(Relation.PARITY, Relation.CONTENTS),
        profiles=ATTENTION,
        needs=("quantised cache",),
        situations=(reach.PROMPT, reach.DECODE),
    ),
    Clause(
        name="quantised.decode",
        text="Decode steps are within the same bound: errors do not accumulate, and old scales are not applied to new "
        "tokens.",
        why=(
            "https://github.com/sgl-project/sglang/pull/34765",
            "https://github.com/rajveer43/VeloxQuant-MLX/issues/86",
        ),
        strategy=_steps,
        relations=(Relation.PARITY, Relation.CONTENTS),
        profiles=ATTENTION,
        needs=("quantised cache",),
        situations=(reach.DECODE,),
    ),
    Clause(
        name="quantised.scales",
        text="Keys and values have separate scales; a stored integer times its scale is the number.",
        why=(
            "https://github.com/flashinfer-ai/flashinfer/issues/1023",
            "https://github.com/vllm-project/vllm-xpu-kernels/pull/475",
            "https://github.com/sgl-project/sglang/pull/26852",
        ),
        strategy=_lopsided,
        relations=(Relation.PARITY,),
        profiles=ATTENTION,
        needs=("quantised cache",),
        situations=(reach.distributed("small_keys_large_values"), reach.DECODE),
    ),
    Clause(
        name="quantised.stored",
        text="A token beyond the residual window is stored in the claimed bits, however it was appended: what is read "
        "are integers times the step of their group.",
        why=("https://github.com/rajveer43/VeloxQuant-MLX/issues/86",),
        strategy=_stored,
        relations=(Relation.QUANTISED,),
        profiles=ATTENTION,
        needs=("multiples of scales", "contents"),
        situations=(_beyond(1), reach.DECODE, reach.READ),
    ),
    Clause(
        name="quantised.residual",
        text="The newest tokens are exact, as many as claimed and those of a group of tokens that is not full, and no "
        "token is lost or counted twice when it is quantised.",
        why=(
            "https://github.com/rajveer43/VeloxQuant-MLX/issues/86",
            "https://github.com/rajveer43/VeloxQuant-MLX/pull/89",
            "https://github.com/huggingface/transformers/issues/35185",
        ),
        strategy=_newest,
        relations=(Relation.PARITY, Relation.CONTENTS),
        profiles=ATTENTION,
        needs=("residual window",),
        situations=(_beyond(1), _beyond(2)),
    ),
)
