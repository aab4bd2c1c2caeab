"""A program: a config and steps over named sequences, as frozen data.

It is printable, comparable, survives its own JSON, and holds no tensor: contents come from seeds (``tensors.py``).
A *sequence* is a batch of rows that grow together. The content of a row is a *stream*: an endless tape of tokens
that its seed names. Row ``r`` of a step with seed ``s`` reads stream ``s + r``, from the row's current length on.
So the same seed gives the same tokens however they are cut into steps, and row ``r`` alone is seed ``s + r``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvconform_specs.config import Config, take
from kvconform_specs.errors import SpecError


@dataclass(frozen=True, slots=True)
class Append:
    """Appends ``counts[r]`` new tokens to row ``r``: prefill, chunk and decode are this step with another count.

    The first append to a name opens the sequence with ``len(counts)`` rows. Unequal counts are *ragged* rows.
    substitutions: ``(row, position, seed)``: the token at that logical position of that row comes from another stream.
    needle: ``(seed, position)``: every query of the step points at that token's key (attention profile), a *needle*.
    masked: ``(row, position)``: tokens that the caller's mask hides from every query of the step (attention profile).
    pad: ``(side, seed)``: where the columns of ragged rows lie that hold no token, ``right`` or ``left``, and the
    stream that fills them; None: right, zeros. layout: how the inputs lie in memory (``LAYOUTS``). in_place: the present
    is written into the memory of the past. count_macs: the multiply-adds of the step are counted. last_only: the output of
    each row's last new token alone is asked for, of rows that grow alike (decoder profile).
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


@dataclass(frozen=True, slots=True)
class UncachedForward:
    """Runs the backend's own cache-less forward on the first ``counts[r]`` tokens of each row's stream.

    It touches no sequence; ``seq`` names the outputs, so that they compare with those of a cached sequence. last_only: the
    output of each row's last token alone is asked for, of rows of one length (decoder profile).
    """

    seq: str
    counts: tuple[int, ...]
    seed: int
    substitutions: tuple[tuple[int, int, int], ...] = ()
    last_only: bool = False


@dataclass(frozen=True, slots=True)
class Generate(UncachedForward):
    """Lets the backend generate greedily, on its own, after the first ``counts[r]`` tokens of each row's stream
    (decoder profile).

    Like ``full`` it touches no sequence; all prompts are of one length. new: how many tokens each row is to get.
    """

    new: int = 1


@dataclass(frozen=True, slots=True)
class Truncate:
    """Forgets all but the first ``length`` tokens of every row."""

    seq: str
    length: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Copies ``seq`` to the new name ``into``; both go on independently."""

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
    """Ends the sequence; its name may be opened anew."""

    seq: str


@dataclass(frozen=True, slots=True)
class AliasHandle:
    """Gives the handle of ``seq`` a second name, ``into``, without a call: both go on from it, independently."""

    seq: str
    into: str


@dataclass(frozen=True, slots=True)
class ReadCache:
    """Asks for the keys and values that the sequence holds."""

    seq: str


@dataclass(frozen=True, slots=True)
class Poison:
    """Fills the slots that hold no token of any sequence: keys and values apart, with what ``POISONS`` names."""

    seq: str
    keys: str = "none"
    values: str = "none"


@dataclass(frozen=True, slots=True)
class Reject:
    """A call that must be refused with an exception and must change nothing.

    wrong: what of the inputs of a legal append is malformed (``MALFORMED``); empty: the call itself is not legal.
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
DISTRIBUTIONS = ("normal", "large_queries", "zero_keys", "small_keys_large_values")
"""What the contents of a stream are like, in bits 48 and up of its seed: independent normals; queries 64 times as
large; all keys zero; values 16 times as large and keys a quarter. Token ids know no distribution."""
DISTRIBUTION_BIT = 48
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
"""How inputs lie in memory: dense; token axis before head axis; every other element of a larger array; one row that
all rows share with a stride of 0 (their tokens must be equal)."""
POISONS = {"none": None, "junk": 3.0e4, "nan": float("nan"), "inf": float("inf")}
"""What dead slots are filled with; junk is finite in float16, too."""
MALFORMED = {
    "attention": ("dtype", "rank", "heads", "head dim", "batch", "lengths"),
    "decoder": ("dtype", "rank", "batch", "vocabulary"),
    "hidden": ("dtype", "rank", "batch", "width"),
}
"""What can be wrong with the inputs of an append: integers for floats or floats for token ids; an axis missing; a head
more; a head dim less; a row more than the cache has; fewer values than keys; a token id that is not in the vocabulary;
a channel less.
"""
NAMES = {kind: op for op, kind in OPS.items()}


def called(step: Step) -> Call:
    """What the step calls the backend with, whether it must succeed or be refused."""
    return step.step if isinstance(step, Reject) else step


@dataclass(frozen=True, slots=True)
class Program:
    """Steps over named sequences under one config. Raises SpecError where a step is not legal."""

    config: Config
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        lengths: dict[str, tuple[int, ...]] = {}
        for index, step in enumerate(self.steps):
            _advance(self.config, lengths, step, f"steps[{index}]")

    @property
    def span(self) -> int:
        """How many positions of its streams the program can reach."""
        asked = [called(step) for step in self.steps]
        return sum(max(step.counts) for step in asked if isinstance(step, Append | UncachedForward))

    @property
    def size(self) -> tuple[int, int]:
        """Steps, then tokens: what shrinking makes smaller."""
        tokens = sum(sum(s.counts) for s in self.steps if isinstance(s, Append | UncachedForward))
        return len(self.steps), tokens + sum(s.new * len(s.counts) for s in self.steps if isinstance(s, Generate))

    def to_json(self) -> dict[str, Any]:
        return {"config": self.config.to_json(), "steps": [step_to_json(step) for step in self.steps]}

    @classmethod
    def from_json(cls, data: object, at: str = "program") -> Program:
        known = take(data, at, {"config", "steps"})
        for name in ("config", "steps"):
            if name not in known:
                raise SpecError(f"{at}.{name}", "is missing")
        config = Config.from_json(known["config"], f"{at}.config")
        return cls(config, tuple(step_from_json(s, f"{at}.steps[{i}]") for i, s in enumerate(known["steps"])))


def step_to_json(step: Step) -> dict[str, Any]:
    """Fields that have their default are left out."""
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
        step: Step
        if kind is Reject:
            inner = step_from_json(body.get("step"), f"{at}.step")
            if not isinstance(inner, Append | Truncate | Reorder):
                words = f"only append, truncate and reorder can be rejected, got {NAMES[type(inner)]}"
                raise SpecError(f"{at}.step", words)
            return Reject(inner, str(body.get("wrong", "")))
        step = kind(**{key: _tuples(value) for key, value in body.items()})
    except TypeError as error:
        raise SpecError(at, f"{op} wants the fields {', '.join(f.name for f in fields(kind))}") from error
    return step


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _advance(config: Config, lengths: dict[str, tuple[int, ...]], step: Step, at: str) -> None:
    """Follows the lengths of the rows and refuses what is not legal."""
    if isinstance(step, Reject):
        _rejectable(config, lengths, step, at)
        return
    problem = _illegal(config, lengths, step)
    if problem is not None:
        raise SpecError(f"{at}.{problem[0]}", problem[1])
    if isinstance(step, Append):
        old = lengths.get(step.seq, (0,) * len(step.counts))
        lengths[step.seq] = tuple(a + b for a, b in zip(old, step.counts, strict=True))
    elif isinstance(step, Truncate):
        lengths[step.seq] = (step.length,) * len(lengths[step.seq])
    elif isinstance(step, Fork | AliasHandle):
        lengths[step.into] = lengths[step.seq]
    elif isinstance(step, Reorder):
        lengths[step.seq] = tuple(lengths[step.seq][row] for row in step.rows)
    elif isinstance(step, Reset):
        lengths[step.seq] = (0,) * len(lengths[step.seq])
    elif isinstance(step, Close):
        del lengths[step.seq]


def _rejectable(config: Config, lengths: dict[str, tuple[int, ...]], step: Reject, at: str) -> None:
    """Refuses a reject step whose call might be accepted, or cannot be made."""
    problem = _illegal(config, lengths, step.step)
    if step.wrong:
        known = MALFORMED[config.profile]
        if step.wrong not in known or not isinstance(step.step, Append):
            raise SpecError(f"{at}.wrong", f"unknown value {step.wrong!r} for an append; known: {', '.join(known)}")
        if problem is not None:
            raise SpecError(f"{at}.step.{problem[0]}", f"{problem[1]}; a malformed append is legal but for its inputs")
        return
    if problem is None:
        raise SpecError(f"{at}.step", "is legal; a reject step holds a call that must be refused")
    rows = lengths.get(step.step.seq)
    if isinstance(step.step, Append):
        if rows is not None and len(rows) != len(step.step.counts):
            raise SpecError(f"{at}.step.counts", f"{problem[1]}; a rejected append exceeds the capacity")
    elif rows is None:
        raise SpecError(f"{at}.step.seq", problem[1])


def _illegal(config: Config, lengths: dict[str, tuple[int, ...]], step: Call) -> tuple[str, str] | None:
    """The field that is wrong and what is wrong with it, or None."""
    if isinstance(step, Append | UncachedForward):
        if not step.counts or min(step.counts) < 0 or max(step.counts) < 1:
            return "counts", f"want at least one row and one token, got {list(step.counts)}"
        old = lengths.get(step.seq) if isinstance(step, Append) else None
        if old is not None and len(old) != len(step.counts):
            return "counts", f"{len(step.counts)} rows for sequence {step.seq!r} of {len(old)} rows"
        new = [a + b for a, b in zip(old or (0,) * len(step.counts), step.counts, strict=True)]
        if max(new) > config.capacity:
            return "counts", f"length {max(new)} exceeds the capacity of {config.capacity}"
        seeds = (step.seed, *(seed for _row, _position, seed in step.substitutions))
        if not all(0 <= seed >> DISTRIBUTION_BIT < len(DISTRIBUTIONS) for seed in seeds):
            return (
                "seed",
                f"a seed's bits from {DISTRIBUTION_BIT} on name one of {len(DISTRIBUTIONS)} distributions, got {step.seed}",
            )
        for row, position, _seed in step.substitutions:
            if not 0 <= row < len(new) or not 0 <= position < new[row]:
                return "substitutions", f"no token at row {row}, position {position}"
        if step.last_only and (problem := _illegal_last(config, step)) is not None:
            return problem
        if isinstance(step, Generate):
            return _illegal_generation(config, step)
        return _illegal_options(config, new, step) if isinstance(step, Append) else None
    old = lengths.get(step.seq)
    if old is None:
        return "seq", f"no open sequence {step.seq!r}; open: {', '.join(sorted(lengths)) or 'none'}"
    if isinstance(step, Truncate) and not 0 <= step.length <= min(old):
        return "length", f"cannot keep {step.length} of {min(old)} tokens"
    if isinstance(step, Fork | AliasHandle) and step.into in lengths:
        return "into", f"sequence {step.into!r} is open already"
    if isinstance(step, Poison) and (step.keys not in POISONS or step.values not in POISONS):
        return "keys", f"unknown poison {step.keys!r} or {step.values!r}; known: {', '.join(POISONS)}"
    if isinstance(step, Reorder) and (not step.rows or not all(0 <= row < len(old) for row in step.rows)):
        return "rows", f"want rows of 0..{len(old) - 1}, got {list(step.rows)}"
    return None


def _illegal_last(config: Config, step: Run) -> tuple[str, str] | None:
    if isinstance(step, Generate):
        return "last_only", "a generation gives tokens, and has no last position"
    if config.profile == "attention":
        return "last_only", "the attention profile gives an output for each token"
    if len(set(step.counts)) > 1:
        return "last_only", f"want rows that grow alike, got {list(step.counts)}"
    return None


def _illegal_generation(config: Config, step: Generate) -> tuple[str, str] | None:
    if config.profile != "decoder":
        return "op", "only the decoder profile generates tokens"
    if len(set(step.counts)) > 1:
        return "counts", f"want prompts of one length, got {list(step.counts)}"
    if step.new < 1 or step.counts[0] + step.new > config.capacity:
        room = config.capacity - step.counts[0]
        return "new", f"want 1 to {room} new tokens after {step.counts[0]} of {config.capacity}, got {step.new}"
    return None


def _illegal_options(config: Config, new: list[int], step: Append) -> tuple[str, str] | None:
    if (step.masked or step.needle) and config.profile != "attention":
        return "masked" if step.masked else "needle", "only the attention profile has it"
    for row, position in step.masked:
        if not 0 <= row < len(new) or not 0 <= position < new[row]:
            return "masked", f"no token at row {row}, position {position}"
    if step.pad is not None and step.pad[0] not in ("right", "left"):
        return "pad", f"unknown side {step.pad[0]!r}; known: right, left"
    if step.layout not in LAYOUTS:
        return "layout", f"unknown value {step.layout!r}; known: {', '.join(LAYOUTS)}"
    return None
