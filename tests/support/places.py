"""Where things are in the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
SUPPORT = Path(__file__).parent
"""Modules that tests load by path or import by name."""
