"""Abilities that the shipped backends share."""

from __future__ import annotations

from kvconform_specs.claims import Claims

BASIC = ("uncached_forward", "length", "free_slots", "fork", "reorder", "reset", "contents", "refusal")


def without(claims: Claims, *abilities: str) -> tuple[str, ...]:
    """The claimed abilities except some."""
    return tuple(ability for ability in claims.abilities if ability not in abilities)
