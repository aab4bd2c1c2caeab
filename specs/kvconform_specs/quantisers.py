"""How a cache quantises keys and values, as a backend claims it (``Claims.quantiser``)."""

from __future__ import annotations

from dataclasses import dataclass

from kvconform_specs.errors import SpecError

SCHEMES = ("integer", "float8_e4m3", "float8_e5m2")
AXES = ("token", "channel")
ZERO_POINTS = ("none", "minimum", "integer")


@dataclass(frozen=True, slots=True)
class Quantiser:
    """What numbers share a scale, and how they are coded.

    scheme: ``integer``: of ``Claims.kv_bits`` bits; ``float8_e4m3``, ``float8_e5m2``: 8-bit floats (Micikevicius et al.
    2022, 2209.05433; e4m3 without infinities), the scale such that the largest magnitude becomes the largest number.
    keys, values: what a scale belongs to, within one head: ``token``: ``group`` neighbouring numbers of one token
    (None: all ``d``; the last group may be smaller); ``channel``: one number of ``group`` consecutive tokens, counted
    from the first token of the row. Tokens of a group that is not full are exact (KIVI, Liu et al. 2024, 2402.02750,
    for keys).
    zero_point: ``none``: codes are symmetric, the scale is the largest magnitude; ``minimum``: codes count from the
    smallest number, which is stored; ``integer``: from a code that stands for zero (integers only).
    """

    scheme: str = "integer"
    keys: str = "token"
    values: str = "token"
    group: int | None = None
    zero_point: str = "none"

    def __post_init__(self) -> None:
        closed = (("scheme", SCHEMES), ("keys", AXES), ("values", AXES), ("zero_point", ZERO_POINTS))
        for name, known in closed:
            if getattr(self, name) not in known:
                raise SpecError(
                    f"quantiser.{name}", f"unknown value {getattr(self, name)!r}; known: {', '.join(known)}"
                )
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise SpecError("quantiser.group", f"want a positive integer or None, got {self.group!r}")
        if self.by_channel and self.group is None:
            raise SpecError("quantiser.group", "a scale of a channel belongs to a number of tokens, got None")
        if self.zero_point != "none" and self.scheme != "integer":
            raise SpecError("quantiser.zero_point", f"{self.scheme} has none, got {self.zero_point!r}")

    @property
    def multiples(self) -> bool:
        """Whether numbers are integers times a scale that belongs to numbers of one token."""
        return self.scheme == "integer" and self.zero_point == "none" and not self.by_channel

    @property
    def by_channel(self) -> bool:
        return "channel" in (self.keys, self.values)


PLAIN = Quantiser()
"""One scale for each token and head, symmetric integers."""
