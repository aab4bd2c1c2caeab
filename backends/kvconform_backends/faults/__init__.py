"""The fault zoo: backends that are wrong on purpose, each modelled on a real bug.

A clause that none of them breaks is not finished. Importing this package imports no framework: the published torch
listings are named here by their address.
"""

from __future__ import annotations

from kvconform_backends.faults import causality, definition, equivalence, lifecycle, shape
from kvconform_backends.faults.planted import GITHUB, MARKER, Fault, faults_of

__all__ = ["CONTROLS", "FAULTS", "MARKER", "Fault"]

PUBLISHED = (
    Fault(
        "published-first-listing",
        "kvconform_backends.faults.published:FirstListing",
        ("causality.past-seen", "equivalence.decode"),
        GITHUB + "pytorch/pytorch/issues/108108",
        "A published notebook asks torch for is_causal=True always: each decode step sees the first key alone.",
        configs=("attention-gqa", "decoder-rope"),
    ),
    Fault(
        "published-second-listing",
        "kvconform_backends.faults.published:SecondListing",
        ("causality.future-blind", "equivalence.chunks"),
        GITHUB + "QwenLM/Qwen/issues/979",
        "A published notebook asks torch for is_causal=(past_kv is None): a chunk on a cache sees its own future.",
        stealth=True,
        configs=("attention-gqa", "decoder-rope"),
    ),
)

FAULTS: tuple[Fault, ...] = (
    *(fault for module in (shape, causality, equivalence, definition, lifecycle) for fault in faults_of(module)),
    *PUBLISHED,
)
CONTROLS = tuple(f"kvconform_backends.faults.controls:{name}" for name in ("RopeFromSeven", "NewestFirst", "Static"))
"""Equivalent mutants: backends that look wrong and are right."""
