"""Claims that several tests draw programs for."""

from __future__ import annotations

from kvconform_specs.claims import ABILITIES, Claims

EVERYTHING = Claims(
    profiles=("attention", "decoder"),
    abilities=tuple(ABILITIES),
    overflow="refused",
    padding=("right", "left"),
    unused_slots="any",
    page=4,
    max_graphs=9,
    kv_bits=8,
    residual=4,
)
