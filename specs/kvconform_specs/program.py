"""A program: a config, and steps over named sequences, as frozen data.

It can be printed, compared and stored as JSON, and it contains no tensor: contents come from seeds (``tensors.py``).
A *sequence* is a batch of rows that grow together. The content of a row is a *stream*: an endless series of tokens
that a seed identifies. Row ``r`` of a step with seed ``s`` reads stream ``s + r`` from the row's current length on. The
same seed gives the same tokens however they are split into steps, and row ``r`` alone is seed ``s + r``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, assert_never

from kvconform_specs.config import Config, take
from kvconform_specs.errors import SpecError


@dataclass(frozen=True, slots=True)
class Append:
    """Appends ``counts[r]`` new tokens to row ``r``. Prefill, chunk and decode are the same step with other counts.

    The first append to a name opens the sequence with ``len(counts)`` rows. Unequal counts are *ragged* rows.
    substitutions: ``(row, position, seed)``: the token at that logical position of that row comes from another stream.
    needle: ``(seed, position)``: every query of the step has the direction of that token's key, so that it attends to
    that token almost alone (attention profile). masked: ``(row, position)``: tokens that the caller's mask hides from
    every query (attention profile). pad: ``(side, seed)``: the side, ``right`` or ``left``, of the columns of ragged
    rows that hold no token, and the stream that fills them; None: right, zeros. layout: the memory layout of the inputs
    (``LAYOUTS``). in_place: the present is written into the memory of the past. count_macs: the multiply-adds of the
    step are counted. last_only: only the output of each row's last new token is requested; all counts are equal
    (decoder profile). distribution: the distribution of the streams that the step names (``DISTRIBUTIONS``). nan: rows
    whose streams have the distribution ``nan`` instead. reused: the inputs lie in memory that the caller overwrites
    after the step, and uses again for the next such step.
    """

    seq: str
    counts: tuple[int, ...]
    seed: int
    substitutions: tuple[tuple[int, int, int], ...] = ()
    needle: tuple[int, int] | None = None
    masked: tuple[tuple[int, int], ...] = ()
    pad: tuple[str, int] | None = None
    layout: str = "contiguous"
    in_place: bool = False
    count_macs: bool = False
    last_only: bool = False
    distribution: str = "normal"
    nan: tuple[int, ...] = ()
    reused: bool = False


@dataclass(frozen=True, slots=True)
class UncachedForward:
    """Runs the backend's own cache-less forward on the first ``counts[r]`` tokens of each row's stream.

    It changes no sequence; ``seq`` names the outputs, so that they can be compared with those of a cached sequence.
    last_only: only the output of each row's last token is requested; all counts are equal (decoder profile).
    distribution: as for ``append``.
    """

    seq: str
    counts: tuple[int, ...]
    seed: int
    substitutions: tuple[tuple[int, int, int], ...] = ()
    last_only: bool = False
    distribution: str = "normal"


@dataclass(frozen=True, slots=True)
class Generate(UncachedForward):
    """The backend generates ``new`` tokens greedily after the first ``counts[r]`` tokens of each row's stream.

    Like ``uncached_forward`` it changes no sequence. All prompts have the same length (decoder profile).
    """

    new: int = 1


@dataclass(frozen=True, slots=True)
class Truncate:
    """Removes all but the first ``length`` tokens of every row."""

    seq: str
    length: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Copies ``seq`` to the new name ``into``; both continue independently."""

    seq: str
    into: str


@dataclass(frozen=True, slots=True)
class Reorder:
    """Row ``i`` becomes the old row ``rows[i]``. Duplicates are legal, and independent afterwards."""

    seq: str
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reset:
    """Empties the sequence and keeps its handle."""

    seq: str


@dataclass(frozen=True, slots=True)
class Close:
    """Ends the sequence; its name may be opened again."""

    seq: str


@dataclass(frozen=True, slots=True)
class AliasHandle:
    """Gives the handle of ``seq`` a second name, ``into``, without a call; both continue from it, independently."""

    seq: str
    into: str


@dataclass(frozen=True, slots=True)
class ReadCache:
    """Requests the keys and values that the sequence holds."""

    seq: str


@dataclass(frozen=True, slots=True)
class Poison:
    """Fills the slots that hold no token of any sequence; keys and values separately, with a value of ``POISONS``."""

    seq: str
    keys: str = "none"
    values: str = "none"


@dataclass(frozen=True, slots=True)
class Reject:
    """A call that the backend must refuse with an exception, and that must change nothing.

    wrong: how the inputs of an otherwise legal append are malformed (``MALFORMED``); empty: the call is not legal.
    """

    step: Append | Truncate | Reorder
    wrong: str = ""


Call = Append | UncachedForward | Truncate | Fork | Reorder | Reset | Close | AliasHandle | ReadCache | Poison
Step = Call | Reject
Run = Append | UncachedForward
OPS: dict[str, type[Any]] = {
    "append": Append,
    "uncached_forward": UncachedForward,
    "generate": Generate,
    "truncate": Truncate,
    "fork": Fork,
    "reorder": Reorder,
    "reset": Reset,
    "close": Close,
    "alias_handle": AliasHandle,
    "read_cache": ReadCache,
    "poison": Poison,
    "reject": Reject,
}
MAX_SEED = (1 << 48) - 1
DISTRIBUTIONS = ("normal", "large_queries", "zero_keys", "small_keys_large_values", "nan")
"""The distributions of a stream's numbers: independent normals; queries 64 times as large; all keys zero; values 16
times as large and keys a quarter; NaN. The factors apply in the attention profile. Token ids cannot be NaN."""
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
"""Memory layouts of inputs: dense; token axis before head axis; every other element of a larger array; one row that
all rows share with a stride of 0 (their tokens must be equal)."""
POISONS = {"none": None, "junk": 3.0e4, "nan": float("nan"), "inf": float("inf")}
"""What slots without a token are filled with; junk is finite in float16, too."""
MALFORMED = {
    "attention": ("dtype", "rank", "heads", "head dim", "batch", "lengths"),
    "decoder": ("dtype", "rank", "batch", "vocabulary"),
    "hidden": ("dtype", "rank", "batch", "width"),
}
"""What can be wrong with the inputs of an append: integers for floats, or floats for token ids; a missing axis; a KV
head too many; a head dim one too small; a row too many; fewer values than keys; an unknown token id; a channel less."""
NAMES = {kind: op for op, kind in OPS.items()}
R = TypeVar("R")


def called(step: Step) -> Call:
    """The call that the step makes, whether it must succeed or be refused."""
    return step.step if isinstance(step, Reject) else step


class Sequences(Generic[R]):
    """The rows of every open sequence. A subclass says what a row is, and how steps make it longer or shorter."""

    empty: R

    def __init__(self) -> None:
        self.rows: dict[str, tuple[R, ...]] = {}

    def grown(self, rows: tuple[R, ...], step: Run) -> tuple[R, ...]:
        raise NotImplementedError

    def cut(self, row: R, length: int) -> R:
        raise NotImplementedError

    def of(self, name: str) -> tuple[R, ...]:
        """The rows of a sequence; none where it is not open."""
        return self.rows.get(name, ())

    def after(self, step: Run) -> tuple[R, ...]:
        """The rows that the outputs of ``step`` belong to, its new tokens included."""
        past = self.of(step.seq) if isinstance(step, Append) else ()
        return self.grown(past or (self.empty,) * len(step.counts), step)

    def apply(self, step: Step) -> tuple[R, ...] | None:
        """Changes the rows as a legal step does, and returns those that its outputs belong to, if it has any."""
        match step:
            case Append(seq):
                self.rows[seq] = rows = self.after(step)
                return rows
            case UncachedForward():
                return self.after(step)
            case Truncate(seq, length):
                self.rows[seq] = tuple(self.cut(row, length) for row in self.rows[seq])
            case Fork(seq, into) | AliasHandle(seq, into):
                self.rows[into] = self.rows[seq]
            case Reorder(seq, order):
                self.rows[seq] = tuple(self.rows[seq][row] for row in order)
            case Reset(seq):
                self.rows[seq] = (self.empty,) * len(self.rows[seq])
            case Close(seq):
                del self.rows[seq]
            case ReadCache() | Poison() | Reject():
                pass
            case _:
                assert_never(step)
        return None


class Lengths(Sequences[int]):
    """A row is its number of tokens."""

    empty = 0

    def grown(self, rows: tuple[int, ...], step: Run) -> tuple[int, ...]:
        return tuple(length + count for length, count in zip(rows, step.counts, strict=True))

    def cut(self, row: int, length: int) -> int:
        return length


@dataclass(frozen=True, slots=True)
class Program:
    """Steps over named sequences under one config. Raises SpecError where a step is not legal."""

    config: Config
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        lengths = Lengths()
        for index, step in enumerate(self.steps):
            _check(self.config, lengths, step, f"steps[{index}]")
            lengths.apply(step)

    @property
    def span(self) -> int:
        """An upper bound of the positions of its streams that the program reaches."""
        return sum(max(s.counts) for s in map(called, self.steps) if isinstance(s, Append | UncachedForward))

    @property
    def size(self) -> tuple[int, int]:
        """Number of steps, then of tokens; shrinking reduces it."""
        tokens = sum(sum(s.counts) for s in self.steps if isinstance(s, Append | UncachedForward))
        return len(self.steps), tokens + sum(s.new * len(s.counts) for s in self.steps if isinstance(s, Generate))

    def to_json(self) -> dict[str, Any]:
        return {"config": self.config.to_json(), "steps": [step_to_json(step) for step in self.steps]}

    @classmethod
    def from_json(cls, data: object, at: str = "program") -> Program:
        known = take(data, at, {"config", "steps"})
        if missing := [name for name in ("config", "steps") if name not in known]:
            raise SpecError(f"{at}.{missing[0]}", "is missing")
        config = Config.from_json(known["config"], f"{at}.config")
        return cls(config, tuple(step_from_json(s, f"{at}.steps[{i}]") for i, s in enumerate(known["steps"])))


def step_to_json(step: Step) -> dict[str, Any]:
    """A step as JSON, without the fields that have their default."""
    body = {f.name: getattr(step, f.name) for f in fields(step) if getattr(step, f.name) != f.default}
    if isinstance(step, Reject):
        body["step"] = step_to_json(step.step)
    return {"op": NAMES[type(step)], **body}


def step_from_json(data: object, at: str) -> Step:
    if not isinstance(data, dict):
        raise SpecError(at, f"want an object, got {type(data).__name__}")
    op = data.get("op")
    if op not in OPS:
        raise SpecError(f"{at}.op", f"unknown op {op!r}; known: {', '.join(sorted(OPS))}")
    kind = OPS[op]
    body = take({key: value for key, value in data.items() if key != "op"}, at, {f.name for f in fields(kind)})
    try:
        if kind is Reject:
            inner = step_from_json(body.get("step"), f"{at}.step")
            if not isinstance(inner, Append | Truncate | Reorder):
                raise SpecError(f"{at}.step", f"want append, truncate or reorder, got {NAMES[type(inner)]}")
            return Reject(inner, str(body.get("wrong", "")))
        step: Step = kind(**{key: _tuples(value) for key, value in body.items()})
    except TypeError as error:
        raise SpecError(at, f"{op} wants the fields {', '.join(f.name for f in fields(kind))}") from error
    return step


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check(config: Config, lengths: Lengths, step: Step, at: str) -> None:
    """Raises SpecError if the step is not legal, or if a reject step holds a call that is legal or cannot be made."""
    problem = _problem(config, lengths, called(step))
    if not isinstance(step, Reject):
        if problem is not None:
            raise SpecError(f"{at}.{problem[0]}", problem[1])
        return
    call, rows = step.step, lengths.of(step.step.seq)
    if step.wrong:
        known = MALFORMED[config.profile]
        if step.wrong not in known or not isinstance(call, Append):
            raise SpecError(f"{at}.wrong", f"unknown value {step.wrong!r} for an append; known: {', '.join(known)}")
        if problem is not None:
            raise SpecError(f"{at}.step.{problem[0]}", f"{problem[1]}; a malformed append is otherwise legal")
    elif problem is None:
        raise SpecError(f"{at}.step", "is legal; a reject step holds a call that must be refused")
    elif isinstance(call, Append):
        if rows and len(rows) != len(call.counts):
            raise SpecError(f"{at}.step.counts", f"{problem[1]}; a rejected append exceeds the capacity")
    elif not rows:
        raise SpecError(f"{at}.step.seq", problem[1])


def _problem(config: Config, lengths: Lengths, step: Call) -> tuple[str, str] | None:
    """The field of a step that is wrong, and what is wrong with it; None if the step is legal."""
    if isinstance(step, Append | UncachedForward):
        return _problem_of_run(config, lengths, step)
    old = lengths.of(step.seq)
    if not old:
        return "seq", f"no open sequence {step.seq!r}; open: {', '.join(sorted(lengths.rows)) or 'none'}"
    match step:
        case Truncate(length=length) if not 0 <= length <= min(old):
            return "length", f"cannot keep {length} of {min(old)} tokens"
        case Fork(into=into) | AliasHandle(into=into) if into in lengths.rows:
            return "into", f"sequence {into!r} is already open"
        case Reorder(rows=rows) if not rows or not all(0 <= row < len(old) for row in rows):
            return "rows", f"want rows of 0..{len(old) - 1}, got {list(rows)}"
        case Poison(keys=keys, values=values) if keys not in POISONS or values not in POISONS:
            return "keys", f"unknown poison {keys!r} or {values!r}; known: {', '.join(POISONS)}"
    return None


def _problem_of_run(config: Config, lengths: Lengths, step: Run) -> tuple[str, str] | None:
    if not step.counts or min(step.counts) < 0 or max(step.counts) < 1:
        return "counts", f"want at least one row and one token, got {list(step.counts)}"
    old = lengths.of(step.seq) if isinstance(step, Append) else ()
    if old and len(old) != len(step.counts):
        return "counts", f"{len(step.counts)} rows for sequence {step.seq!r} of {len(old)} rows"
    grown = lengths.after(step)
    if max(grown) > config.capacity:
        return "counts", f"length {max(grown)} exceeds the capacity of {config.capacity}"
    for seed in (step.seed, *(seed for _row, _position, seed in step.substitutions)):
        if not 0 <= seed <= MAX_SEED:
            return "seed", f"want a seed of 0..{MAX_SEED}, got {seed}"
    if step.distribution not in DISTRIBUTIONS:
        return "distribution", f"unknown value {step.distribution!r}; known: {', '.join(DISTRIBUTIONS)}"
    nan_rows = step.nan if isinstance(step, Append) else ()
    if config.profile == "decoder" and (nan_rows or step.distribution == "nan"):
        return "nan" if nan_rows else "distribution", "token ids cannot be NaN"
    if not set(nan_rows) <= set(range(len(grown))):
        return "nan", f"want rows of 0..{len(grown) - 1}, got {list(nan_rows)}"
    places = [("substitutions", row, position) for row, position, _seed in step.substitutions]
    places += [("masked", *place) for place in step.masked] if isinstance(step, Append) else []
    for name, row, position in places:
        if not 0 <= row < len(grown) or not 0 <= position < grown[row]:
            return name, f"no token at row {row}, position {position}"
    match step:
        case Generate(last_only=True):
            return "last_only", "a generation gives tokens, and has no last position"
        case _ if step.last_only and config.profile == "attention":
            return "last_only", "the attention profile gives an output for each token"
        case _ if step.last_only and len(set(step.counts)) > 1:
            return "last_only", f"want equal counts, got {list(step.counts)}"
        case Generate() if config.profile != "decoder":
            return "op", "only the decoder profile generates tokens"
        case Generate() if len(set(step.counts)) > 1:
            return "counts", f"want prompts of one length, got {list(step.counts)}"
        case Generate(counts=(count, *_), new=new) if not 1 <= new <= config.capacity - count:
            return (
                "new",
                f"want 1 to {config.capacity - count} new tokens after {count} of {config.capacity}, got {new}",
            )
        case Append() if (step.masked or step.needle) and config.profile != "attention":
            return "masked" if step.masked else "needle", "only the attention profile has it"
        case Append(pad=(side, _)) if side not in ("right", "left"):
            return "pad", f"unknown side {side!r}; known: right, left"
        case Append(layout=layout) if layout not in LAYOUTS:
            return "layout", f"unknown value {layout!r}; known: {', '.join(LAYOUTS)}"
    return None
