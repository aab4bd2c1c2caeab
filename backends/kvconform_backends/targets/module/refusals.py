"""A target that no known convention fits, and the convention that its names suggest."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvconform.errors import BackendUnavailable
from kvconform_backends.targets.module import signature
from kvconform_backends.targets.module.signature import ForwardSignature, written


class Unrecognised(BackendUnavailable):
    """No known convention matches; the message says what was found. line: fields of a convention to begin with."""

    def __init__(self, sentence: str, line: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(sentence)
        self.line = line


def guess(sig: ForwardSignature) -> dict[str, str]:
    """Fields of a convention as the names of a signature suggest them; ``...`` stands for what is not known."""
    given = dict.fromkeys(sig.pasts[:1], "past") | dict.fromkeys(sig.flags, "True")
    given |= {name: signature.concrete(signature.position_forms(sig, name)[0], {}) for name in sig.positions}
    given |= dict.fromkeys(sig.unknown_required, "...")
    if sig.pasts:
        return {"call": written(sig, given), "output": "out[0]", "present": "out[1]", "empty": "None"}
    return {"call": written(sig, given), "output": "out"}
