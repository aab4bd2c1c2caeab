"""Strategies of truncations that follow one another or remove nothing, and of rows that go back by different numbers
of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Marks, Program, Reject, Reorder, Step, Truncate
from kvconform_specs.strategies import LARGEST_BATCH, Draw, appends, at_once, batches, counts, pieces, seeds

OTHER = 17
"""From one stream's seed to the next: what was truncated does not come back."""


@dataclass
class Draft:
    """Steps of sequence ``a`` as they are drawn, and the lengths that they lead to."""

    config: Config
    claims: Claims
    seed: int

    def __post_init__(self) -> None:
        self.steps: list[Step] = []
        self.state = Marks()

    def add(self, *steps: Step) -> None:
        for step in steps:
            self.steps.append(step)
            self.state.apply(step)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.state.lengths("a")

    @property
    def least(self) -> tuple[int, ...]:
        """The fewest tokens that each row may go back to."""
        return tuple(map(self.claims.keeps, self.state.marks("a")))

    @property
    def mark(self) -> int:
        """The largest length of any row so far."""
        return max(self.state.marks("a"))

    @property
    def room(self) -> int:
        return self.config.capacity - max(self.lengths)

    def grow(self, size: int) -> None:
        """Appends other tokens than before, as many as there is room for, to every row."""
        self.seed += OTHER
        size = min(size, self.room)
        for part in at_once(size, self.claims) if size else ():
            self.add(Append("a", (part,) * len(self.lengths), self.seed))

    def program(self) -> Program:
        return clipped(self.config, self.steps)


def _grown(draw: Draw, config: Config, claims: Claims, batch: int) -> Draft:
    """A sequence that fills half of the capacity or more, by a prompt and decode steps: a ring has gone round."""
    draft, size = Draft(config, claims, draw(seeds)), draw(st.integers((config.capacity + 1) // 2, config.capacity))
    single = min(draw(st.integers(0, 3)), size - 1)
    draft.add(*appends("a", (*at_once(size - single, claims), *(1,) * single), batch, draft.seed))
    return draft


@st.composite
def repeated(draw: Draw, config: Config, claims: Claims) -> Case:
    """Truncations that follow one another, a shallow one first, then deeper ones; then other tokens, and again."""
    draft = _grown(draw, config, claims, draw(batches(claims)))
    for _ in range(draw(st.integers(1, 3))):
        for number in range(draw(st.integers(2, 3))):
            length, least = draft.lengths[0], draft.least[0]
            depth = draw(st.integers(1, 3) if number == 0 else st.integers(1, max(length - least, 1)))
            draft.add(Truncate("a", max(length - depth, least)))
        draft.grow(draw(counts(claims, 4)))
        if draw(st.booleans()):
            draft.grow(1)
    return Case((draft.program(),))


@st.composite
def whole(draw: Draw, config: Config, claims: Claims) -> Case:
    """Truncations to the length that there is, at some lengths from 0 up to the capacity, and other tokens behind each;
    behind that of a full cache, others in the place of the newest."""
    capacity, page, batch = config.capacity, claims.page or config.capacity, draw(batches(claims))
    draft = Draft(config, claims, draw(seeds))
    draft.add(*appends("a", (1,), batch, draft.seed))
    if draw(st.booleans()):
        draft.add(Truncate("a", 0))  # no rollback is less than the one token so far
    pages = st.integers(1, max((capacity - 1) // page, 1)).map(lambda number: min(number * page, capacity))
    stops: list[int] = draw(st.lists(st.integers(1, capacity) | pages | st.just(capacity), min_size=1, max_size=4))
    for stop in (draft.lengths[0], *sorted(set(stops))):
        more = stop - draft.lengths[0]
        if more and draw(st.booleans()):
            draft.grow(1)
            more -= 1
        draft.grow(more)
        draft.add(Truncate("a", stop))
    if not draft.room:
        draft.add(Truncate("a", capacity - 1))
    draft.grow(draw(counts(claims, 4)))
    return Case((draft.program(),))


@st.composite
def apart(draw: Draw, config: Config, claims: Claims) -> Case:
    """Rounds of drafts, of which each row keeps its own number, as a batched speculative decoder does; in between, the
    rows may be permuted."""
    largest = min(claims.max_batch or LARGEST_BATCH, LARGEST_BATCH)
    batch, draft = draw(st.integers(2, largest)), Draft(config, claims, draw(seeds))
    draft.add(*appends("a", at_once(draw(st.integers(1, max(config.capacity // 2, 1))), claims), batch, draft.seed))
    for number in range(draw(st.integers(1, 4))):
        before = draft.lengths
        draft.grow(draw(st.integers(1, 5)))
        ranges = zip(draft.least, before, draft.lengths, strict=True)
        kept = [draw(st.integers(max(low, was), now)) for low, was, now in ranges]
        if number == 0 and len(set(kept)) == 1:  # at least once the rows part
            kept[draw(st.integers(0, batch - 1))] = max(draft.least[0], before[0] - (kept[0] == before[0]))
        draft.add(Truncate("a", tuple(kept)))
        if claims.can("reorder") and draw(st.integers(0, 3)) == 3:
            draft.add(Reorder("a", tuple((row + 1) % batch for row in range(batch))))
    draft.grow(draw(counts(claims, 4)))
    return Case((draft.program(),))


@st.composite
def refused(draw: Draw, config: Config, claims: Claims) -> Case:
    """A truncation by more than the claimed rollback in all, after none, one or two that are not; and the same program
    without it. Tokens come by one or two, so that no cache need hold more than its window and the rollback."""
    batch, seed = draw(batches(claims)), draw(seeds)
    longest = min(draw(st.integers(1, 2)), claims.max_chunk or 2)
    size = draw(st.integers((config.capacity + 1) // 2, config.capacity))
    plain, draft = Draft(config, claims, seed), Draft(config, claims, seed)
    for both in (plain, draft):
        both.add(*appends("a", pieces(size, longest), batch, seed))
    for _ in range(draw(st.integers(0, 2))):
        kept, more = draw(st.integers(draft.least[0], draft.lengths[0])), draw(st.integers(0, longest))
        for both in (plain, draft):
            both.add(Truncate("a", kept))
            both.grow(more)
    beyond = min(claims.refuses(draft.mark, longest, config.window), draft.lengths[0])
    if beyond > 0:
        draft.add(Reject(Truncate("a", draw(st.integers(max(beyond - 3, 1), beyond))), "depth"))
    for both in (plain, draft):
        both.grow(longest)
    return Case((plain.program(), draft.program()))


@st.composite
def paused(draw: Draw, config: Config, claims: Claims) -> Case:
    """A sequence that grows, with and without appends of no token in between; perhaps its tokens were truncated."""
    draft = _grown(draw, config, claims, draw(batches(claims)))
    plain = Draft(config, claims, draft.seed)
    plain.add(*draft.steps)
    for _ in range(draw(st.integers(1, 3))):
        if draft.lengths[0]:
            draft.add(Append("a", (0,) * len(draft.lengths), draft.seed))
        if claims.can("truncate") and draw(st.booleans()):
            back = Truncate("a", draw(st.integers(draft.least[0], draft.lengths[0])))
            draft.add(back)
            plain.add(back)
        size = draw(counts(claims, 3))
        draft.grow(size)
        plain.grow(size)
    return Case((plain.program(), draft.program()))
