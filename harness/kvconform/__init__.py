"""kvconform: conformance of KV-cache attention. A KV cache must be unobservable.

``from kvconform import conformance`` is the one importable call for other people's tests. Importing this package
imports no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Claims", "Unavailable", "conformance"]

if TYPE_CHECKING:
    from kvconform.api import conformance
    from kvconform.backend import Unavailable
    from kvconform_specs.claims import Claims


def __getattr__(name: str) -> Any:
    """Loads the public names when they are asked for: a worker needs numpy and nothing more."""
    if name == "conformance":
        from kvconform.api import conformance

        return conformance
    if name == "Unavailable":
        from kvconform.backend import Unavailable

        return Unavailable
    if name == "Claims":
        from kvconform_specs.claims import Claims

        return Claims
    raise AttributeError(f"module 'kvconform' has no attribute {name!r}")
