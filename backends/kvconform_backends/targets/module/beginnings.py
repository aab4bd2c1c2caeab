"""How a sequence begins: what an empty past is, or what empties a module that owns its cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from kvconform_backends.targets.module import conventions
from kvconform_backends.targets.module.conventions import Signature
from kvconform_backends.targets.module.recognised import CAPACITY, Target


class Beginnings:
    """Candidates, the likeliest first. ``overrides``: fields of the convention that a person gives."""

    def __init__(self, target: Target, signature: Signature, overrides: Mapping[str, Any]) -> None:
        self.target, self.sig, self.overrides = target, signature, overrides

    def empties(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Expressions for an empty past, and the names beside the target that they use."""
        sig = self.sig
        if "empty" in self.overrides:
            yield self.overrides["empty"], tuple(self.overrides.get("imports", ()))
            return
        if len(sig.pasts) > 1:
            yield f"({', '.join(['None'] * len(sig.pasts))})", ()
            return
        default = sig.default(sig.pasts[0])
        yield (repr(default) if default in ((), [], {}) else "None"), ()
        yield from self._made()
        count = self.layers()
        yield from ((text, ()) for text in ("[]", "{}", "()", f"[None] * {count}", f"[[] for _ in range({count})]"))

    def _made(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Pasts that a method of the module, a function of its file, or a class of its file makes."""
        module, names = self.target.module, self.target.namespace
        for name in conventions.MAKERS:
            if callable(getattr(module, name, None)):
                yield from ((text, ()) for text in self._filled(f"module.{name}", getattr(module, name)))
            if callable(names.get(name)):
                yield from ((text, (name,)) for text in self._filled(name, names[name]))
        noted = self.sig.annotation(self.sig.pasts[0])
        classes = [
            n for n, v in names.items() if isinstance(v, type) and v is not type(module) and "cache" in n.lower()
        ]
        for name in sorted(classes, key=lambda n: n not in noted):
            for text in self._filled(name, names[name]):
                yield text, (name,)
                yield f"[{text} for _ in range({self.layers()})]", (name,)

    def _filled(self, name: str, maker: Any) -> Iterator[str]:
        """The call of a maker whose required arguments are known by their names; nothing where one is not."""
        try:
            parameters = inspect.signature(maker).parameters.values()
        except ValueError:
            return
        given = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for known in self._arguments():
            if all(map(known.get, given)):
                yield f"{name}({', '.join(f'{key}={known[key]}' for key in given)})"

    def _arguments(self) -> Iterator[dict[str, str]]:
        """What the arguments of a maker may be, by name. Heads may be those of queries or of keys."""
        known = {
            **dict.fromkeys(("batch", "batch_size", "max_batch", "max_batch_size", "b", "bsz", "B"), "batch"),
            "dtype": str(self.target.dtype),
            "device": "device",
            "model": "module",
            "module": "module",
        }
        width, number = self.target.number(conventions.WIDTHS, 0), self.target.number
        heads = number(conventions.HEADS, 1)
        kv_heads = number(conventions.KV_HEADS, heads)
        for group, value in (
            (conventions.CAPACITIES, min(CAPACITY, number(conventions.CAPACITIES, CAPACITY))),
            (conventions.LAYERS, self.layers()),
            (conventions.HEADS, heads),
            (conventions.KV_HEADS, kv_heads),
            (conventions.HEAD_DIMS, number(conventions.HEAD_DIMS, width // heads)),
            (conventions.WIDTHS, width),
        ):
            known |= dict.fromkeys(group, str(value) if value else "")
        for key in ("config", "cfg"):
            if hasattr(self.target.module, key):
                known |= {"config": f"module.{key}", "cfg": f"module.{key}"}
        yield known
        if kv_heads != heads:
            yield known | dict.fromkeys(conventions.HEADS, str(kv_heads))

    def layers(self) -> int:
        module = self.target.module
        lists = (
            [len(m) for m in module.modules() if isinstance(m, nn.ModuleList)] if isinstance(module, nn.Module) else []
        )
        return self.target.number(conventions.LAYERS, max(lists, default=1))

    def begins(self) -> list[tuple[str, tuple[str, ...]]]:
        """Ways to begin a sequence in a module that owns its cache, and the names beside the target that they use; the
        empty one where there is no method or function for it."""
        module, names = self.target.module, self.target.namespace
        found: list[tuple[str, tuple[str, ...]]] = []
        for name in conventions.RESETS:
            if callable(getattr(module, name, None)):
                found += [(text, ()) for text in self._filled(f"module.{name}", getattr(module, name))]
            elif callable(names.get(name)):
                found += [(text, (name,)) for text in self._filled(name, names[name])]
        return found or [("", ())]
