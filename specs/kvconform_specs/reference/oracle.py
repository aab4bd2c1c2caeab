"""The oracle: the value and the error bound that each step of a program must give, from the tokens alone.

It keeps no cache. It reads each row's tokens from the program, recomputes them with the definition (``solver.py``), and
selects the outputs that the step requests. A read of a sequence in the attention profile must give its tokens' keys and
values; what the layers of a decoder store is not prescribed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.claims import Precision, changes_at
from kvconform_specs.config import Config
from kvconform_specs.history import Histories, Row, context_of, epoch_of
from kvconform_specs.program import Append, Generate, Program, ReadCache, UncachedForward
from kvconform_specs.reference.solver import Array, Ids, Numbers, ReferenceForward, Solution, columns, model

__all__ = ["Expected", "Generation", "ReferenceForward", "columns", "expect", "given"]

PLAIN = Precision()


@dataclass(frozen=True)
class Expected:
    """What one step must give, for ``n`` variants: ``value`` and ``bound``, both ``(n, b, t, e)``.

    ``e`` is ``h * d`` (attention), the vocabulary (decoder) or ``2 * g * d`` (a read); the bound may have ``e = 1``.
    ``rows[r]`` are the tokens of row ``r``, the last ``counts[r]`` of them the step's. ``real`` ``(b, t)``: the columns
    that hold a token; the others are NaN. Numbers are computed when they are first needed, for all steps of the program
    at once: much can be judged without them.
    """

    rows: tuple[Row, ...]
    counts: tuple[int, ...]
    real: NDArray[np.bool_]
    n: int
    numbers: Numbers

    @property
    def value(self) -> Array:
        return self.numbers("value")

    @property
    def bound(self) -> Array:
        return self.numbers("bound")

    @property
    def bound_lower(self) -> Array:
        """At most ``bound``, and much cheaper for a decoder: an error within it is within the bound."""
        return self.numbers("bound_lower")

    @property
    def bound_estimate(self) -> Array:
        """The bound if it was computed, otherwise an estimate from ``bound_lower``: for display only."""
        return self.numbers("bound_estimate")

    def variant(self, index: int) -> Expected:
        """One of the ``n`` variants alone."""
        cut = slice(index, index + 1)
        return Expected(self.rows, self.counts, self.real, 1, lambda kind: self.numbers(kind)[cut])

    def last(self) -> Expected:
        """The last output of each row alone; all rows must have one."""
        rows = range(len(self.counts))
        ends = [int(np.flatnonzero(row)[-1]) if row.any() else 0 for row in self.real]
        real = np.array([[count > 0] for count in self.counts])
        ones = tuple(min(count, 1) for count in self.counts)
        return Expected(self.rows, ones, real, self.n, lambda kind: self.numbers(kind)[:, rows, ends][:, :, None])


@dataclass(frozen=True)
class Generation(Expected):
    """What a generation is judged by. Each token depends on those before it, which the backend has chosen: a token that
    differs after a tie is judged on the backend's own continuation.

    The numbers are those of the prompt. prompts: their token ids ``(n, b, s)``. given: the function of that name.
    """

    prompts: Callable[[], Ids]
    given: Callable[[Ids, int], Numbers]

    def along(self, ids: Ids) -> Numbers:
        """The logits ``(n, b, new, V)`` from which each of the generated tokens ``(n, b, new)`` must be chosen."""
        prompts = self.prompts()
        return self.given(np.concatenate([prompts, ids[..., :-1]], axis=-1), prompts.shape[-1] - 1)

    def variant(self, index: int) -> Generation:
        one, cut = super().variant(index), slice(index, index + 1)
        prompts = lambda: self.prompts()[cut]  # noqa: E731
        return Generation(one.rows, one.counts, one.real, 1, one.numbers, prompts, self.given)


def given(
    config: Config,
    reference: ReferenceForward | None,
    ids: Ids,
    start: int = 0,
    changes: Sequence[int] = (),
    context: int = 0,
    precision: Precision = PLAIN,
) -> Numbers:
    """What a decoder must give for token ids ``(n, b, s)``: logits ``(n, b, s - start, V)`` from position ``start`` on.

    reference: the forward that a black box is judged by; None: the definition. changes: the lengths at which outputs
    change, if each token is one step (``Claims.changes_at``); otherwise all tokens are one step. context: that of all
    sequences.
    """
    s = ids.shape[2]
    ends = [at for at in range(start + 1, s) if epoch_of(at, changes) != epoch_of(at + 1, changes)] + [s]
    parts = [
        model(config, reference, partial(np.copy, ids[:, :, :end]), begin, context, precision).numbers
        for begin, end in zip([start, *ends], ends, strict=False)
    ]
    return parts[0] if len(parts) == 1 else lambda kind: np.concatenate([part(kind) for part in parts], axis=2)


def expect(
    program: Program,
    indices: Sequence[int] = (0,),
    precision: Precision = PLAIN,
    reference: ReferenceForward | None = None,
) -> tuple[Expected | None, ...]:
    """For each step of the program what it must give in the variants ``indices``; None where it gives no numbers.

    reference: the forward that a black box is judged by; None: the definition.
    """
    histories, solution, n = Histories(), Solution(program, indices, precision, reference), len(indices)
    wanted: list[Expected | None] = []
    for number, step in enumerate(program.steps):
        numbers, want, rows = partial(solution.numbers, number), None, histories.apply(step)
        if isinstance(step, Append | UncachedForward):
            assert rows is not None
            if max(step.counts):
                solution.want(number, step, rows)
            else:  # an empty append has outputs of no column
                numbers = partial(_none, (n, len(rows), 0, program.config.outputs))
            want = Expected(rows, step.counts, columns(step), n, numbers)
            if step.last_only:
                want = want.last()
            if isinstance(step, Generate):
                changes = changes_at(program.config, precision)
                prompts, along = (
                    partial(solution.contents, rows),
                    partial(
                        given,
                        program.config,
                        reference,
                        changes=changes,
                        context=context_of(rows[0]),
                        precision=precision,
                    ),
                )
                want = Generation(rows, step.counts, columns(step), n, numbers, prompts, along)
        elif isinstance(step, ReadCache) and program.config.profile == "attention":
            held = solution.reads[number] = histories.rows[step.seq]
            lengths = tuple(map(len, held))
            want = Expected(held, lengths, np.arange(max(lengths)) < np.array(lengths)[:, None], n, numbers)
        wanted.append(want)
    return tuple(wanted)


def _none(shape: tuple[int, ...], kind: str) -> Array:
    return np.zeros(shape)
