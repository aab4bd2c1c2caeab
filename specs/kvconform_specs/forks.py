"""Programs of forks whose original is reset, truncated, closed or grown, and the situations that they reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Close, Fork, Marks, Reset, Step, Truncate, called
from kvconform_specs.rollbacks import OTHER
from kvconform_specs.strategies import Draw, appends, at_once, batches, counts, seeds, splits


class _Family:
    """Steps of a sequence and of its forks as they are drawn, each append of other tokens than any before."""

    def __init__(self, config: Config, claims: Claims, batch: int, seed: int) -> None:
        self.config, self.claims, self.batch, self.seed = config, claims, batch, seed
        self.steps: list[Step] = []
        self.state = Marks()

    def add(self, *steps: Step) -> None:
        for step in steps:
            self.steps.append(step)
            self.state.apply(step)

    def length(self, name: str) -> int:
        return max(self.state.lengths(name), default=0)

    def grow(self, name: str, size: int) -> None:
        """Appends as many tokens as there is room for; to a sequence that was closed, a new one of that name."""
        self.seed += OTHER
        size = min(size, self.config.capacity - self.length(name))
        self.add(*appends(name, at_once(size, self.claims), self.batch, self.seed))


@st.composite
def outlived(draw: Draw, config: Config, claims: Claims) -> Case:
    """A sequence, its fork ``b`` and mostly ``c``, a fork of ``b`` or a second one of the sequence. Then what was
    forked is reset, truncated, closed or only grown, and gets other tokens, and the forks continue; and again."""
    sizes: tuple[int, ...] = draw(splits(config, claims, most=3, capacity=config.capacity // 2))
    family = _Family(config, claims, draw(batches(claims)), draw(seeds))
    family.add(*appends("a", sizes, family.batch, family.seed), Fork("a", "b"))
    originals, forks = ["a"], ["b"]
    third = draw(st.sampled_from(("fork of the fork", "fork of the fork", "second fork", "none")))
    if third == "fork of the fork":
        if draw(st.booleans()):
            family.grow("b", draw(counts(claims, 3)))
        if (claims.max_sequences or 3) < 3:
            family.add(Close("a"))
            originals.remove("a")
        family.add(Fork("b", "c"))
        originals.append("b")
        forks = ["c"]
    elif third == "second fork" and (claims.max_sequences or 3) > 2:
        family.add(Fork("a", "c"))
        forks.append("c")
    ways = [*(way for way in ("reset", "truncate") if claims.can(way)), "close", "grow"]
    for _ in range(draw(st.integers(1, 3))):
        original = originals[draw(st.integers(0, len(originals) - 1))]
        held, way = family.length(original), draw(st.sampled_from(ways))
        if way == "reset":
            family.add(Reset(original))
        elif way == "close":
            family.add(Close(original))
        elif way == "truncate":
            least = max(map(claims.keeps, family.state.marks(original)))
            family.add(Truncate(original, draw(st.integers(least, max(held - 1, least)))))
        lost = held - family.length(original)
        if draw(st.integers(0, 3)) or way == "grow":
            # other tokens, as a rule in the places of all that are gone
            family.grow(original, draw(counts(claims, 3)) + (lost if draw(st.integers(0, 3)) else 0))
        elif way == "close":
            originals.remove(original)
        # not each time: a fork may first be stepped when its original has long been changed
        for name in forks[draw(st.integers(0, 1)) :]:
            family.grow(name, draw(counts(claims, 3)))
        if not originals:
            break
    names = sorted(family.state.rows)
    last = [Append(name, (1,) * family.batch, family.seed + OTHER) for name in names if family.length(name)]
    return Case((clipped(config, (*family.steps, *last)),))


# --- situations ---
def _on_original(earlier: reach.Walk, name: str) -> list[reach.Visit]:
    """The steps since a fork on the sequence that it was made from; none if it is no fork."""
    found: list[reach.Visit] = []
    original = ""
    for visit in earlier:
        step = called(visit.step)
        if isinstance(step, Fork) and step.into == name:
            original, found = step.seq, []
        elif isinstance(step, Close) and step.seq == name:
            original, found = "", []
        elif original and step.seq == original:
            found.append(visit)
    return found


def behind(
    words: str, that: Callable[[list[reach.Visit], reach.Walk], bool], possible: reach.Possible
) -> reach.Situation:
    """An append to a fork with tokens. ``that``: of the steps on its original since the fork, and all earlier ones."""

    def reached(walks: Sequence[reach.Walk]) -> bool:
        return any(
            visit.appends and visit.past > 0 and that(_on_original(one[:number], called(visit.step).seq), one[:number])
            for one in walks
            for number, visit in enumerate(one)
        )

    return reach.Situation(f"a fork that continues after {words}", reached, reach.both(reach.holds(2), possible))


def refilled(made: list[reach.Visit], earlier: reach.Walk) -> bool:
    """Whether the original was reset and then given tokens."""
    resets = [number for number, visit in enumerate(made) if isinstance(visit.step, Reset) and visit.past > 0]
    return bool(resets) and any(visit.appends for visit in made[resets[0] :])


def shortened(made: list[reach.Visit], earlier: reach.Walk) -> bool:
    return any(isinstance(visit.step, Truncate) and visit.longest < visit.past for visit in made)


def grown(made: list[reach.Visit], earlier: reach.Walk) -> bool:
    """Whether the original has grown, and nothing else."""
    return bool(made) and all(visit.appends for visit in made)


def gone_in_the_middle(made: list[reach.Visit], earlier: reach.Walk) -> bool:
    """Whether the original was a fork itself, and was reset or closed."""
    names = {visit.step.into for visit in earlier if isinstance(visit.step, Fork)}
    return any(isinstance(visit.step, Reset | Close) and visit.step.seq in names for visit in made)
