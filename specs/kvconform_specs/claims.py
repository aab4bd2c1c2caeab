"""What a backend declares before it runs. A clause that needs more than it claims is *unsupported*, never a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from kvconform_specs.config import DTYPES, PROFILES, Config
from kvconform_specs.errors import SpecError
from kvconform_specs.quantisers import PLAIN, Quantiser
from kvconform_specs.typed import take

Returns = Literal["all", "last"]
Overflow = Literal["refused", "undefined"]
Retention = Literal["all", "window"]
UnusedSlots = Literal["finite", "any"]
Memory = Literal["length", "capacity", "pages"]
TooDeep = Literal["refused", "undefined"]
RaggedAppends = Literal["any", "first"]
Interface = Literal["steps", "generation"]
SeesNothing = Literal["zeros", "finite"]
CacheDtype = Literal["", "float32", "bfloat16", "float16"]
Intermediates = Literal["single", "storage"]
Reference = Literal["definition", "self"]
Rounding = Literal["own", "shared"]
Inputs = Literal["copied", "kept"]

ABILITIES = {
    "uncached_forward": "has a cache-less forward of its own",
    "length": "reports how many tokens each row holds",
    "free_slots": "reports how many more tokens each row takes",
    "truncate": "can remove the last tokens of a sequence",
    "truncate_rows": "can remove a different number of the last tokens from each row",
    "fork": "can copy a sequence",
    "reorder": "can permute and repeat the rows of a sequence",
    "reset": "can empty a sequence and keep its handle",
    "immutable": "does not change the handle that a step was given, so that both can continue",
    "ragged": "takes rows that grow by different counts",
    "empty_append": "takes an append to an open sequence without a new token, which changes nothing",
    "mask": "takes a caller's mask, which is combined with causality and window (attention profile)",
    "contents": "gives the keys and values that it holds",
    "poison": "can fill the slots that hold no token with a number",
    "in_place": "can write the present into the memory of the past, or into other memory, as requested",
    "bytes": "reports how many bytes the keys and values of a sequence take",
    "macs": "counts the multiply-adds of a step",
    "graph_count": "counts the graphs that it compiled or captured",
    "refusal": "refuses malformed calls with an exception",
    "generate": "has a greedy generation of its own (decoder profile)",
    "last_only": "can give the last position's output only (decoder profile)",
    "contexts": "takes the number of the sequence's context with each call (decoder profile)",
}

DERIVED: dict[str, Callable[[Claims], bool]] = {
    "overflow refused": lambda claims: claims.overflow == "refused",
    "poison-safe slots": lambda claims: claims.unused_slots == "any",
    "left padding": lambda claims: "left" in claims.padding and claims.can("ragged"),
    "ragged at any time": lambda claims: claims.ragged_appends == "any" and claims.can("ragged"),
    "empty append": lambda claims: claims.can("empty_append") and claims.returns == "all",
    "limited rollback": lambda claims: claims.can("truncate") and claims.rollback_ends,
    "window retention": lambda claims: claims.retention == "window",
    "pages": lambda claims: claims.page is not None,
    "quantised cache": lambda claims: claims.kv_bits > 0,
    "lossless cache": lambda claims: claims.kv_bits == 0,
    "multiples of scales": lambda claims: claims.kv_bits > 0 and claims.quantiser.multiples,
    "residual window": lambda claims: claims.precision.by_length,
    "bound on graphs": lambda claims: claims.max_graphs is not None and claims.can("graph_count"),
    "copied inputs": lambda claims: claims.inputs == "copied",
    "two rows": lambda claims: (claims.max_batch or 2) > 1,
    "two sequences": lambda claims: (claims.max_sequences or 2) > 1,
}
"""What a clause may need besides ``abilities``; it follows from the other claims."""

ENOUGH: dict[str, dict[str, Any]] = {
    "overflow refused": {"overflow": "refused"},
    "poison-safe slots": {"unused_slots": "any"},
    "left padding": {"padding": ("right", "left"), "abilities": ("ragged",)},
    "ragged at any time": {"ragged_appends": "any", "abilities": ("ragged",)},
    "empty append": {"returns": "all", "abilities": ("empty_append",)},
    "limited rollback": {"rollback": 4, "too_deep": "refused", "abilities": ("truncate",)},
    "window retention": {"retention": "window"},
    "pages": {"page": 4},
    "quantised cache": {"kv_bits": 8},
    "lossless cache": {"kv_bits": 0},
    "multiples of scales": {"kv_bits": 8},
    "residual window": {"kv_bits": 8, "residual": 3},
    "bound on graphs": {"max_graphs": 8, "abilities": ("graph_count",)},
    "copied inputs": {"inputs": "copied"},
    "two rows": {"max_batch": None},
    "two sequences": {"max_sequences": None},
}
"""For each need of ``DERIVED`` claims from which it follows."""


MANY_OF = {
    "profiles": PROFILES,
    "abilities": tuple(ABILITIES),
    "dtypes": DTYPES,
    "devices": ("cpu", "cuda"),
    "padding": ("right", "left"),
}
ONE_OF = {
    "returns": Returns,
    "overflow": Overflow,
    "retention": Retention,
    "unused_slots": UnusedSlots,
    "memory": Memory,
    "too_deep": TooDeep,
    "ragged_appends": RaggedAppends,
    "interface": Interface,
    "sees_nothing": SeesNothing,
    "cache_dtype": CacheDtype,
    "intermediates": Intermediates,
    "reference": Reference,
    "rounding": Rounding,
    "inputs": Inputs,
}
"""The claims that are a choice, or several, of a closed list."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How an implementation computes, as far as the error bound depends on it (``bounds.py``).

    intermediates: ``single``: scores and weights are kept in float32; ``storage``: rounded to the config's dtype.
    kv_bits: keys and values are stored as integers of that many bits, with one absmax scale for each token and head;
    0: in the config's dtype. residual: the number of newest tokens of a row that are not quantised. quantiser: how the
    others are, if not so. changes_at, cache_dtype, sees_nothing: see ``Claims``.
    """

    intermediates: str = "single"
    kv_bits: int = 0
    residual: int = 0
    changes_at: tuple[int, ...] = ()
    cache_dtype: str = ""
    sees_nothing: str = "zeros"
    quantiser: Quantiser = PLAIN

    @property
    def by_length(self) -> bool:
        """Whether the error of a token depends on how many come after it."""
        return self.kv_bits > 0 and (self.residual > 0 or self.quantiser.by_channel)


@dataclass(frozen=True, slots=True)
class Claims:
    """The declaration of one backend. Clauses choose their programs by it, and check that it is true.

    max_batch, max_chunk, max_sequences: the largest batch, the longest append in tokens, the most open sequences;
    ``None`` is unlimited. static_shapes: the numbers of columns that an append may have, for a backend that compiles
    each shape: 1 and others, of which the largest is ``max_chunk``; empty: any. Programs use these only, but for
    calls that must be refused for their size and for a ragged prompt where ``ragged_appends`` is ``first``. A forward
    without a cache may have any length. returns: ``all``: an append gives an output for each new token; ``last``: for
    the last one only. overflow: the result of an append beyond the ``capacity``: ``refused`` (an exception) or
    ``undefined``. padding: the sides on which columns of ragged rows may hold no token. ragged_appends: which appends
    may be ragged: ``any``, or the ``first`` alone after a sequence was opened or reset; all rows continue alike then,
    and rows of different lengths are not truncated to one length. rollback: how many tokens truncations can undo: each
    keeps at least the largest length that the row has had since it was opened or reset, less that many; None: all of
    them. too_deep: the result of a truncation to fewer: ``refused`` (an exception) or ``undefined``. retention: the
    tokens that are kept: ``all``, or those in the ``window``: a layer with a window W holds no more tokens than 2 W,
    the longest append and the rollback. unused_slots: what slots without a token may hold without an effect: ``finite``
    numbers, or ``any``, including NaN and infinities. page: tokens in a page; None: no pages. memory: what the bytes of
    a sequence are proportional to: its ``length``, the ``capacity``, or whole ``pages``. max_graphs: the most graphs
    that the backend compiles or captures, for any program. intermediates, kv_bits, residual, quantiser: see
    ``Precision``. reference: what outputs are compared with; ``self`` is for backends whose weights the harness does
    not set. interface: ``steps``, or ``generation`` for an engine that only generates and is judged by that alone.
    cache_dtype: the dtype in which keys and values are kept, to which each is rounded once; empty: the config's.
    sees_nothing: what a query gives that sees no key: ``zeros``, or any ``finite`` number, such as the mean of the
    values. rounding: whether the last bits of an output depend on its ``own`` tokens only, or are ``shared`` with other
    tokens of the call (experts that share a matrix product); it is measured for black boxes. inputs: whether what a
    step was given is ``copied`` into the cache, so that the caller may overwrite it after the step, or ``kept`` as
    views of the caller's memory. changes_at: the numbers of tokens with which a black box's own forward gives the
    tokens before the last other outputs than with one token less (rotary factors that depend on the length); empty: its
    outputs depend on the tokens up to their own only. It is measured, too.
    """

    profiles: tuple[str, ...] = ()
    abilities: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu",)
    max_batch: int | None = None
    max_chunk: int | None = None
    max_sequences: int | None = None
    static_shapes: tuple[int, ...] = ()
    returns: Returns = "all"
    overflow: Overflow = "undefined"
    padding: tuple[str, ...] = ("right",)
    ragged_appends: RaggedAppends = "any"
    rollback: int | None = None
    too_deep: TooDeep = "undefined"
    retention: Retention = "all"
    unused_slots: UnusedSlots = "finite"
    page: int | None = None
    memory: Memory = "length"
    max_graphs: int | None = None
    intermediates: Intermediates = "single"
    kv_bits: int = 0
    residual: int = 0
    quantiser: Quantiser = PLAIN
    cache_dtype: CacheDtype = ""
    sees_nothing: SeesNothing = "zeros"
    interface: Interface = "steps"
    reference: Reference = "definition"
    rounding: Rounding = "own"
    inputs: Inputs = "copied"
    changes_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, known in MANY_OF.items():
            for value in getattr(self, name):
                _one_of(f"claims.{name}", value, known)
        for name, choice in ONE_OF.items():
            _one_of(f"claims.{name}", getattr(self, name), get_args(choice))
        for name in ("max_batch", "max_chunk", "max_sequences", "page", "max_graphs", "rollback"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SpecError(f"claims.{name}", f"want a positive integer or None, got {value!r}")
        self._check_static_shapes()
        for name in ("kv_bits", "residual"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise SpecError(f"claims.{name}", f"want an integer of at least 0, got {value!r}")
        if self.kv_bits == 1:
            raise SpecError("claims.kv_bits", "a signed integer has at least 2 bits, got 1")
        if self.quantiser != PLAIN and not self.kv_bits:
            raise SpecError("claims.quantiser", "is claimed without kv_bits: nothing is quantised")
        if self.quantiser.scheme != "integer" and self.kv_bits != 8:
            raise SpecError("claims.kv_bits", f"{self.quantiser.scheme} has 8 bits, got {self.kv_bits}")

    def _check_static_shapes(self) -> None:
        sizes = self.static_shapes
        if not sizes:
            return
        if not all(isinstance(size, int) and size > 0 for size in sizes) or 1 not in sizes:
            raise SpecError("claims.static_shapes", f"want positive integers with 1 among them, got {list(sizes)}")
        if self.max_chunk != max(sizes):
            words = f"want {max(sizes)}, the largest of claims.static_shapes, got {self.max_chunk}"
            raise SpecError("claims.max_chunk", words)

    def can(self, ability: str) -> bool:
        """Whether an ability is claimed, or a need follows from the other claims (``DERIVED``). Raises SpecError for
        any other name."""
        if ability in DERIVED:
            return DERIVED[ability](self)
        if ability not in ABILITIES:
            raise SpecError("claims", f"unknown ability {ability!r}; known: {', '.join((*ABILITIES, *DERIVED))}")
        return ability in self.abilities

    def keeps(self, mark: int) -> int:
        """The fewest tokens that a truncation may keep of a row whose largest length has been ``mark``."""
        return 0 if self.rollback is None else max(mark - self.rollback, 0)

    def longest(self, most: int) -> int:
        """The most new tokens that an append may have, if it may have no more than ``most``."""
        if self.static_shapes:
            return max((size for size in self.static_shapes if size <= most), default=0)
        return min(self.max_chunk or most, most)

    def ragged_prompt(self, counts: Sequence[int]) -> bool:
        """Whether appends of these counts must be prompts, since later ones cannot be ragged."""
        return self.ragged_appends == "first" and len(set(counts)) > 1

    def levels(self, lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths may be truncated to one length."""
        return self.ragged_appends == "any" or len(set(lengths)) < 2

    @property
    def rollback_ends(self) -> bool:
        """Whether a truncation by more than the rollback must be refused, at least if it is by far more."""
        return self.rollback is not None and (self.too_deep == "refused" or self.retention == "window")

    def refuses(self, mark: int, longest: int, window: int | None) -> int:
        """The largest length that no truncation may keep of a row whose largest length has been ``mark``, if its
        longest append was of ``longest`` tokens; below 1: none. Where ``too_deep`` is undefined it must still be
        refused for lack of the tokens that the ``window`` does not retain."""
        if not self.rollback_ends or (self.too_deep != "refused" and window is None):
            return 0
        return self.keeps(mark) - 1 - (0 if self.too_deep == "refused" else (window or 0) + longest + 1)

    @property
    def precision(self) -> Precision:
        return Precision(
            self.intermediates,
            self.kv_bits,
            self.residual,
            self.changes_at,
            self.cache_dtype,
            self.sees_nothing,
            self.quantiser,
        )

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: object, at: str = "claims") -> Claims:
        body = take(data, at, {f.name for f in fields(cls)})
        frozen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in body.items()}
        if "quantiser" in frozen:
            known = {f.name for f in fields(Quantiser)}
            frozen["quantiser"] = Quantiser(**take(frozen["quantiser"], f"{at}.quantiser", known))
        return cls(**frozen)


def changes_at(config: Config, claims: Claims | Precision) -> tuple[int, ...]:
    """The lengths at which outputs of earlier tokens change: a black box's as measured, otherwise the config's."""
    return claims.changes_at or config.changes_at


def edges(config: Config, claims: Claims) -> tuple[int, ...]:
    """Lengths around the window and its multiples, around the first at which outputs change, and the capacity."""
    w = config.window
    around = {max(w - 1, 1), w, w + 1, 2 * w, 3 * w} if w else set()
    switch = {length for first in changes_at(config, claims)[:1] for length in (first - 1, first, first + 1)}
    return (*sorted(n for n in around | switch if n < config.capacity), config.capacity)


def _one_of(at: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SpecError(at, f"unknown value {value!r}; known: {', '.join(known)}")
