"""A sequence's context (an adapter, an image, encoder states) decides what its tokens mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation, ordinary
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Close, Fork, Generate, Reset, Step, UncachedForward
from kvconform_specs.strategies import Draw, appends, batches, counts, fitted, seeds, splits

BUG = "https://github.com/ggml-org/llama.cpp/issues/26207"


def several(config: Config) -> bool:
    """Whether an ordinary config has several contexts."""
    return ordinary(config) and config.contexts > 1


def _two(draw: Draw, config: Config) -> tuple[int, int]:
    """Two different contexts."""
    first = draw(st.integers(0, config.contexts - 1))
    return first, (first + draw(st.integers(1, config.contexts - 1))) % config.contexts


def _in(context: int, steps: Sequence[Append]) -> list[Step]:
    return [Append(step.seq, step.counts, step.seed, context=context) for step in steps]


@st.composite
def _same_tokens(draw: Draw, config: Config, claims: Claims) -> Case:
    """The same tokens in two contexts and again in the first: in sequences behind one another, in turn, in one that is
    reset, or behind a fork; then both go on."""
    sizes: tuple[int, ...] = draw(splits(config, claims, most=3, capacity=config.capacity - 1))
    batch, seed, (first, second) = draw(batches(claims)), draw(seeds), _two(draw, config)
    ways = ["closed"] + ["reset"] * claims.can("reset")
    if claims.can("two sequences"):
        ways += ["in turn"] + ["fork"] * claims.can("fork")
    way = draw(st.sampled_from(ways))
    a, b = _in(first, appends("a", sizes, batch, seed)), _in(second, appends("b", sizes, batch, seed))
    more = Append("", (1,) * batch, seed + 77)
    if way == "in turn":
        steps = [step for pair in zip(a, b, strict=True) for step in pair]
        steps += [*_more("a", first, more), *_more("b", second, more)]
    elif way == "fork":
        steps = [*a, Fork("a", "f"), Close("a"), *b, *_more("f", first, more), *_more("b", second, more)]
    elif way == "reset":
        again = _in(second, appends("a", sizes, batch, seed))
        steps = [*a, Reset("a"), *again, *_more("a", second, more), Reset("a"), *a]
    else:
        steps = [*a, Close("a"), *b, *_more("b", second, more), Close("b"), *a, *_more("a", first, more)]
    return Case((clipped(config, steps),))


def _more(seq: str, context: int, like: Append) -> list[Step]:
    return _in(context, [Append(seq, like.counts, like.seed)])


@st.composite
def _kept(draw: Draw, config: Config, claims: Claims) -> Case:
    """Sequences of other tokens, each in its context, that grow in turn; forwards without a cache in between."""
    batch, seed, (first, second) = draw(batches(claims)), draw(seeds), _two(draw, config)
    a: list[Step] = _in(first, appends("a", draw(splits(config, claims, least=2, most=4)), batch, seed))
    b: list[Step] = _in(second, appends("b", draw(splits(config, claims, least=2, most=4)), batch, seed + 77))
    if not claims.can("two sequences"):
        b = []
        if claims.can("uncached_forward"):
            b = [UncachedForward("u", (draw(counts(claims)),) * batch, seed + 77, context=second)] * len(a)
    elif claims.can("uncached_forward") and draw(st.booleans()):
        b.insert(1, UncachedForward("u", (draw(counts(claims)),) * batch, seed + 99, context=first))
    steps = [step for pair in zip_longest(a, b) for step in pair if step is not None]
    return Case((clipped(config, steps),))


@st.composite
def _generated(draw: Draw, config: Config, claims: Claims) -> Case:
    """Generations after the same prompts in two contexts, and again in the first."""
    batch, seed, (first, second) = draw(batches(claims)), draw(seeds), _two(draw, config)
    prompt = fitted((draw(counts(claims)),), config.capacity - 1)
    new = draw(st.integers(1, 4))
    steps = [
        Generate(f"g{number}", prompt * batch, seed, context=context, new=new)
        for number, context in enumerate((first, second, first))
        if prompt
    ]
    return Case((clipped(config, steps or appends("a", (1,), batch, seed)),))


# --- situations ---
def _context(step: Step) -> int | None:
    return step.context if isinstance(step, Append | UncachedForward) else None


def _again(
    words: str, between: Callable[[reach.Visit], bool], possible: reach.Possible = reach.always
) -> reach.Situation:
    """An append of tokens that were appended in another context before."""

    def found(visit: reach.Visit) -> bool:
        step = visit.step
        return (
            isinstance(step, Append)
            and between(visit)
            and any(
                isinstance(made, Append) and made.seed == step.seed and made.context != step.context
                for made in visit.earlier
            )
        )

    return reach.append(f"the same tokens in another context {words}", found, possible)


def _behind(kind: type[Step]) -> Callable[[reach.Visit], bool]:
    return lambda visit: any(isinstance(made, kind) for made in visit.earlier)


def _other_open(visit: reach.Visit) -> bool:
    names = {made.seq for made in visit.earlier if isinstance(made, Append)}
    closed = {made.seq for made in visit.earlier if isinstance(made, Close)}
    return bool(names - closed - {getattr(visit.step, "seq", "")})


def _switched(visit: reach.Visit) -> bool:
    return visit.past > 0 and _context(visit.earlier[-1]) not in (None, _context(visit.step))


def _can_switch(config: Config, claims: Claims) -> bool:
    return config.capacity > 1 and (claims.can("two sequences") or claims.can("uncached_forward"))


def _decodes(visit: reach.Visit) -> bool:
    return visit.new == 1 and visit.past > 0 and bool(_context(visit.step))


def _elsewhere(visit: reach.Visit) -> bool:
    return isinstance(visit.step, Generate) and visit.step.context > 0


CLAUSES = (
    Clause(
        name="context.partition",
        text="Sequences with the same tokens in different contexts share nothing: what was computed in one context, "
        "for a sequence that is open, closed, forked or reset, is not used in another one.",
        why=(
            BUG,
            "https://github.com/vllm-project/vllm/issues/44250",
            "https://github.com/vllm-project/vllm/issues/30931",
            "https://github.com/LMCache/LMCache/issues/2961",
        ),
        strategy=_same_tokens,
        relations=(Relation.PARITY,),
        profiles=("decoder",),
        needs=("contexts",),
        applies=several,
        situations=(
            _again("behind a closed sequence", _behind(Close)),
            _again("while a sequence is open", _other_open, reach.claimed("two sequences")),
            _again("behind a reset", _behind(Reset), reach.claimed("reset")),
            _again("behind a fork", _behind(Fork), reach.claimed("fork", "two sequences")),
            reach.append("a decode step in a context other than 0", _decodes, reach.holds(2)),
        ),
    ),
    Clause(
        name="context.kept",
        text="Each step uses the context of its own sequence, prompt and decode steps alike, whatever the context of "
        "the call before it was.",
        why=("https://github.com/vllm-project/vllm/issues/48974", "https://github.com/ooples/AiDotNet/pull/1888"),
        strategy=_kept,
        relations=(Relation.PARITY,),
        profiles=("decoder",),
        needs=("contexts",),
        applies=several,
        situations=(
            reach.append("a decode step in a context other than 0", _decodes, reach.holds(2)),
            reach.append("a step on a cache behind a call in another context", _switched, _can_switch),
        ),
    ),
    Clause(
        name="context.generation",
        text="A generation uses the context that it was asked for, in every step.",
        why=(BUG, "https://github.com/vllm-project/vllm/issues/3264"),
        strategy=_generated,
        relations=(Relation.GENERATED,),
        profiles=("decoder",),
        needs=("contexts", "generate"),
        applies=several,
        share=0.5,
        situations=(reach.step("a generation in a context other than 0", _elsewhere, reach.holds(2)),),
    ),
)
