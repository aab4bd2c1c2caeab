"""What broke a clause, as data: the record that a relation makes and that results, reports and repro scripts read."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, Literal

import msgspec

from kvconform.errors import Exit, Raised, WorkerDied, WorkerTimeout
from kvconform_specs.clause import Relation


class Kind(Enum):
    """What was violated: a relation of the clause, or something that every relation takes for granted."""

    PARITY = "parity"
    AGREEMENT = "agreement"
    INSENSITIVE = "insensitive"
    SENSITIVE = "sensitive"
    BITWISE = "bitwise"
    FINITE = "finite"
    SAME_TOKEN = "same token"
    GENERATED = "generated"
    LENGTHS = "lengths"
    FREE_SLOTS = "free slots"
    CONTENTS = "contents"
    QUANTISED = "quantised"
    STABLE_CONTENTS = "stable contents"
    RETAINED_COUNT = "retained count"
    INPUTS = "inputs"
    OUTPUTS = "outputs"
    GRAPH_COUNT = "graph count"
    BYTES = "bytes"
    POSITIONS = "positions"
    LINEAR_COST = "linear cost"
    # --- of an answer of a serving engine ---
    LOG_PROBABILITY = "log-probability"
    CHOICE = "choice"
    COUNT = "count"
    REFUSED = "refused"
    SERVED = "served"
    NO_ANSWER = "no answer"
    # --- what every relation takes for granted ---
    RAISED = "raised"
    ACCEPTED = "accepted"
    NO_OUTPUT = "no output"
    NOT_NUMERIC = "not numeric"
    SHAPE = "shape"
    DTYPE = "dtype"
    TOKEN_ID = "token id"
    # --- what ended or failed outside a step's own exception ---
    DIED = "died"
    TIMED_OUT = "timed out"
    NOT_BUILT = "not built"
    REFERENCE_FAILED = "reference failed"
    WORKER_FAILED = "worker failed"


Value = int | float | str | tuple[int, ...]
"""A number; ``nan``, ``inf`` or ``-inf``, which JSON has no numbers for; the name of a type; or one integer for each
row, axis or step."""


class Place(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where something is: a step of a program, and a token of it."""

    program: int | None = None
    """Index of the program in the case, from 0; null where no program was running."""
    step: int | None = None
    """Index of the step in the program, from 0; null where no step was running."""
    call: str = ""
    """The step in words, such as `append 2 to a of 2 rows`."""
    row: int | None = None
    """Index of the sequence's row, from 0."""
    position: int | None = None
    """Logical position of the token in its row, in tokens from 0."""
    column: int | None = None
    """Index of the token in the step's own inputs and outputs, in tokens from 0."""


class Mismatch(Place, frozen=True, kw_only=True, omit_defaults=True):
    """What broke a clause. Each kind sets the fields that it knows; a field with its default is not written to
    files."""

    kind: Kind
    """What was violated: a relation, or something that every relation takes for granted."""
    variant: int = 0
    """Index of the variant of the program's seeds, from 0; the seeds of a counterexample are those of variant 0."""
    part: Literal["", "head", "logit", "channel", "key", "value", "output", "token ids", "read", "prompt", "answer"] = (
        ""
    )
    """What the number belongs to: an attention head, a logit or a channel of an output; a key or value of a read. Of a
    wrong shape or dtype: which array has it. Of a log-probability: whether a prompt or an answer has the token."""
    layer: int | None = None
    """Index of the layer, from 0, of a key or value that was read."""
    head: int | None = None
    """Index of the query head of an output, or of the KV head of a read, from 0."""
    element: int | None = None
    """Index of the number within its head, or among the logits or channels, from 0."""
    got: Value | None = None
    """What came. Lengths and free slots: tokens of each row; bytes; multiply-adds; shapes; the name of a dtype or type;
    else an output, or how far it moved."""
    want: Value | None = None
    """What had to come, in the unit of `got`; the least where `want_max` is given."""
    want_max: int | None = None
    """The most that was allowed, in the unit of `got`; of a linear cost: multiply-adds per token of depth."""
    bound: float | str | None = None
    """How far `got` may be from `want`, in the unit of `got`; of a generated token: in logits."""
    lead: float | None = None
    """By how much the logit of the token `want` exceeds that of the token `got`, or the second largest; in logits."""
    other: Place | None = None
    """The place that it had to agree with, whose number is `want`."""
    change: Literal["", "token", "padding", "nan", "reused", "other"] = ""
    """What differs between the first program and this one: a token; what fills the columns without a token; tokens of
    another row or sequence that hold NaN; or that the caller overwrites its inputs after each step."""
    changed_row: int | None = None
    """Index of the row of the changed token, from 0."""
    changed_position: int | None = None
    """Logical position of the changed token, in tokens from 0."""
    new_tokens: int | None = None
    """How many tokens each row was given by the step whose multiply-adds were counted."""
    steps: tuple[int, ...] = ()
    """Indices of the equal steps whose multiply-adds `got` lists."""
    depths: tuple[int, ...] = ()
    """Tokens that the longest row holds after each of the steps whose multiply-adds were counted."""
    array: str = ""
    """The array of the caller that was overwritten: an input such as `query`, `token ids` or `mask`, or `output`."""
    where: Literal["", "inside", "before", "behind", "between"] = ""
    """What was overwritten: a number of the array, the memory before or behind it, or that between its numbers."""
    index: tuple[int, ...] = ()
    """The number of the array that was overwritten, one index for each axis; `want` is what it was."""
    later: bool = False
    """Whether an input was overwritten by a later step than the one that was given it."""
    distance: int | None = None
    """How many numbers before the first or behind the last of the array was written."""
    error: Raised | None = None
    """The exception that the backend raised."""
    ended: Exit | None = None
    """How the worker process ended."""
    token: int | None = None
    """The token id that a log-probability belongs to, no unit."""
    counted: Literal["", "cached", "prompt", "generated", "completions", "scored"] = ""
    """What an answer of a serving engine counts: prompt tokens from the cache, tokens of the prompt, generated ones,
    completions, or the prompt's own tokens that have a log-probability."""
    reference: Literal["", "cold", "prefill", "repeated", "model"] = ""
    """What an answer is compared with: the same request alone without the prefix cache; a request whose prompt holds
    the tokens before; the same request, asked again."""
    earlier_programs: int = 0
    """How many programs must run before, in the same process, for it to break: state leaks from them."""

    @property
    def relation(self) -> Relation | None:
        """The relation of that name; None for what every relation takes for granted."""
        return RELATION_OF.get(self.kind)

    @property
    def end(self) -> int | None:
        """The number of steps that show it; None: all of the program's."""
        return None if self.step is None or self.kind is Kind.OUTPUTS or self.later else self.step + 1

    @property
    def raised(self) -> bool:
        """Whether a legal step raised, so that no output was wrong."""
        return self.kind in (Kind.RAISED, Kind.NOT_NUMERIC)

    @property
    def ending(self) -> Literal["", "crash", "timeout"]:
        """How the process failed; empty where it lives and answered."""
        if self.ended is not None and self.ended.timeout is not None:
            return "timeout"
        outside = (Kind.DIED, Kind.TIMED_OUT, Kind.NOT_BUILT, Kind.REFERENCE_FAILED, Kind.WORKER_FAILED, Kind.NO_ANSWER)
        return "crash" if self.kind in outside else ""


RELATION_OF = {Kind[relation.name]: relation for relation in Relation if relation is not Relation.SHAPE}
"""The shape of outputs is looked at before any relation, whatever the clause."""
STAGES = {"build": Kind.NOT_BUILT, "reference": Kind.REFERENCE_FAILED, "message": Kind.WORKER_FAILED}


def json_number(value: Any) -> float | str:
    """A number for ``got``, ``want`` and ``bound``: what is not finite by its name, since JSON has no number for it."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def died(death: WorkerDied, variant: int = 0, program: int | None = None) -> Mismatch:
    """A worker's end as a mismatch; ``program``: the index of the program that was sent last."""
    return Mismatch(
        kind=STAGES.get(death.stage, Kind.TIMED_OUT if isinstance(death, WorkerTimeout) else Kind.DIED),
        variant=variant,
        program=program if death.call else None,
        step=death.step if death.call else None,
        call=death.call,
        error=death.error,
        ended=death.ended,
    )
