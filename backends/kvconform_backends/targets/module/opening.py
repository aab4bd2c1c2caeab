"""Opens targets ``py:``. A black box that does not use torch is returned as it is, and needs no torch: that is imported
only for modules and functions that are recognised by trial."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvconform.errors import BackendUnavailable, Unavailable
from kvconform.worker.registry import module_of
from kvconform_backends.targets.third_party import ThirdPartyError, guarded


def open_python(target: str, options: Mapping[str, Any]) -> Any:
    """``file.py:NAME`` or ``package.module:NAME``. Raises BackendUnavailable, or InvalidBackend for bad options."""
    file, _, name = target.rpartition(":")
    lacking = importlib.util.find_spec("torch") is None
    try:
        with guarded():
            found = _named(file, name)
    except (ThirdPartyError, BackendUnavailable) as error:
        if lacking:
            raise BackendUnavailable(f"py:{target} cannot be imported: {error}") from error
        found = None  # it is reported in more words
    if hasattr(found, "claims") and "torch" not in sys.modules:
        return found
    if lacking:
        sentence = f"py:{target} has no attribute 'claims', so that it is no black box; a module needs 'torch'"
        raise Unavailable(sentence, "install it with: pip install 'kvconform[py]'")
    from kvconform_backends.targets.module.target import open_module  # what torch draws in the file needs its seed

    return open_module(target, options)


def _named(file: str, name: str) -> Any:
    """What has that name in a file, or None."""
    if file.endswith(".py"):
        folder = str(Path(file).resolve().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)  # neighbouring files are importable, as when it is run
    found: Any = module_of(file) if file.endswith(".py") else importlib.import_module(file)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
