"""Adapters to engines of others: those that are installed are right on one config, and each is small.

``nox -s "conformance(NAME)"`` judges one of them wholly, in an environment of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import ROOT

from kvconform.errors import Unavailable
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.search.cell import Cell, run_cell
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.registry import installed
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import CONFIGS

PLACE = ROOT / "backends" / "kvconform_backends" / "engines"
ENGINES = sorted(name for name, point in installed().items() if ".engines." in point.value)
NEEDS = {
    **dict.fromkeys(("flax", "jax", "openvino"), None),
    **dict.fromkeys(("mlx", "mlx-batch", "mlx-batch-rotating", "mlx-rotating"), "mlx_lm"),
    **{"keras-hub": "keras_hub", "onnx-reference": "onnx", "ort-attention": "onnxruntime", "ort-gqa": "onnxruntime"},
    **dict.fromkeys(("flex", "flex-compiled", "sdpa-efficient", "sdpa-flash", "sdpa-math"), "torch"),
}
"""The package that each engine cannot be without, where it is not of the same name."""
CLAUSES = ("definition.attention", "equivalence.chunks", "lifecycle.truncate", "capacity.overflow", "batch.ragged")
BRIEF = Effort("brief", 3, 2, 60.0)
HERE = {name for name in ENGINES if find_spec(NEEDS[name] or name)}


def test_every_engine_is_announced_and_small() -> None:
    assert set(NEEDS) == set(ENGINES)
    files = [file for file in PLACE.glob("*.py") if file.stem not in ("__init__", "operator")]
    assert {re.sub(r":.*", "", installed()[name].value).rpartition(".")[2] for name in ENGINES} <= {
        f.stem for f in files
    }
    assert [file.name for file in files if len(file.read_text().splitlines()) > 60] == []


def test_the_torch_of_an_engine_is_its_own() -> None:
    """An engine that is not torch's is imported without it."""
    for file in PLACE.glob("*.py"):
        imports = re.findall(r"^(?:import|from) (\S+)", file.read_text(), re.MULTILINE)
        assert file.stem in ("flex", "sdpa") or not [name for name in imports if "torch" in name.split(".")], file.name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HERE - {"flex-compiled", "sdpa-efficient"}))
@pytest.mark.parametrize(
    "config",
    ["attention-mha", *(pytest.param(name, marks=pytest.mark.slow) for name in ("attention-gqa", "attention-window"))],
)
def test_an_installed_engine_is_right(name: str, config: str, tmp_path: Path) -> None:
    verdicts = dict(_judged(name, config, tmp_path))
    outcomes = {clause: verdict.outcome for clause, verdict in verdicts.items()}
    assert set(outcomes.values()) <= {Outcome.PASS, Outcome.UNSUPPORTED}, outcomes
    if verdicts["definition.attention"].reason is not Reason.REFUSED:
        assert outcomes["definition.attention"] is Outcome.PASS


def _judged(name: str, config: str, folder: Path) -> Iterator[tuple[str, Verdict]]:
    with WorkerClient(WorkerSpec(name)) as client:
        for clause in CLAUSES:
            yield clause, run_cell(Cell(BY_NAME[clause], CONFIGS[config], config), client, BRIEF, 0, folder)


@pytest.mark.skipif("sdpa-efficient" not in HERE, reason="torch is not installed")
def test_a_kernel_that_this_machine_lacks_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="has no kernel efficient_attention here"):
        dict(_judged("sdpa-efficient", "attention-gqa", tmp_path))


@pytest.mark.parametrize("name", sorted(set(ENGINES) - HERE))
def test_an_engine_that_is_absent_is_named_with_its_extra(name: str) -> None:
    extra = "mlx" if name.startswith("mlx") else name
    with pytest.raises(Unavailable, match=rf"backend '{name}' is not installed: it needs .*kvconform\[{extra}\]"):
        WorkerClient(WorkerSpec(name))
