"""How a sequence starts: candidates for an empty past, or for the call that empties a module owning its cache."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from kvconform_backends.targets.module import identifiers
from kvconform_backends.targets.module.recognised import CAPACITY, ProbedTarget
from kvconform_backends.targets.module.signature import ForwardSignature


class Beginnings:
    """Candidates, the likeliest first. ``overrides``: fields of the convention given by the user."""

    def __init__(self, target: ProbedTarget, signature: ForwardSignature, overrides: Mapping[str, Any]) -> None:
        self.target, self.sig, self.overrides = target, signature, overrides

    def empties(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Expressions for an empty past, and the names from the target's file that they use."""
        sig = self.sig
        if "empty" in self.overrides:
            yield self.overrides["empty"], tuple(self.overrides.get("imports", ()))
            return
        if len(sig.pasts) > 1:
            yield f"({', '.join(['None'] * len(sig.pasts))})", ()
            return
        default = sig.default(sig.pasts[0]) if sig.pasts else None
        yield (repr(default) if default in ((), [], {}) else "None"), ()
        yield from self._made()
        count = self.layers()
        yield from ((text, ()) for text in ("[]", "{}", "()", f"[None] * {count}", f"[[] for _ in range({count})]"))

    def _made(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Pasts created by a method of the module, or by a function or class of its file."""
        module, names = self.target.module, self.target.namespace
        for name in identifiers.MAKERS:
            if callable(getattr(module, name, None)):
                yield from ((text, ()) for text in self._filled(f"module.{name}", getattr(module, name)))
            if callable(names.get(name)):
                yield from ((text, (name,)) for text in self._filled(name, names[name]))
        noted = self.sig.annotation(self.sig.pasts[0]) if self.sig.pasts else ""
        meant = set(re.findall(r"\w+", noted))
        classes = [
            n
            for n, v in names.items()
            if isinstance(v, type) and not isinstance(module, v) and ("cache" in n.lower() or n in meant)
        ]
        for name in sorted(classes, key=lambda n: n not in meant):
            for text in self._filled(name, names[name]):
                yield text, (name,)
                yield f"[{text} for _ in range({self.layers()})]", (name,)

    def _filled(self, name: str, maker: Any) -> Iterator[str]:
        """The call of a maker, if all its required arguments have known names."""
        try:
            parameters = inspect.signature(maker).parameters.values()
        except ValueError:
            return
        given = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for known in self._arguments():
            if all(map(known.get, given)):
                yield f"{name}({', '.join(f'{key}={known[key]}' for key in given)})"

    def _arguments(self) -> Iterator[dict[str, str]]:
        """Values for a maker's arguments by name. Heads may be query heads or KV heads."""
        known = {
            **dict.fromkeys(("batch", "batch_size", "max_batch", "max_batch_size", "b", "bsz", "B"), "batch"),
            "dtype": str(self.target.dtype),
            "device": "device",
            "model": "module",
            "module": "module",
        }
        width, number = self.target.number(identifiers.WIDTHS, 0), self.target.number
        heads = number(identifiers.HEADS, 1)
        kv_heads = number(identifiers.KV_HEADS, heads)
        for group, value in (
            (identifiers.CAPACITIES, min(CAPACITY, number(identifiers.CAPACITIES, CAPACITY))),
            (identifiers.LAYERS, self.layers()),
            (identifiers.HEADS, heads),
            (identifiers.KV_HEADS, kv_heads),
            (identifiers.HEAD_DIMS, number(identifiers.HEAD_DIMS, width // heads)),
            (identifiers.WIDTHS, width),
        ):
            known |= dict.fromkeys(group, str(value) if value else "")
        for key in ("config", "cfg"):
            if hasattr(self.target.module, key):
                known |= {"config": f"module.{key}", "cfg": f"module.{key}"}
        yield known
        if kv_heads != heads:
            yield known | dict.fromkeys(identifiers.HEADS, str(kv_heads))

    def layers(self) -> int:
        module = self.target.module
        lists = (
            [len(m) for m in module.modules() if isinstance(m, nn.ModuleList)] if isinstance(module, nn.Module) else []
        )
        return self.target.number(identifiers.LAYERS, max(lists, default=1))

    def begins(self) -> list[tuple[str, tuple[str, ...]]]:
        """Calls that start a sequence in a module owning its cache, and the names from its file that they use; the
        empty call if there is no such method or function."""
        module, names = self.target.module, self.target.namespace
        found: list[tuple[str, tuple[str, ...]]] = []
        for name in identifiers.RESETS:
            if callable(getattr(module, name, None)):
                found += [(text, ()) for text in self._filled(f"module.{name}", getattr(module, name))]
            elif callable(names.get(name)):
                found += [(text, (name,)) for text in self._filled(name, names[name])]
        return found or [("", ())]
