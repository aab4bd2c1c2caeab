"""Opens engines by name and by URL: the entry points of ``kvconform.engines``.

An engine that is started here serves the target, or a tiny model (``tiny_models``; option ``model``) where none is
given. Other options are the arguments of its class.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvconform.errors import BadArgument
from kvconform.serving.engine import Engine
from kvconform.serving.registry import of_directory
from kvconform_backends.servers import llama_cpp, openai, sglang
from kvconform_backends.servers.http import Client
from kvconform_backends.servers.tiny_models import MODELS, write_gguf, write_hf

Options = Mapping[str, Any]
AT_URL: dict[str, Callable[..., Engine]] = {
    "llama.cpp": llama_cpp.LlamaCpp,
    "sglang": sglang.SGLang,
    "vllm": openai.OpenAI,
    "mlx-lm": openai.OpenAI,
    "openai": openai.OpenAI,
}
"""The adapter to a server, by what serves."""


def discover(url: str) -> str:
    """What serves at a URL; ``openai`` where it does not tell. Raises ConnectionError."""
    client = Client(url)
    if "total_slots" in (client.json("/props") or {}):
        return "llama.cpp"
    return "sglang" if "max_total_num_tokens" in (client.json("/get_server_info") or {}) else "openai"


def open_url(target: str, options: Options) -> Engine:
    """The server at a URL. Option ``engine``: what serves there, if it does not tell. Raises BadArgument."""
    options = dict(options)
    name = options.pop("engine", "") or discover(target)
    if name not in AT_URL:
        raise BadArgument("engine", name, AT_URL)
    return _opened(AT_URL[name], target, options)


def open_llama_cpp(target: str, options: Options) -> Engine:
    """llama.cpp's server with a GGUF file."""
    return _started(llama_cpp.Started, target, options, gguf=True)


def open_vllm(target: str, options: Options) -> Engine:
    """vLLM in this process with a HF directory."""
    from kvconform_backends.servers.vllm import Vllm

    return _started(Vllm, target, options)


def open_mlx_lm(target: str, options: Options) -> Engine:
    """mlx-lm's server with a HF directory, and a second one without a prompt cache."""
    from kvconform_backends.servers.mlx_lm import MlxLm

    return _started(MlxLm, target, options)


def open_openvino(target: str, options: Options) -> Engine:
    """OpenVINO GenAI in this process with a GGUF file of float16 matrices."""
    from kvconform_backends.servers.openvino_genai import OpenVino

    return _started(OpenVino, target, options, gguf=True, dtype="float16")


def open_transformers(target: str, options: Options) -> Engine:
    """Continuous batching of transformers in this process with a HF directory."""
    from kvconform_backends.servers.transformers_cb import Batching

    return _started(Batching, target, options)


def _started(
    kind: Callable[..., Engine], target: str, options: Options, gguf: bool = False, dtype: str = "float32"
) -> Engine:
    options = dict(options)
    name = options.pop("model", "llama")
    directory: Path | None = None  # the same weights for transformers
    comparable = all(find_spec(package) for package in ("transformers", "torch"))
    if target:
        path = Path(target)
        directory = path if path.is_dir() else None
    elif name not in (known := [one for one in MODELS if not gguf or MODELS[one].window is None]):
        raise BadArgument("model", name, known)
    else:
        folder = Path(tempfile.mkdtemp(prefix="kvconform-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        if not gguf or comparable:
            directory = write_hf(MODELS[name], folder / name, dtype)
        path = write_gguf(MODELS[name], folder / f"{name}.gguf", dtype) if gguf else folder / name
    engine = _opened(kind, path, options)
    if directory is not None and comparable:
        engine.weights = of_directory(directory)
    return engine


def _opened(kind: Callable[..., Engine], target: str | Path, options: Options) -> Engine:
    try:
        return kind(target, **options)
    except TypeError as error:  # an option that the class does not have
        if "argument" not in str(error):
            raise
        raise BadArgument("option", ", ".join(options), sentence=f"{target}: {error}") from error
