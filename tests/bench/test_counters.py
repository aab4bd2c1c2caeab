"""Counts: exact, the same each time, and each planted fault is caught by the count that it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from places import ROOT

from kvconform.bench.counters import compare as counters
from kvconform.bench.counters.compare import Count, Missing, Record
from kvconform.bench.counters.record import COUNTERS, PHASES, growth
from kvconform.bench.presets import Preset
from kvconform.bench.worker.collect import LOOP, WARM, Tally
from kvconform.files import write_versioned
from kvconform.results.gate import OK, REGRESSION
from kvconform.worker.client import WorkerSpec
from kvconform_backends.onnx import counting as onnx_counting
from kvconform_backends.torch import counting, eager
from kvconform_specs.config import ITEMSIZE, Config
from kvconform_specs.errors import SpecError
from kvconform_specs.tensors import weights

pytestmark = pytest.mark.xdist_group("counters")  # each backend is counted once

TINY = Preset(
    "tiny",
    Config(
        "decoder",
        heads=4,
        kv_heads=2,
        head_dim=6,
        layers=2,
        width=10,
        mlp=14,
        vocabulary=13,
        positions="rope",
        capacity=40,
    ),
    depths=(7, 12, 21),
    prompts=(9,),
    about="as small as it can be",
)
WEIGHTS = 2 * (10 * (4 + 2 + 2) * 6 + 4 * 6 * 10 + 3 * 10 * 14) + 10 * 13
"""Numbers in the matrices of ``TINY``: q, k, v, output, gate, up and down of both layers, and the LM head."""
SLOT = 2 * 2 * 4 * 6
"""Multiply-adds of one query position on one slot: scores and mixture, 2 layers, 4 heads of 6."""

ON_NUMPY = '''
from dataclasses import replace
import numpy as np
from kvconform_backends.numpy import cache as numpy_cache

class NoCache(numpy_cache.NumpyCache):
    """Keeps the tokens and computes all of them in each step."""
    claims = replace(numpy_cache.NumpyCache.claims, abilities=("uncached_forward", "macs"))
    def start(self, batch):
        return super().start(batch), None
    def step(self, cache, tokens, count_macs=False):
        empty, before = cache
        tokens = tokens if before is None else np.concatenate([before, tokens], axis=1)
        return super().step(empty, tokens, count_macs=count_macs)[0], (empty, tokens)
    def uncached_forward(self, tokens):
        return self.step(self.start(1), tokens)[0]

class Twice(numpy_cache.NumpyCache):
    """Computes each position twice."""
    def decode(self, cache, tokens):
        self.products = 0
        super().decode(self.fork(cache), tokens)
        return super().decode(cache, tokens)

class CompilesEach(numpy_cache.NumpyCache):
    """Has a graph for each number of cached tokens."""
    claims = replace(numpy_cache.NumpyCache.claims, abilities=(*numpy_cache.NumpyCache.claims.abilities, "graph_count"))
    made = frozenset()
    def step(self, cache, *inputs, **keywords):
        self.made |= {cache.length}
        return super().step(cache, *inputs, **keywords)
    def graph_count(self):
        return len(self.made)
    def runtime_info(self):
        return {"graph_breaks": 3}

class CountsApples(numpy_cache.NumpyCache):
    def count(self, call):
        call()
        return {"apples": {"": 1}}

class CountsNothing(numpy_cache.NumpyCache):
    claims = replace(numpy_cache.NumpyCache.claims, abilities=("length",))
'''

ON_TORCH = '''
from kvconform_backends.torch import eager

class Plain(eager.Eager):
    pass

class Static(eager.EagerStatic):
    pass

class Copies(Static):
    """Copies its buffers in each step."""
    def step(self, cache, *inputs, **keywords):
        return super().step(self.fork(cache), *inputs, **keywords)

class TokenByToken(Plain):
    """Looks at each cached token by itself."""
    def step(self, cache, *inputs, **keywords):
        output, grown = super().step(cache, *inputs, **keywords)
        for place in range(grown[0][0].shape[2]):
            grown[0][0][:, :, place].max()
        return output, grown

class Scratch(Static):
    """Takes scratch memory as long as the cache is."""
    def step(self, cache, *inputs, **keywords):
        cache.keys[0].new_zeros(cache.lengths[0])
        return super().step(cache, *inputs, **keywords)
'''

ON_ONNX = """
from kvconform_backends.onnx.exported import OnnxExported

class Onnx(OnnxExported):
    pass
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Counts one of the backends above on ``TINY``, once; the record calls it ``backend``."""
    folder = tmp_path_factory.mktemp("counted")
    files = {"counted_torch.py": ON_TORCH, "counted_numpy.py": ON_NUMPY, "counted_onnx.py": ON_ONNX}
    for file, source in files.items():
        (folder / file).write_text(source)
    known: dict[str, Record] = {}

    def count(name: str) -> Record:
        if name not in known:
            file = next((file for file, source in files.items() if f"class {name}(" in source), "counted_numpy.py")
            launches = {"backend": WorkerSpec("numpy" if name == "numpy" else f"{folder / file}:{name}")}
            known[name] = counters.count(launches, {"tiny": TINY}, folder / f"{name}.json", lambda line: None)
            assert counters.read(folder / f"{name}.json") == known[name]
        return known[name]

    return count


def values(record: Record, counter: str) -> dict[tuple[str, int], int]:
    return {(one.phase, one.depth): one.value for one in record.counts if one.counter == counter}


# --- what is counted ---
@pytest.mark.slow
@pytest.mark.parametrize("name", ["numpy", "Plain", "Static"])
def test_multiply_adds_are_those_of_the_formula(name: str, counted: Any) -> None:
    want = {("decode", n): WEIGHTS + SLOT * (n + 1) for n in TINY.depths}
    want |= {("prefill", 9): 9 * (WEIGHTS + SLOT * 9), ("growth", 0): SLOT * 14}
    if name != "numpy":  # which counts count_macs steps alone
        want[("recompute", 7)] = 8 * (WEIGHTS + SLOT * 8)
    record = counted(name)
    assert values(record, "multiply_adds") == want
    assert values(record, "bend") == {("growth", 0): 0}
    assert values(record, "positions") == {("decode", n): 1 for n in TINY.depths}


@pytest.mark.parametrize("backend", [eager.Eager, eager.EagerStatic])
def test_multiply_adds_of_the_fused_kernel_are_those_of_a_metered_step(backend: type[eager.Torch]) -> None:
    made = weights(TINY.config)
    counts = Tally(backend(TINY.config, made), TINY.config).count("decode", 12)["multiply_adds"]
    client = backend(TINY.config, made)
    cache = client.start(1)  # type: ignore[attr-defined]
    ids = Tally(client, TINY.config).tokens
    _, cache = client.step(cache, ids[:, :12])  # type: ignore[attr-defined]
    client.step(cache, ids[:, 12:13], count_macs=True)  # type: ignore[attr-defined]
    assert str(counting.FLASH) in counts
    assert sum(counts.values()) == client.macs()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_concatenating_cache_allocates_itself_anew_and_a_static_one_nothing_that_grows(dtype: str) -> None:
    config = msgspec.convert({**TINY.config.to_json(), "dtype": dtype}, Config)
    for backend, token in ((eager.Eager, 2 * 2 * 2 * 6 * ITEMSIZE[dtype]), (eager.EagerStatic, 0)):
        tally = Tally(backend(config, weights(config)), config)
        first, last = (sum(tally.count("decode", n)["allocated"].values()) for n in (7, 21))
        assert last - first == 14 * token


def test_a_view_and_a_write_in_place_allocate_nothing_and_outputs_of_one_memory_count_once() -> None:
    x = torch.zeros(4, 6)
    with counting.Dispatched() as mode:
        x.view(6, 4).add_(1)
        x[1:].mul_(2)
    assert mode.counts()["allocated"] == {}
    assert mode.counts()["operators"] == {"aten.view": 1, "aten.add_": 1, "aten.slice": 1, "aten.mul_": 1}
    with counting.Dispatched() as mode:
        torch.ops.aten.split_with_sizes(x + 1, [2, 2])
        torch.sort(x)
    assert mode.counts()["allocated"] == {"aten.add": 4 * 24, "aten.sort": (4 + 8) * 24}


def test_operators_are_counted_alike_with_gradients_and_without() -> None:
    x = torch.zeros(2, 3, 4)

    def counts() -> counting.Counts:
        with counting.Dispatched() as mode:
            torch.nn.functional.linear(x, torch.zeros(5, 4))
        return mode.counts()

    with torch.inference_mode():
        inside = counts()
    with torch.no_grad():
        assert counts() == inside
    assert inside["multiply_adds"] == {"aten.mm": 2 * 3 * 4 * 5}


def test_a_compiled_step_is_counted_as_it_runs_compiled() -> None:
    runs = []

    def backend(graph: Any, examples: Any) -> Any:
        def run(*inputs: Any) -> Any:
            runs.append(1)
            return graph(*inputs)

        return run

    @torch.compile(backend=backend)
    def step(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    class WorkerClient(counting.CountedGraphs):
        device = "cpu"

    x = torch.zeros(3, 3)
    step(x)
    found = [WorkerClient().count(lambda: step(x)) for _ in range(2)]
    assert len(runs) == 3
    assert found[0] == found[1]
    assert found[0]["multiply_adds"] == {"aten.mm": 27}
    assert found[0]["allocated"]["allocator"] >= 36
    assert {"torch", "unit"} == set(WorkerClient().counted_by())


@pytest.mark.slow
def test_counting_twice_writes_the_same_bytes(counted: Any, tmp_path: Path) -> None:
    first, file = counted("Plain"), tmp_path / "counted.py"
    file.write_text(ON_TORCH)
    again = counters.count({"backend": WorkerSpec(f"{file}:Plain")}, {"tiny": TINY}, tmp_path / "again.json", str)
    write_versioned(tmp_path / "first.json", first)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "first.json").read_bytes()
    assert counters.compare(first, again) == counters.compare(again, first) == []


# --- ONNX Runtime ---
@pytest.mark.slow
def test_onnx_nodes_are_counted_as_they_run(counted: Any) -> None:
    record = counted("Onnx")
    assert record.missing == []
    assert values(record, "multiply_adds") == {
        **{("decode", n): WEIGHTS + SLOT * (n + 1) for n in TINY.depths},
        ("prefill", 9): 9 * (WEIGHTS + SLOT * 9),
        ("recompute", 7): 8 * (WEIGHTS + SLOT * 8),
        ("growth", 0): SLOT * 14,
    }
    decode = {one.counter: one for one in record.counts if (one.phase, one.depth) == ("decode", 12)}
    assert decode["operators"].kinds["Attention"] == 2
    assert decode["positions"].value == 1
    assert decode["memcpy"].value == 0
    grown = next(one for one in record.counts if (one.phase, one.counter) == ("growth", "allocated"))
    assert grown.kinds["Concat"] == 14 * 2 * 2 * 2 * 6 * 4  # the presents
    assert counters.broken(record) == []


def node(kind: str, inputs: list[list[int]], outputs: list[list[int]]) -> onnx_counting.Node:
    shapes = {"input_type_shape": inputs, "output_type_shape": outputs}
    return {"op_name": kind, "output_size": "8", **{k: [{"float": s} for s in v] for k, v in shapes.items()}}


def test_an_attention_node_with_a_past_reads_its_present() -> None:
    fused = node("Attention", [[1, 4, 1, 6], [1, 2, 1, 6], [1, 2, 1, 6], [1, 2, 7, 6]], [[1, 4, 1, 6], [1, 2, 8, 6]])
    assert onnx_counting.multiply_adds(fused) == 2 * 4 * 6 * 8


def test_of_a_node_without_a_formula_no_multiply_adds_are_told() -> None:
    product = node("MatMul", [[2, 3]], [[2, 5]])
    assert onnx_counting.counts([product])["multiply_adds"] == {"MatMul": 30}
    assert "multiply_adds" not in onnx_counting.counts([product, node("GroupQueryAttention", [[1, 1, 8]], [[1, 1, 8]])])


def test_a_copy_between_devices_breaks_a_law(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    event = {"cat": "Node", "name": "m_kernel_time", "args": node("MemcpyToHost", [[1]], [[1]])}
    profile.write_text(json.dumps([event, {"cat": "Session", "name": "run"}, {**event, "name": "m_fence_before"}]))
    counts = onnx_counting.counts(onnx_counting.nodes_of(profile))
    assert counts["memcpy"] == {"MemcpyToHost": 1}
    one = Count("tiny", "onnx", "decode", 7, "memcpy", 1, dict(counts["memcpy"]))
    (found,) = counters.broken(record_of([one]))
    assert found.words.startswith("tiny, onnx: decode at 7: memcpy 1 (MemcpyToHost 1): ")


# --- planted faults ---
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "laws"),
    [
        ("NoCache", {("decode", "positions"), ("growth", "multiply_adds"), ("growth", "bend")}),
        ("Twice", {("decode", "positions"), ("growth", "multiply_adds")}),
        ("TokenByToken", {("growth", "operators")}),
        ("Scratch", {("growth", "allocated")}),
        ("CompilesEach", {("loop", "recompilations"), ("loop", "graph_breaks")}),
        ("Plain", set()),
        ("Static", set()),
        ("Copies", set()),
        ("numpy", set()),
    ],
)
def test_what_no_cached_decode_does_is_told_without_a_baseline(
    name: str, laws: set[tuple[str, str]], counted: Any
) -> None:
    record = counted(name)
    assert record.missing == []
    found = counters.broken(record)
    assert {difference.code for difference in found} == ({REGRESSION} if laws else set())
    words = [difference.words for difference in found]
    for phase, counter in laws:
        assert any(f": {phase}" in one and f": {counter} " in one for one in words), (phase, counter)
    assert {(w.split(": ")[1].split(" at ")[0], w.split(": ")[2].split(" ")[0]) for w in words} == laws


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "name", "grown", "words"),
    [
        ("Static", "Copies", {"operators", "allocated"}, "aten.clone +4"),
        ("numpy", "Twice", {"multiply_adds", "positions"}, "positions 1 -> 2"),
        ("Plain", "TokenByToken", {"operators", "allocated"}, "aten.max +8"),
        ("Static", "Scratch", {"operators", "allocated"}, "aten.new_zeros"),
        ("numpy", "NoCache", {"multiply_adds", "positions", "bend"}, "decode at 7: positions 1 -> 8"),
    ],
)
def test_a_count_that_grows_is_a_regression_and_names_what_grew(
    base: str, name: str, grown: set[str], words: str, counted: Any
) -> None:
    found = counters.compare(counted(base), counted(name))
    worse = [one.words for one in found if one.code == REGRESSION and " -> " in one.words]
    assert {one.split(": ")[2].split(" ")[0] for one in worse} == grown
    assert any(words in one for one in worse), worse


@pytest.mark.slow
def test_the_bytes_of_a_copy_are_told(counted: Any) -> None:
    found = "\n".join(counters.lines(counters.compare(counted("Static"), counted("Copies"))))
    buffers = 2 * 2 * 2 * 40 * 6 * 4  # bytes of keys and values
    assert f"aten.clone +{buffers}" in found
    assert all(line.startswith("regression: tiny, backend: ") for line in found.splitlines())


def test_graphs_compiled_along_a_decode_are_counted_after_its_first_steps(counted: Any) -> None:
    record = counted("CompilesEach")
    steps = min(LOOP, TINY.config.capacity - TINY.depths[0] - WARM)
    assert values(record, "recompilations") == {("loop", 7): steps}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("CountsApples", "counts 'apples', which is unknown; known: multiply_adds"),
        ("CountsNothing", "it counts nothing"),
        ("Absent", "has no 'Absent'"),
    ],
)
def test_a_backend_without_counts_is_listed_with_its_reason(name: str, why: str, counted: Any) -> None:
    record = counted(name)
    assert record.counts == []
    assert [(one.preset, one.backend) for one in record.missing] == [("tiny", "backend")]
    assert why in record.missing[0].why


# --- against a baseline ---
def record_of(counts: list[Count], **more: Any) -> Record:
    preset = {"config": TINY.config.to_json(), "depths": [7, 12, 21], "prompt": 9}
    names = {one.backend for one in counts}
    by = {name: {"torch": "2.13.0", "device": "cpu"} for name in names}
    claims = {name: {"memory": "length", "page": None} for name in names}
    return Record(**{"presets": {"tiny": preset}, "counts": counts, "by": by, "claims": claims, **more})


OPERATORS = Count("tiny", "a", "decode", 7, "operators", 5, {"aten.mm": 3, "aten.add": 2})
WORK = Count("tiny", "a", "decode", 7, "multiply_adds", 100)


def moved(base: list[Count], head: list[Count], **more: Any) -> list[tuple[int, str]]:
    return [(one.code, one.words) for one in counters.compare(record_of(base), record_of(head, **more))]


def test_a_count_that_fell_is_an_improvement_and_blocks_nothing() -> None:
    fewer = Count("tiny", "a", "decode", 7, "operators", 4, {"aten.mm": 4})
    words = "tiny, a: decode at 7: operators 5 -> 4 (aten.add -2, aten.mm +1): an improvement; update the baseline"
    assert moved([OPERATORS], [fewer]) == [(OK, words)]
    assert moved([fewer], [OPERATORS]) == [
        (REGRESSION, "tiny, a: decode at 7: operators 4 -> 5 (aten.add +2, aten.mm -1)")
    ]


def test_what_is_no_longer_counted_is_a_regression() -> None:
    assert moved([OPERATORS, WORK], [WORK]) == [
        (REGRESSION, "tiny, a: decode at 7: operators was 5, is no longer counted")
    ]
    gone = moved([OPERATORS, WORK], [], missing=[Missing("tiny", "a", "it died")])
    assert gone == [(REGRESSION, "tiny, a: is no longer counted: it died")]
    assert moved([OPERATORS], []) == [(REGRESSION, "tiny, a: is no longer counted: it was not part of the run")]


def test_what_is_new_is_told_and_blocks_nothing() -> None:
    other = msgspec.structs.replace(WORK, backend="b")
    assert moved([WORK], [WORK, other]) == [(OK, "tiny, b: is new; update the baseline")]
    assert moved([WORK], [WORK, OPERATORS]) == [
        (OK, "tiny, a: decode at 7: operators 5 (aten.mm 3, aten.add 2): is new; update the baseline")
    ]


def test_of_other_versions_only_what_the_framework_does_not_decide_is_compared() -> None:
    many = [msgspec.structs.replace(one, value=one.value + 1) for one in (OPERATORS, WORK)]
    found = moved([OPERATORS, WORK], many, by={"a": {"torch": "2.14.0", "device": "cpu"}})
    note = (
        "a: device cpu, torch 2.14.0, the baseline has device cpu, torch 2.13.0: operators, allocated, graphs are not"
    )
    assert found[0] == (OK, f"{note} comparable")
    assert found[1:] == [(REGRESSION, "tiny, a: decode at 7: multiply_adds 100 -> 101")]
    assert len(moved([OPERATORS], [], by={})) == 1  # a lost backend has no versions to differ


def test_a_preset_of_other_sizes_is_not_comparable_and_no_pass() -> None:
    other = {"tiny": {"config": TINY.config.to_json(), "depths": [7, 12], "prompt": 9}}
    found = moved([OPERATORS], [OPERATORS], presets=other)
    assert found == [(REGRESSION, "tiny: its sizes are not the baseline's: not comparable")]


def test_regressions_are_told_first() -> None:
    found = counters.compare(record_of([OPERATORS, WORK]), record_of([msgspec.structs.replace(OPERATORS, value=1)]))
    assert [line.split(":")[0] for line in counters.lines(found)] == ["regression", "note"]


def test_growth_needs_two_depths_and_a_bend_three() -> None:
    def decodes(*points: tuple[int, int]) -> list[tuple[str, int]]:
        made = [Count("tiny", "a", "decode", n, "multiply_adds", value) for n, value in points]
        return [(one.counter, one.value) for one in growth(made)]

    assert decodes((7, 100)) == []
    assert decodes((7, 100), (9, 120)) == [("multiply_adds", 20), ("bend", 0)]
    assert decodes((7, 100), (9, 120), (13, 160)) == [("multiply_adds", 60), ("bend", 0)]
    assert decodes((7, 100), (9, 121), (13, 160)) == [("multiply_adds", 60), ("bend", 6)]


def test_a_record_survives_its_file_and_one_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    record, path = record_of([OPERATORS, WORK], missing=[Missing("tiny", "b", "why")]), tmp_path / "counters.json"
    write_versioned(path, record)
    assert counters.read(path) == record
    assert counters.is_record(path)
    assert sum(line.startswith("  {") and '"counter"' in line for line in path.read_text().splitlines()) == 2
    path.write_text('{"schema": "kv-counters/9", "presets": {}}')
    with pytest.raises(SpecError, match="unknown schema 'kv-counters/9'; known: kv-counters/1"):
        counters.read(path)


def test_the_shipped_baseline_breaks_no_law() -> None:
    record = counters.read(ROOT / "docs" / "baseline" / "counters.json")
    assert counters.broken(record) == []
    assert {"eager", "eager-static", "compiled", "onnx"} <= {one.backend for one in record.counts}
    assert {one.counter for one in record.counts} == set(COUNTERS)
    assert {one.phase for one in record.counts} == set(PHASES)
