"""What a backend declares before it runs. An undeclared ability is *unsupported*, never a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvconform_specs.config import DTYPES, PROFILES, take
from kvconform_specs.errors import SpecError

ABILITIES = {
    "uncached_forward": "has a cache-less forward of its own",
    "length": "tells how many tokens each row holds",
    "free_slots": "tells how many more tokens each row takes",
    "truncate": "can forget the end of a sequence",
    "fork": "can copy a sequence",
    "reorder": "can permute and repeat the rows of a sequence",
    "reset": "can empty a sequence and keep its handle",
    "immutable": "leaves the handle that a step was given as it was, so that both can go on",
    "ragged": "takes rows that grow by different counts",
    "mask": "takes a mask of the caller's, which joins causality and window (attention profile)",
    "contents": "shows the keys and values that it holds",
    "poison": "can fill the slots that hold no token with a number",
    "in_place": "can write the present into the memory of the past, or into memory of its own, as it is told",
    "bytes": "tells how many bytes the keys and values of a sequence take",
    "macs": "counts the multiply-adds of a step",
    "graph_count": "counts the graphs that it compiled or captured",
    "refusal": "refuses malformed calls with an exception",
    "generate": "generates greedily on its own (decoder profile)",
    "last_only": "can give the last position's output alone (decoder profile)",
}

REFERENCES = ("definition", "self")
"""What outputs are judged by: the definition, or a black box's own cache-less forward."""

DERIVED: dict[str, Callable[[Claims], bool]] = {
    "overflow refused": lambda claims: claims.overflow == "refused",
    "poison-safe slots": lambda claims: claims.unused_slots == "any",
    "left padding": lambda claims: "left" in claims.padding and claims.can("ragged"),
    "pages": lambda claims: claims.page is not None,
    "quantised cache": lambda claims: claims.kv_bits > 0,
    "lossless cache": lambda claims: claims.kv_bits == 0,
    "residual window": lambda claims: claims.kv_bits > 0 and claims.residual > 0,
    "bound on graphs": lambda claims: claims.max_graphs is not None and claims.can("graph_count"),
    "two rows": lambda claims: (claims.max_batch or 2) > 1,
    "two sequences": lambda claims: (claims.max_sequences or 2) > 1,
}
"""What a clause may need that follows from other fields than ``abilities``."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How an implementation computes, as far as its bound depends on it (``bounds.py``).

    intermediates: ``single``: scores and weights are kept in float32; ``storage``: rounded to the config's dtype.
    kv_bits: keys and values are stored as integers of that many bits, with one absmax scale a token and head; 0: in
    the config's dtype. residual: the newest tokens of a row that are not quantised.
    """

    intermediates: str = "single"
    kv_bits: int = 0
    residual: int = 0


@dataclass(frozen=True, slots=True)
class Claims:
    """The declaration of one backend; clauses choose their programs by it, and check that it is true.

    max_batch, max_chunk, max_sequences: largest batch, longest append, most live sequences; ``None`` is unlimited.
    returns: ``all``: an append gives an output for each new token; ``last``: for the last one only.
    overflow: what one token more than ``capacity`` does: ``refused`` (an exception) or ``undefined``.
    padding: on which sides of ragged rows the columns may lie that hold no token.
    retention: ``all`` tokens, or those that the ``window`` still shows. unused_slots: what slots without a token may hold
    unnoticed: ``finite`` numbers, or ``any``, NaN and infinities included. page: tokens a page; None: no pages.
    memory: what a sequence's bytes follow: its ``length``, the ``capacity``, or whole ``pages``.
    max_graphs: most graphs that a backend compiles or captures, whatever it is asked. intermediates, kv_bits, residual:
    see ``Precision``. reference: what the outputs are judged by (``REFERENCES``); ``self`` is of backends whose weights the
    harness does not set. rounding: whether an output's last bits are its ``own`` tokens' alone, or ``shared`` with
    other tokens of the call, cached or not (experts that share a product of matrices); of black boxes it is measured.
    """

    profiles: tuple[str, ...] = ()
    abilities: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu",)
    max_batch: int | None = None
    max_chunk: int | None = None
    max_sequences: int | None = None
    returns: str = "all"
    overflow: str = "undefined"
    padding: tuple[str, ...] = ("right",)
    retention: str = "all"
    unused_slots: str = "finite"
    page: int | None = None
    memory: str = "length"
    max_graphs: int | None = None
    intermediates: str = "single"
    kv_bits: int = 0
    residual: int = 0
    reference: str = "definition"
    rounding: str = "own"

    def __post_init__(self) -> None:
        for name, known in (
            ("profiles", PROFILES),
            ("abilities", tuple(ABILITIES)),
            ("dtypes", DTYPES),
            ("devices", ("cpu", "cuda")),
            ("padding", ("right", "left")),
        ):
            for value in getattr(self, name):
                if value not in known:
                    raise SpecError(f"claims.{name}", f"unknown value {value!r}; known: {', '.join(known)}")
        for name, allowed in (
            ("returns", ("all", "last")),
            ("overflow", ("refused", "undefined")),
            ("retention", ("all", "window")),
            ("unused_slots", ("finite", "any")),
            ("memory", ("length", "capacity", "pages")),
            ("intermediates", ("single", "storage")),
            ("reference", REFERENCES),
            ("rounding", ("own", "shared")),
        ):
            if getattr(self, name) not in allowed:
                raise SpecError(f"claims.{name}", f"unknown value {getattr(self, name)!r}; known: {', '.join(allowed)}")
        for name in ("max_batch", "max_chunk", "max_sequences", "page", "max_graphs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SpecError(f"claims.{name}", f"want a positive integer or None, got {value!r}")
        for name in ("kv_bits", "residual"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise SpecError(f"claims.{name}", f"want an integer of at least 0, got {value!r}")
        if self.kv_bits == 1:
            raise SpecError("claims.kv_bits", "a signed integer has at least 2 bits, got 1")

    def can(self, ability: str) -> bool:
        """Whether an ability is claimed, or follows from the other claims (``DERIVED``). Raises SpecError for a name that
        is neither."""
        if ability in DERIVED:
            return DERIVED[ability](self)
        if ability not in ABILITIES:
            raise SpecError("claims", f"unknown ability {ability!r}; known: {', '.join((*ABILITIES, *DERIVED))}")
        return ability in self.abilities

    @property
    def precision(self) -> Precision:
        return Precision(self.intermediates, self.kv_bits, self.residual)

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: object, at: str = "claims") -> Claims:
        body = take(data, at, {f.name for f in fields(cls)})
        frozen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in body.items()}
        return cls(**frozen)
