"""What a backend declares before it runs. An undeclared ability is *unsupported*, never a pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from kvconform_specs.config import DTYPES, PROFILES, take
from kvconform_specs.errors import SpecError

ABILITIES = {
    "full": "has a cache-less forward of its own",
    "length": "tells how many tokens each row holds",
    "truncate": "can forget the end of a sequence",
    "fork": "can copy a sequence",
    "reorder": "can permute and repeat the rows of a sequence",
    "reset": "can empty a sequence and keep its handle",
    "ragged": "takes rows that grow by different counts",
}


@dataclass(frozen=True, slots=True)
class Claims:
    """The declaration of one backend; clauses choose their programs by it, and check that it is true.

    max_batch, max_chunk, max_sequences: largest batch, longest append, most live sequences; ``None`` is unlimited.
    returns: ``all``: an append gives an output for each new token; ``last``: for the last one only.
    overflow: what one token more than ``capacity`` does: ``refused`` (an exception) or ``undefined``.
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

    def __post_init__(self) -> None:
        for name, known in (
            ("profiles", PROFILES), ("abilities", tuple(ABILITIES)), ("dtypes", DTYPES), ("devices", ("cpu", "cuda")),
        ):  # fmt: skip
            for value in getattr(self, name):
                if value not in known:
                    raise SpecError(f"claims.{name}", f"unknown value {value!r}; known: {', '.join(known)}")
        for name, allowed in (("returns", ("all", "last")), ("overflow", ("refused", "undefined"))):
            if getattr(self, name) not in allowed:
                raise SpecError(f"claims.{name}", f"unknown value {getattr(self, name)!r}; known: {', '.join(allowed)}")
        for name in ("max_batch", "max_chunk", "max_sequences"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SpecError(f"claims.{name}", f"want a positive integer or None, got {value!r}")

    def can(self, ability: str) -> bool:
        return ability in self.abilities

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: object, at: str = "claims") -> Claims:
        body = take(data, at, {f.name for f in fields(cls)})
        frozen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in body.items()}
        return cls(**frozen)
