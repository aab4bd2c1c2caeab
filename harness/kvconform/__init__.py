"""kvconform: conformance of KV-cache attention. A KV cache must be unobservable.

``__all__`` is the public API. Each name is loaded on first use: importing this package imports no framework, and a
worker needs only numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvconform.api import conformance as conformance
    from kvconform.backend import Backend as Backend
    from kvconform.backend import BlackBox as BlackBox
    from kvconform.errors import BackendLost as BackendLost
    from kvconform.errors import BackendUnavailable as BackendUnavailable
    from kvconform.errors import BadArgument as BadArgument
    from kvconform.errors import GpuBusy as GpuBusy
    from kvconform.errors import InvalidBackend as InvalidBackend
    from kvconform.errors import KvconformError as KvconformError
    from kvconform.errors import SpecError as SpecError
    from kvconform.errors import StaleEntry as StaleEntry
    from kvconform.errors import Unavailable as Unavailable
    from kvconform.errors import UnknownClause as UnknownClause
    from kvconform.errors import WorkerDied as WorkerDied
    from kvconform.errors import WorkerTimeout as WorkerTimeout
    from kvconform.judging.mismatch import Mismatch as Mismatch
    from kvconform.judging.verdict import Outcome as Outcome
    from kvconform.judging.verdict import Verdict as Verdict
    from kvconform.results.results import Results as Results
    from kvconform_specs.claims import Claims as Claims
    from kvconform_specs.config import Config as Config

_MODULES = {
    "kvconform.api": ("conformance",),
    "kvconform.backend": ("Backend", "BlackBox"),
    "kvconform.errors": (
        "BackendLost",
        "BackendUnavailable",
        "BadArgument",
        "GpuBusy",
        "InvalidBackend",
        "KvconformError",
        "SpecError",
        "StaleEntry",
        "Unavailable",
        "UnknownClause",
        "WorkerDied",
        "WorkerTimeout",
    ),
    "kvconform.judging.mismatch": ("Mismatch",),
    "kvconform.judging.verdict": ("Outcome", "Verdict"),
    "kvconform.results.results": ("Results",),
    "kvconform_specs.claims": ("Claims",),
    "kvconform_specs.config": ("Config",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'kvconform' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
