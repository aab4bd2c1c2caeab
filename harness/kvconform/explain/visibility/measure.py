"""Measuring one schedule of one backend: it is run unchanged, and once with each token changed.

Every cell is measured by runs of the same shapes: the schedule as it is, once more to see whether outputs repeat, then
once for each token with that token changed. A cell that must not be seen is compared bit for bit. A cell that must be
seen is judged only where the reference moves by more than the two bounds together; where it does not, other contents
are tried, then, in the attention profile, needles. Needles also show whether a token sees itself: its own query, which
would move the output as well, is then the needle's and stays. In other profiles a token always moves its own output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from kvconform.explain.visibility.schedules import NAMES, Schedule
from kvconform.judging.judge import observe
from kvconform.judging.observed import Array, Observed, pairs
from kvconform.judging.outputs import wavers
from kvconform.judging.render import render
from kvconform.worker.client import WorkerClient
from kvconform_specs.claims import Precision, changes_at
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program, UncachedForward
from kvconform_specs.reference.oracle import Expected, ReferenceForward, expect

SEEDS = (3, 1_409, 2_718)
"""Streams that are tried one after another while a cell is not resolved."""
SEES, BLIND, UNKNOWN, MISSING = "x", ".", "?", " "


def memoized(own: ReferenceForward) -> ReferenceForward:
    """A black box's own forward, run once for each input."""
    known: dict[tuple[bytes, tuple[int, ...], float, float, int], Array] = {}  # maps are of context 0

    def forward(inputs: Array, storage: float, accumulation: float, seed: int) -> Array:
        key = inputs.tobytes(), inputs.shape, storage, accumulation, seed
        if key not in known:
            known[key] = own(inputs, storage, accumulation, seed)
        return known[key]

    return forward


@dataclass(frozen=True)
class _Ran:
    """A program and its outputs. Those from step ``stop`` on are missing, and NaN here; ``words`` say why."""

    observed: Observed
    stop: int
    words: str


class MeasuredMap:
    """What one schedule shows: ``wanted`` and ``seen`` after ``measure``, arrays ``(n, n)``, outputs by tokens.

    starts: how often the backend had been started before the first schedule. fresh: each run is in a fresh process, and
    of three sequences only the first one's tokens are changed. unsteady: outputs differ between runs of the same
    tokens, by more than the bounds.
    """

    def __init__(
        self,
        client: WorkerClient,
        config: Config,
        own: ReferenceForward | None,
        schedule: Schedule,
        starts: int,
        fresh: bool,
    ) -> None:
        self.client, self.config, self.own, self.schedule = client, config, own, schedule
        self.starts, self.fresh = starts, fresh
        self.length = schedule.length
        self.n = n = schedule.rows * self.length
        self.needles = config.profile == "attention" and schedule.name != "full" and not fresh
        self.stopped, self.notes, self.unsteady, self.tried = "", list[str](), False, 0
        # cells: an output is asked for; it came
        self.asked, self.came = np.zeros((n, n), bool), np.zeros((n, n), bool)
        # its history is the same; it moved all the same
        self.banned, self.leaked = np.zeros((n, n), bool), np.zeros((n, n), bool)
        # the reference moves by more than the bounds; the output moved as well
        self.required, self.felt = np.zeros((n, n), bool), np.zeros((n, n), bool)
        # the reference has not moved by a bit yet; the output has; by more than the bounds
        self.still, self.moved, self.far = np.ones((n, n), bool), np.zeros((n, n), bool), np.zeros((n, n), bool)
        # outputs: repeat to the bit; are unknown; are not finite. tokens: were changed
        self.steady, self.unknown = np.ones(n, bool), np.zeros(n, bool)
        self.infinite, self.changed = np.zeros(n, bool), np.zeros(n, bool)

    def measure(self) -> None:
        for seed in SEEDS:
            first = seed == SEEDS[0]
            tokens = list(range(self.n)) if first else self.open_tokens()
            if not tokens or self.unsteady:
                break
            base = self.run(seed)
            if first and base.words and self.client.starts == self.starts:
                self.client.fresh()  # what earlier programs left behind may be in the way
                self.stopped, base = "", self.run(seed)
            if first:
                self.repeat(base, self.run(seed))
            for token in tokens:
                looked = not self.unsteady and (not self.fresh or token < self.length)
                self.changed[token] |= looked
                self.compare(base, self.run(seed, token, looked=looked), token)
            self.tried += 1
        if self.needles:
            for token in self.open_tokens(aimed=True):
                self.compare(self.run(SEEDS[0], aimed=token), self.run(SEEDS[0], token, aimed=token), token, aimed=True)
        if self.infinite.any():
            self.unknown |= self.infinite
            self.notes.append(f"{_outputs(self.infinite)} is not finite")
        if self.fresh:
            self.notes.append("each run is in a fresh process; only the first sequence's tokens were changed")

    def open_tokens(self, aimed: bool = False) -> list[int]:
        """The tokens with a cell that may have to be seen and is not resolved."""
        unresolved = self.came & ~self.banned & ~self.required & ~self.unknown[:, None]
        if self.needles and not aimed:
            np.fill_diagonal(unresolved, False)
        return [int(token) for token in np.flatnonzero(unresolved.any(axis=0))]

    def wanted(self) -> NDArray[np.str_]:
        # where a black box's own forward never moved, it does not see: its window is not known otherwise
        unseen = self.still & ~self.required & (self.own is not None) & (self.tried == len(SEEDS))
        return np.select([~self.asked, self.banned | unseen, self.required], [MISSING, BLIND, SEES], UNKNOWN)

    def seen(self) -> NDArray[np.str_]:
        which = [self.banned, self.required, self.wanted() == BLIND]
        sees = np.select(which, [self.leaked, self.felt, self.far], self.moved)
        unknown = self.asked & (self.unknown[:, None] | ~self.changed)
        return np.select([unknown, ~self.came], [UNKNOWN, MISSING], np.where(sees, SEES, BLIND))

    # --- running ---
    def run(self, seed: int, changed: int | None = None, aimed: int | None = None, looked: bool = True) -> _Ran:
        """A run of the schedule; ``looked`` False: only what the reference gives."""
        claims = self.client.claims
        program = self.schedule.program(self.config, claims, seed, changed, aimed)
        if self.fresh and looked:
            self.client.fresh()
        trace = self.client.run(program, (0,)).apart()[0] if looked else ()
        expected = self.expected(program)
        observed, mismatch = observe(program, trace, claims, expected)
        wants, outputs, words = [*observed.expected], [*observed.outputs], ""
        stop = len(wants)
        if mismatch is not None:
            words = render(mismatch) if changed is None else f"with token {changed} changed: {render(mismatch)}"
            self.stopped = self.stopped or words
        for want in expected[stop:]:
            last = want is not None and claims.returns == "last" and self.schedule.name != "full"
            wants.append(want.last() if want is not None and last else want)
            shape = None if want is None else (1, len(want.counts), 1 if last else max(want.counts))
            outputs.append(None if shape is None else np.full((*shape, self.config.outputs), np.nan))
        return _Ran(Observed(program, trace, wants, outputs, claims), stop, words)

    def expected(self, program: Program) -> tuple[Expected | None, ...]:
        """What the reference gives for the program. A row is computed once and cut, however it is run."""
        precision, step = self.client.claims.precision, program.steps[0]
        if self.own is not None:
            return expect(program, (0,), precision, self.own)
        if self.schedule.rows > 1 or precision.by_length or changes_at(self.config, precision):
            return _defined(program, precision)
        assert isinstance(step, Append | UncachedForward)
        swaps = tuple(
            swap for one in program.steps if isinstance(one, Append | UncachedForward) for swap in one.substitutions
        )
        aim = step.needle if isinstance(step, Append) else None
        (want,) = _defined(Program(self.config, (Append("a", (self.length,), step.seed, swaps, aim),)), precision)
        assert want is not None
        stops = list(accumulate(self.schedule.sizes))
        return tuple(_part(want, start, stop) for start, stop in pairwise((0, *stops)))

    # --- comparing ---
    def repeat(self, base: _Ran, again: _Ran) -> None:
        """Notes outputs that differ between two runs of the same tokens."""
        worse = np.zeros(self.n, bool)
        for _base, _again, number, row, column, _same in pairs((base.observed, again.observed)):
            query = self.query(base.observed, number, row, column)
            if number >= min(base.stop, again.stop):
                worse[query] = base.stop != again.stop
                continue
            mine, its = base.observed.got(number)[:, row, column], again.observed.got(number)[:, row, column]
            self.steady[query] = np.array_equal(mine, its, equal_nan=True)
            if not self.steady[query]:
                worse[query] = not bool(np.all(abs(mine - its) <= 2 * base.observed.want(number).bound[:, row, column]))
        self.unknown |= worse
        self.unsteady = bool(worse.any())
        if self.unsteady:
            self.notes.append(f"not repeatable: {_outputs(worse)} differs between runs of the same tokens")
        elif not self.steady.all():
            self.notes.append(f"{_outputs(~self.steady)} differs between runs of the same tokens, within its bound")

    def compare(self, base: _Ran, other: _Ran, token: int, aimed: bool = False) -> None:
        for _base, _other, number, row, column, same in pairs((base.observed, other.observed)):
            cell = self.query(base.observed, number, row, column), token
            self.asked[cell], self.banned[cell] = True, same
            came = number < min(base.stop, other.stop)
            self.came[cell] |= came
            waits = came and self.needles and not aimed and cell[0] == token
            if not self.required[cell] and not waits:
                self._judge(base, other, number, row, column, cell)

    def _judge(self, base: _Ran, other: _Ran, number: int, row: int, column: int, cell: tuple[int, int]) -> None:
        was, now = base.observed.want(number), other.observed.want(number)
        old, new = base.observed.got(number)[:, row, column], other.observed.got(number)[:, row, column]
        came = number < min(base.stop, other.stop)
        if came and not (np.isfinite(old).all() and np.isfinite(new).all()):
            came = False
            self.infinite[cell[0]] = True
        differs = came and not np.array_equal(old, new)
        if self.banned[cell] and not differs:
            return
        bounds = now.bound[:, row, column] + was.bound[:, row, column]
        response, moves = abs(now.value[:, row, column] - was.value[:, row, column]), abs(new - old)
        far = differs and not bool(np.all(moves <= bounds))
        if self.banned[cell]:
            alike = wavers(base.observed, other.observed, number, row, column)
            self.leaked[cell] |= (far or bool(self.steady[cell[0]])) and not alike
            return
        resolvable = response > bounds
        self.required[cell] = bool(resolvable.any())
        # as much as it must, or more than rounding allows: how much a wrong output moves says nothing about its mask
        self.felt[cell] = far or (came and bool(np.all((moves >= response - bounds) | ~resolvable)))
        self.still[cell] &= not response.any()
        self.moved[cell] |= differs
        self.far[cell] |= far

    def query(self, one: Observed, number: int, row: int, column: int) -> int:
        """The token that an output belongs to."""
        want, step = one.want(number), one.program.steps[number]
        assert isinstance(step, Append | UncachedForward)
        place = NAMES.index(step.seq) if self.schedule.name == "sequences" else row
        later = int(np.count_nonzero(want.real[row, column:]))  # tokens of the step from this column on
        return place * self.length + len(want.rows[row]) - later


@lru_cache(maxsize=512)
def _defined(program: Program, precision: Precision) -> tuple[Expected | None, ...]:
    """What the definition gives; other backends run the same programs."""
    return expect(program, (0,), precision)


def _part(want: Expected, start: int, stop: int) -> Expected:
    """What an append of these tokens of the only row must give."""
    (row,), part = want.rows, slice(start, stop)
    return Expected((row[:stop],), (stop - start,), want.real[:, part], 1, lambda kind: want.numbers(kind)[:, :, part])


def _outputs(tokens: NDArray[np.bool_]) -> str:
    return f"the output of token{'s' if tokens.sum() > 1 else ''} {listed(np.flatnonzero(tokens).tolist())}"


def listed(numbers: Iterable[int]) -> str:
    """``0–2, 5 and 7``."""
    numbered = enumerate(sorted(numbers))
    runs = [[number for _index, number in run] for _key, run in groupby(numbered, lambda pair: pair[1] - pair[0])]
    parts = [
        part for run in runs for part in ([f"{run[0]}–{run[-1]}"] if len(run) > 2 else [str(number) for number in run])
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
