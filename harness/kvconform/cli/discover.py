"""What in a repository could be judged: adapters, modules that take a cache, exported decoders, transformers models.

Python files are parsed and not imported.
"""

from __future__ import annotations

import ast
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE_PARAMETERS = {
    *("past", "past_kv", "past_kvs", "past_key_value", "past_key_values", "layer_past", "kv_cache", "kv_caches"),
    *("cache", "caches", "k_cache", "key_cache", "cache_position", "input_pos", "start_pos", "use_cache"),
}
"""Parameters of a ``forward`` by which a module is taken for one with a cache."""
LEFT_OUT = {"build", "dist", "node_modules", "site-packages", "tests", "test", "__pycache__"}
LARGEST = 1_000_000
"""Bytes of the largest Python file that is read: larger ones are generated."""


@dataclass(frozen=True)
class Found:
    """Something that could be judged.

    address: as for ``--backend``. lacking: what its constructor must be given, so that the address is not whole.
    extra: the extra of kvconform that it needs; empty for none.
    """

    address: str
    lacking: tuple[str, ...] = ()
    extra: str = ""


def discover(folder: Path) -> list[Found]:
    """What is found below a folder: adapters first, then modules, ONNX files and models of transformers."""
    files = list(_files(folder))
    adapters: list[Found] = []
    modules: list[Found] = []
    for file in files:
        if file.suffix == ".py" and not file.name.startswith("test_") and file.stat().st_size < LARGEST:
            for found in _in_python(file, folder):
                (modules if found.address.startswith("py:") else adapters).append(found)
    decoders = [Found(f"onnx:{_name(f, folder)}", extra="onnx") for f in files if f.suffix == ".onnx" and _has_past(f)]
    models = [one for f in files if f.name == "config.json" for one in _transformers(f, folder)]
    return [*adapters, *modules, *decoders, *models]


def _files(folder: Path) -> Iterator[Path]:
    """Below a folder, without hidden folders, environments, builds and tests."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if name not in LEFT_OUT and name[0] != "." and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(names) if (here / name).is_file())


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _in_python(file: Path, folder: Path) -> Iterator[Found]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    extra = "torch" if _imports(tree, "torch") else ""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name[0] == "_":
            continue
        place = f"{_module(file, folder)}:{node.name}"
        if _is_adapter(node):
            yield Found(place, extra=extra)
        elif any(_last(base).endswith("Module") for base in node.bases) and _takes_cache(node):
            yield Found(f"py:{place}", _required(node), "torch")


def _module(file: Path, folder: Path) -> str:
    """A file as it is addressed: by the name of its module if it is in a package, where imports may be relative."""
    if not (file.parent / "__init__.py").exists():
        return _name(file, folder)
    parts = [file.stem]
    for parent in file.parents:
        if not (parent / "__init__.py").exists():
            break
        parts.insert(0, parent.name)
    return ".".join(parts)


def _imports(tree: ast.Module, name: str) -> bool:
    for node in ast.walk(tree):
        named = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        named += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(one.partition(".")[0] == name for one in named):
            return True
    return False


def _is_adapter(node: ast.ClassDef) -> bool:
    """Whether a class has the attribute and the methods of a backend, or one of its own and a base class with them."""
    claims = any(
        isinstance(one, ast.Assign | ast.AnnAssign)
        and one.value is not None
        and "claims" in [getattr(t, "id", "") for t in (one.targets if isinstance(one, ast.Assign) else [one.target])]
        for one in node.body
    )
    methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
    of_ours = any(_last(base) in ("Backend", "BlackBox") for base in node.bases)
    return (claims or of_ours) and bool(methods & {"step", "generate"})


def _last(node: ast.expr) -> str:
    """``Module`` of ``nn.Module``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _method(node: ast.ClassDef, name: str) -> ast.arguments | None:
    return next((one.args for one in node.body if isinstance(one, ast.FunctionDef) and one.name == name), None)


def _takes_cache(node: ast.ClassDef) -> bool:
    found = _method(node, "forward")
    return found is not None and any(
        one.arg in CACHE_PARAMETERS for one in (*found.posonlyargs, *found.args, *found.kwonlyargs)
    )


def _required(node: ast.ClassDef) -> tuple[str, ...]:
    """The parameters of the constructor without a default."""
    found = _method(node, "__init__")
    if found is None:
        return ()
    positional = [one.arg for one in (*found.posonlyargs, *found.args)][1:]
    required = positional[: max(len(positional) - len(found.defaults), 0)]
    named = [one.arg for one, value in zip(found.kwonlyargs, found.kw_defaults, strict=True) if value is None]
    return (*required, *named)


def _has_past(file: Path) -> bool:
    """Whether an ONNX file names an input after the cache."""
    if not file.stat().st_size:
        return False
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"past_key_values.") >= 0


def _transformers(file: Path, folder: Path) -> Iterator[Found]:
    """A folder of a causal language model, for each kind of cache."""
    try:
        config = json.loads(file.read_bytes())
    except ValueError:
        return
    if isinstance(config, dict) and "model_type" in config and _generates(config):
        for cache in ("dynamic", "static"):
            options = json.dumps({"cache": cache}, separators=(",", ":"))
            yield Found(f"hf:{_name(file.parent, folder)}?{options}", extra="hf")


def _generates(config: dict[str, Any]) -> bool:
    """Whether it is the config of a causal language model, by its architectures; by its vocabulary if none is named."""
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return any(str(one).endswith(("ForCausalLM", "LMHeadModel")) for one in named)
    return "vocab_size" in config
