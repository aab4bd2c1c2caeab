"""Hypothesis strategies of programs of requests: lengths around the boundaries of blocks, prompts that share prefixes.

A strategy draws within ``Sizes``, what is known of the engine. Each program says in ``about`` which situation it is
drawn for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from msgspec.structs import replace

from kvconform_specs.serving.program import Ask, Own, Program, Reset, Span, Together
from kvconform_specs.strategies import Draw, seeds


@dataclass(frozen=True, slots=True)
class Sizes:
    """What programs are drawn for.

    block: tokens of a block of the prefix cache. context: the most tokens of prompt and answer. together: the most
    requests at the same time. adapters: how many the engine has. cache_tokens: how many tokens the cache holds, None if
    that is unknown. abilities: of the engine.
    """

    block: int
    context: int
    together: int = 4
    adapters: int = 0
    cache_tokens: int | None = None
    abilities: frozenset[str] = frozenset()

    @property
    def longest(self) -> int:
        """The most tokens of a prompt: three blocks and some, and room for an answer."""
        return max(min(4 * self.block, self.context // 2), 2)

    @property
    def edges(self) -> tuple[int, ...]:
        """Lengths at the boundaries of blocks and next to them."""
        near = {count * self.block + by for count in (1, 2, 3) for by in (-1, 0, 1)}
        return tuple(sorted(length for length in near if 0 < length < self.longest))

    @property
    def fillers(self) -> int | None:
        """How many of the longest prompts fill the cache; None if that is unknown or more than a program sends."""
        count = None if self.cache_tokens is None else self.cache_tokens // self.longest + 1
        return count if count is not None and count <= MOST_FILLERS else None


MOST_FILLERS = 16
ANSWER = 4
"""How many tokens an ordinary request generates."""
Make = Callable[[Sizes], SearchStrategy[Program]]


def alone(*pieces: Span | Own, tokens: int = ANSWER, salt: int | None = None, adapter: int | None = None) -> Together:
    """One request by itself."""
    return Together(asks=(Ask(prompt=pieces, tokens=tokens, salt=salt, adapter=adapter),))


def lengths(sizes: Sizes) -> SearchStrategy[int]:
    """Of prompts; every other one at a boundary or next to it."""
    return st.sampled_from(sizes.edges) | st.integers(1, sizes.longest)


def blocks(sizes: Sizes) -> SearchStrategy[int]:
    """Lengths of at least one block and a token, so that a later request with that prefix hits."""
    longest = max(sizes.longest, sizes.block + 1)
    return st.sampled_from([edge for edge in sizes.edges if edge > sizes.block] or [longest]) | st.integers(
        sizes.block + 1, longest
    )


@st.composite
def repeats(draw: Draw, sizes: Sizes) -> Program:
    """A prompt, then the same one, a longer one or a shorter one, several times."""
    seed, length = draw(seeds), draw(blocks(sizes))
    steps = [alone(Span(seed=seed, stop=length))]
    ways = draw(st.lists(st.sampled_from(("repeated", "longer", "shorter")), min_size=1, max_size=3))
    for way in ways:
        longer, shorter = length + draw(st.integers(1, sizes.block + 1)), draw(st.integers(1, length))
        other: int = {"repeated": length, "longer": longer, "shorter": shorter}[way]
        steps.append(alone(Span(seed=seed, stop=min(other, sizes.longest + sizes.block))))
    return Program(steps=tuple(steps), about=f"a {ways[0]} prompt")


@st.composite
def scored_repeats(draw: Draw, sizes: Sizes) -> Program:
    """The same, with the first prompt scored where the engine can."""
    program: Program = draw(repeats(sizes))
    first = program.steps[0]
    assert isinstance(first, Together)
    scored = Together(asks=(replace(first.asks[0], score="score" in sizes.abilities),))
    scored_first: Program = replace(program, steps=(scored, *program.steps[1:]))
    return scored_first


@st.composite
def boundaries(draw: Draw, sizes: Sizes) -> Program:
    """Two prompts with a common prefix that ends at a boundary or next to it, then the prefix alone."""
    seed, shared = draw(seeds), draw(st.sampled_from(sizes.edges))
    tails = draw(st.lists(st.sampled_from((0, 1, sizes.block - 1, sizes.block)), min_size=2, max_size=2))
    steps = [
        alone(Span(seed=seed, stop=shared), *([Span(seed=seed + 1 + i, stop=tail)] if tail else []))
        for i, tail in enumerate(tails)
    ]
    place = {0: "at", 1: "behind", sizes.block - 1: "before"}.get(shared % sizes.block, "next to")
    return Program(
        steps=(*steps, alone(Span(seed=seed, stop=shared))), about=f"a prefix that ends {place} a block's end"
    )


DIVERGENCES = (
    "the first token of a block changed",
    "the last token of a block changed",
    "a token inside a block changed",
    "two tokens of a block swapped",
    "two blocks swapped",
    "a block repeated",
    "another prefix before equal blocks",
)


@st.composite
def divergences(draw: Draw, sizes: Sizes) -> Program:
    """Two prompts that differ in a place where a wrong key does not see it."""
    b, seed = sizes.block, draw(seeds)
    about, block = draw(st.sampled_from(DIVERGENCES)), draw(st.integers(0, 1))
    tail = Span(seed=seed + 1, stop=draw(st.integers(1, 3)))
    whole = Span(seed=seed, stop=2 * b)
    pieces: tuple[Span, ...]
    if "changed" in about:
        inside = draw(st.integers(1, max(b - 2, 1)))
        at = block * b + {"first": 0, "last": b - 1}.get(about.split()[1], inside)
        pieces = (*span(seed, 0, at), Span(seed=seed, start=at, stop=at + 1, add=1), *span(seed, at + 1, 2 * b))
    elif about == "two tokens of a block swapped":
        at = block * b + draw(st.integers(0, max(b - 2, 0)))
        swapped = (Span(seed=seed, start=at + 1, stop=at + 2), Span(seed=seed, start=at, stop=at + 1))
        pieces = (*span(seed, 0, at), *swapped, *span(seed, at + 2, 2 * b))
    elif about == "two blocks swapped":
        pieces = (Span(seed=seed, start=b, stop=2 * b), Span(seed=seed, stop=b))
    elif about == "a block repeated":
        pieces = (Span(seed=seed, stop=b), Span(seed=seed, stop=b), Span(seed=seed, start=b, stop=2 * b))
    else:
        pieces = (Span(seed=seed + 2, stop=b), Span(seed=seed, start=b, stop=2 * b))
    # a chain of keys is followed from its first block on, so that the second block must be known as a first one
    between = (alone(pieces[0], tail),) if about == "two blocks swapped" else ()
    return Program(steps=(alone(whole, tail), *between, alone(*pieces, tail), alone(whole, tail)), about=about)


def span(seed: int, start: int, stop: int) -> tuple[Span, ...]:
    """The piece, or nothing where it is empty."""
    return (Span(seed=seed, start=start, stop=stop),) if stop > start else ()


@st.composite
def turns(draw: Draw, sizes: Sizes) -> Program:
    """A conversation: each prompt is the one before, its answer, and new tokens."""
    seed, length = draw(seeds), draw(lengths(sizes))
    fills = draw(st.sampled_from((True, True, False)))  # whether the answer ends with a full block or next to one
    answer = (-length) % sizes.block + draw(st.integers(0, 2)) if fills else draw(st.integers(1, ANSWER))
    answer = max(answer, 1)
    history: tuple[Span | Own, ...] = (Span(seed=seed, stop=length),)
    steps, total = [], length
    for turn in range(draw(st.integers(2, 3))):
        steps.append(alone(*history, tokens=answer))
        new = draw(st.integers(1, 3))
        if total + 2 * answer + new > sizes.context:
            break
        history = (*history, Own(step=turn, stop=answer), Span(seed=seed + 1 + turn, stop=new))
        total += answer + new
    about = "an answer that fills its block" if fills else "an answer inside a block"
    return Program(steps=tuple(steps), about=about)


@st.composite
def orders(draw: Draw, sizes: Sizes) -> Program:
    """Prompts with common prefixes in one order, then in another."""
    seed = draw(seeds)
    ends = draw(st.lists(lengths(sizes), min_size=2, max_size=3, unique=True))
    prompts: list[tuple[Span, ...]] = [(Span(seed=seed, stop=end),) for end in ends]
    prompts.append((Span(seed=seed, stop=max(ends)), Span(seed=seed + 1, stop=2)))
    again = draw(st.permutations(prompts))
    return Program(steps=tuple(alone(*one) for one in (*prompts, *again)), about="the same prompts in another order")


@st.composite
def groups(draw: Draw, sizes: Sizes) -> Program:
    """Requests beside one another, with and without common prefixes, then again, some of them."""
    seed, shared = draw(seeds), draw(lengths(sizes))
    count = draw(st.integers(2, max(sizes.together, 2)))
    together = draw(st.booleans())
    asks = []
    for number in range(count):
        tail = span(seed + 1 + number, 0, draw(st.integers(1, sizes.block + 1)))
        head = span(seed, 0, shared if together else draw(st.integers(0, shared)))
        asks.append(Ask(prompt=(*head, *tail), tokens=draw(st.integers(1, ANSWER + 2))))
    about = "equal prefixes beside one another" if together else "different prefixes beside one another"
    again = draw(st.permutations(asks))[: draw(st.integers(1, count))]
    return Program(steps=(Together(asks=tuple(asks)), Together(asks=tuple(again))), about=about)


def neighbours_without_cache(sizes: Sizes) -> SearchStrategy[Program]:
    """The same, none of them from the cache."""
    return groups(sizes).map(uncached)


def uncached(program: Program) -> Program:
    steps = tuple(
        Together(asks=tuple(replace(ask, cached=False) for ask in step.asks)) if isinstance(step, Together) else step
        for step in program.steps
    )
    return replace(program, steps=steps)


@st.composite
def aborts(draw: Draw, sizes: Sizes) -> Program:
    """A request whose client leaves, alone or beside another with its prefix; then others, then the same prefix."""
    seed, length = draw(seeds), draw(blocks(sizes))
    beside = draw(st.booleans())
    left = Ask(prompt=(Span(seed=seed, stop=length),), tokens=2 * sizes.block, abort_after=draw(st.integers(1, 3)))
    other = Ask(
        prompt=(Span(seed=seed, stop=length), Span(seed=seed + 1, stop=draw(st.integers(1, 3)))),
        tokens=draw(st.integers(1, 2 * sizes.block)),
    )
    third = Ask(prompt=(Span(seed=seed + 2, stop=sizes.longest),))  # needs blocks when those of the first are free
    steps = [alone(Span(seed=seed, stop=length))] if draw(st.booleans()) else []
    steps.append(Together(asks=(left, other, third)[: sizes.together] if beside else (left,)))
    steps += [alone(Span(seed=seed + 3 + i, stop=sizes.longest)) for i in range(draw(st.integers(0, 3)))]
    steps.append(alone(Span(seed=seed, stop=length)))
    return Program(steps=tuple(steps), about="a client that leaves " + ("beside another" if beside else "alone"))


FULL, EMPTIED = "prompts that fill the cache between two equal ones", "a reset between two equal prompts"


@st.composite
def evictions(draw: Draw, sizes: Sizes) -> Program:
    """A prompt, then what evicts it, then the same prompt."""
    seed, length = draw(seeds), draw(blocks(sizes))
    ways = [FULL] * (sizes.fillers is not None) + [EMPTIED] * ("reset" in sizes.abilities)
    about = draw(st.sampled_from(ways))
    first = alone(Span(seed=seed, stop=length))
    if about == EMPTIED:
        others = [alone(Span(seed=seed + 1, stop=draw(lengths(sizes))))] if draw(st.booleans()) else []
        return Program(steps=(first, Reset(), *others, first, first), about=about)
    count = (sizes.fillers or 1) + draw(st.integers(-1, 1))
    others = [alone(Span(seed=seed + 1 + i, stop=sizes.longest)) for i in range(max(count, 1))]
    beside = Together(
        asks=(
            Ask(prompt=(Span(seed=seed, stop=length),), tokens=2 * sizes.block),
            Ask(prompt=(Span(seed=seed + 40, stop=sizes.longest),), tokens=ANSWER),
        )
    )
    return Program(steps=(first, *others, beside, first), about=about)


@st.composite
def pressures(draw: Draw, sizes: Sizes) -> Program:
    """More requests beside one another than the cache has room for."""
    seed = draw(seeds)
    longest = draw(st.integers(sizes.block, sizes.longest))  # of short prompts the answers fill the cache
    answer = min(draw(st.integers(2, 4)) * sizes.block, sizes.context - longest)
    need = (sizes.cache_tokens or 0) // (longest + answer) + 1 + draw(st.integers(0, 1))
    shared = draw(st.integers(0, longest - 4))
    asks = []
    for number in range(max(need, 2)):
        own = longest - shared - draw(st.integers(0, 3))
        asks.append(Ask(prompt=(*span(seed, 0, shared), Span(seed=seed + 1 + number, stop=own)), tokens=answer))
    again = alone(*asks[-1].prompt)
    return Program(steps=(Together(asks=tuple(asks)), again), about="more requests than fit")


SALTED, ADAPTED, ALIKE = "a salt", "an adapter", "a salt that is the name of an adapter"


@st.composite
def partitions(draw: Draw, sizes: Sizes) -> Program:
    """One prompt under several salts or adapters, and under none."""
    seed, length = draw(seeds), draw(blocks(sizes))
    salts, adapters = "salt" in sizes.abilities, sizes.adapters > 0
    ways = [SALTED] * salts + [ADAPTED] * adapters + [ALIKE] * (salts and adapters)
    about, prompt = draw(st.sampled_from(ways)), Span(seed=seed, stop=length)
    if about == ALIKE:
        both = draw(st.permutations((alone(prompt, salt=-1), alone(prompt, adapter=0))))
        return Program(steps=tuple(both), about=about)
    names: list[int | None] = [None, 0, *([1] if about == SALTED or sizes.adapters > 1 else [])]
    first = draw(st.permutations(names))
    steps = [
        alone(prompt, salt=name) if about == SALTED else alone(prompt, adapter=name)
        for name in (*first, draw(st.sampled_from(names)))
    ]
    return Program(steps=tuple(steps), about=about)


@st.composite
def forks(draw: Draw, sizes: Sizes) -> Program:
    """Several completions of one prompt, then one of them continued."""
    seed, length = draw(seeds), draw(lengths(sizes))
    tokens = draw(st.integers(2, sizes.block + 2))
    before = [alone(Span(seed=seed, stop=length))] if draw(st.booleans()) else []
    ask = Ask(prompt=(Span(seed=seed, stop=length),), tokens=tokens, n=draw(st.integers(2, 3)))
    turn = alone(
        Span(seed=seed, stop=length), Own(step=len(before), stop=tokens), Span(seed=seed + 1, stop=2), tokens=2
    )
    return Program(steps=(*before, Together(asks=(ask,)), turn), about="several completions of one prompt")


@st.composite
def scorings(draw: Draw, sizes: Sizes) -> Program:
    """Prompts that are scored once their prefix is cached, after others were."""
    seed, length = draw(seeds), draw(blocks(sizes))

    def scored(*pieces: Span) -> Together:
        return Together(asks=(Ask(prompt=pieces, tokens=1, score=True),))

    other = scored(Span(seed=seed + 1, stop=draw(lengths(sizes))))
    prompt = (Span(seed=seed, stop=length), *span(seed + 2, 0, draw(st.integers(0, 3))))
    steps = [alone(Span(seed=seed, stop=length)), other, scored(*prompt)]
    skipped = draw(st.integers(0, 1))
    return Program(steps=(*steps[skipped:], scored(*prompt)), about="a scored prompt")


CROWD = "as many requests beside one another as the limit allows"


@st.composite
def crowds(draw: Draw, sizes: Sizes) -> Program:
    """As many long requests as may be sent at the same time."""
    seed, tokens = draw(seeds), draw(st.integers(1, 2 * sizes.block))
    asks = [
        Ask(prompt=(Span(seed=seed + number, stop=sizes.longest),), tokens=tokens) for number in range(sizes.together)
    ]
    return Program(steps=(Together(asks=tuple(asks)),), about=CROWD)


def trials(sizes: Sizes) -> SearchStrategy[Program]:
    """Requests that must be refused, and groups of which none must be."""
    return refusals(sizes) | crowds(sizes) if sizes.together > 1 else refusals(sizes)


REFUSED, BESIDE = "a request beyond the context", "a request beyond the context beside others"


@st.composite
def refusals(draw: Draw, sizes: Sizes) -> Program:
    """A request that must be refused, alone or beside others, between two that hold the same prefix."""
    seed, length = draw(seeds), draw(blocks(sizes))
    prompt = (Span(seed=seed, stop=length),)
    wrong, right = Ask(prompt=prompt, too_long=True), Ask(prompt=prompt)
    about = draw(st.sampled_from((REFUSED, BESIDE))) if sizes.together > 1 else REFUSED
    middle = Together(asks=(wrong, right) if about == BESIDE else (wrong,))
    before = [alone(*prompt)] if draw(st.booleans()) else []
    others = [alone(Span(seed=seed + 2 + i, stop=sizes.longest)) for i in range(draw(st.integers(0, 3)))]
    return Program(steps=(*before, middle, *others, alone(*prompt)), about=about)


@st.composite
def mixtures(draw: Draw, sizes: Sizes) -> Program:
    """Repeats, turns or neighbours: what fills the counts of an answer."""
    kinds: list[Make] = [repeats, turns, boundaries, *([groups] if sizes.together > 1 else [])]
    program: Program = draw(draw(st.sampled_from(kinds))(sizes))
    return program
