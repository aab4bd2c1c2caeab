"""What lies beside an ONNX decoder: the file in a folder that is the decoder, and sizes that its graph does not tell.

Exporters write a configuration beside the graph: ONNX Runtime GenAI's builder ``genai_config.json``, transformers'
exporter ``export.json`` and ``config.json``, Optimum ``config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvconform.errors import BackendUnavailable

GENAI, EXPORTED, MODEL = "genai_config.json", "export.json", "config.json"
NAMES = ("decoder_model_merged.onnx", "decoder_with_past_model.onnx", "model.onnx", "decoder.onnx")
"""Names of a decoder that takes a past, the one to prefer first."""
FOLDERS = (".", "onnx")
"""Where in a folder exporters, and repositories of models, put the graphs."""


@dataclass(frozen=True)
class Settings:
    """Sizes that a graph may not contain, None where they are not known. source: the file that tells them."""

    head_dim: int | None = None
    window: int | None = None
    source: str = ""


def beside(path: Path) -> Settings:
    """What is written beside a graph, or in the folder above it."""
    for folder in (path.parent, path.parent.parent):
        genai = _read(folder / GENAI)
        if genai:
            decoder = _section(_section(genai, "model"), "decoder")
            window = _integer(_section(decoder, "sliding_window"), "window_size")
            return Settings(_integer(decoder, "head_size"), window, GENAI)
        config = _read(folder / MODEL)
        if config:
            text = _section(config, "text_config") or config
            heads, width = _integer(text, "num_attention_heads"), _integer(text, "hidden_size")
            derived = width // heads if heads and width else None
            return Settings(_integer(text, "head_dim") or derived, _integer(text, "sliding_window"), MODEL)
    return Settings()


def decoder_in(folder: Path) -> Path:
    """The graph of a folder that takes a past. Raises BackendUnavailable if it is not known which one does."""
    named = _text(_section(_section(_read(folder / GENAI), "model"), "decoder"), "filename")
    parts = _section(_read(folder / EXPORTED), "components")
    exported = [file for part in parts.values() if isinstance(part, dict) and (file := _text(part, "file"))]
    names: list[str] = [named, *exported] if len(exported) == 1 else [named]
    for name in names:
        if name and (folder / name).is_file():
            return folder / name
    found = graphs_in(folder)
    known: list[Path] = [path for name in NAMES for path in found if path.name == name]
    if known or len(found) == 1:
        path: Path = (known or found)[0]
        return path
    if not found and (folder / MODEL).is_file():
        raise BackendUnavailable(f"{folder} holds no ONNX file; a directory of transformers is hf:{folder}")
    files = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
    raise BackendUnavailable(
        f"{folder}: it is not known which file is the decoder; name it; files: {files}; known names: {', '.join(NAMES)}"
    )


def graphs_in(folder: Path) -> list[Path]:
    """The ONNX files of a folder, those of its folder ``onnx`` last."""
    return [path for inner in FOLDERS for path in sorted((folder / inner).glob("*.onnx"))]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _integer(settings: Mapping[str, Any], name: str) -> int | None:
    found = settings.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def _text(settings: Mapping[str, Any], name: str) -> str:
    found = settings.get(name)
    return found if isinstance(found, str) else ""
