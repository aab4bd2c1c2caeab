"""llama.cpp's server, end to end: it conforms, and an option that is documented as lossy does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvconform.serving.engine import Answer
from kvconform_backends.servers.tiny_models import MODELS, write_hf
from kvconform_specs.serving.requests import Request

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("llama.cpp")]
ROUNDING = 1e-4  # float32: measured 3e-6; a wrong token moves answers by 0.1 and more
SMOKE = ("--effort", "smoke", "--max-seconds", "400")  # on a busy machine the default ends a run early
SERVER = """
import sys
from kvconform_backends.servers.opening import open_llama_cpp
engine = open_llama_cpp("", {})
print(engine.client.url, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def installed() -> None:
    """A skip where llama.cpp is absent, and a failure in CI."""
    missing = [name for name in ("xllamacpp", "gguf") if find_spec(name) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"never skipped in CI: no {' and no '.join(missing)}", pytrace=False)
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}")


@pytest.fixture
def url() -> Iterator[str]:
    """A server that was there before kvconform came."""
    command = (sys.executable, "-c", SERVER)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate("")


def kvconform(*words: str | Path, code: int) -> str:
    command = (sys.executable, "-m", "kvconform", *map(str, words))
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_engine_conforms_on_each_tiny_model(tmp_path: Path) -> None:
    for model in ("llama", "llama-mqa"):
        out = tmp_path / model
        address = f'llama.cpp?{{"model": "{model}"}}'
        printed = kvconform("run", "-b", address, *SMOKE, "--out", out, code=0)
        assert "conformant: serving profile" in printed
        found = read(out / "llama.cpp.json")
        assert {verdict["outcome"] for verdict in found["verdicts"]} == {"pass", "unsupported", "refuted"}
        assert found["served"]["hits"] > 50
        assert found["served"]["seen"] == found["served"]["changes"] == 24


def test_a_running_server_is_recognised_and_checked_by_its_url(tmp_path: Path, url: str) -> None:
    clause = (*SMOKE, "--out", tmp_path)
    printed = kvconform("check", f"{url}/v1", *clause, code=0)
    assert printed.startswith("llama.cpp")
    assert "conformant: serving profile" in printed


def test_reuse_of_shifted_chunks_is_seen_where_blocks_are_swapped(tmp_path: Path) -> None:
    address = 'llama.cpp?{"n_cache_reuse": 8, "slots": 1}'  # of several slots an empty one is taken
    words = ("run", "-b", address, "--effort", "smoke", "--clause", "serving.divergence", "--out", tmp_path)
    printed = kvconform(*words, code=1)
    assert "serving.divergence" in printed
    (verdict,) = read(tmp_path / "llama.cpp.json")["verdicts"]
    assert verdict["mismatch"]["kind"] in ("log-probability", "choice")
    (file,) = tmp_path.glob("failures/*/serving.divergence-*.json")
    again = kvconform("replay", file, "--script", tmp_path / "bug.py", code=1)
    assert "shows it, and exits with 1 until it is mended" in again  # the server that was started for it is still there


def test_a_window_that_the_engine_does_not_apply_is_seen_by_the_model(tmp_path: Path, url: str) -> None:
    directory = write_hf(replace(MODELS["llama"], window=24), tmp_path / "window")
    address = f'{url}/v1?{{"dtype": "float32"}}'
    words = ("--clause", "serving.rescore", "--clause", "serving.model", *SMOKE, "--out", tmp_path)
    printed = kvconform("run", "-b", address, "--model", directory, *words, code=1)
    assert "serving.model on" in printed
    assert "by the model without an engine" in printed
    found = read(next(tmp_path.glob("*.json")))
    assert {one["clause"] for one in found["verdicts"] if one["outcome"] == "fail"} == {"serving.model"}
    (file,) = tmp_path.glob("failures/*/serving.model-*.json")
    script = tmp_path / "bug.py"
    kvconform("replay", file, "--script", script, code=1)
    shown = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert shown.returncode == 1, shown.stderr
    assert "as answered and as they must be" in shown.stdout


def test_log_probabilities_are_those_of_transformers_with_the_same_weights(tmp_path: Path) -> None:
    import torch
    import transformers

    from kvconform_backends.servers.opening import open_llama_cpp

    prompt = tuple((7 * i + 3) % 256 for i in range(100))
    engine = open_llama_cpp("", {"context": 256})
    (answer,) = engine.answer([Request(prompt, 8)])
    engine.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(write_hf(MODELS["llama"], tmp_path)).eval()
    ids = answer.completions[0].ids
    with torch.no_grad():
        rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1).double().numpy()
    assert ids == tuple(rows.argmax(-1).tolist())
    assert worst(answer, rows) < ROUNDING


def worst(answer: Answer, rows: np.ndarray) -> float:
    """The largest difference to ``(tokens, vocabulary)`` log-probabilities."""
    pairs = zip(answer.completions[0].logprobs, rows, strict=True)
    return max(abs(value - row[token]) for found, row in pairs for token, value in found.items())
