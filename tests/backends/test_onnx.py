"""The ONNX backend's graphs: what they are made of, how an export is checked, and what is said where CUDA cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the ONNX backend exports a torch decoder")
pytest.importorskip("onnxscript", reason="torch.onnx exports with it")
pytest.importorskip("onnxruntime", reason="the ONNX backend runs on it")

import onnx  # noqa: E402

from kvconform.errors import Unavailable  # noqa: E402
from kvconform_backends.onnx import backend as onnx_subject  # noqa: E402
from kvconform_backends.onnx import graphs as onnx_graphs  # noqa: E402
from kvconform_backends.onnx.backend import CannotRun  # noqa: E402
from kvconform_backends.onnx.exported import OnnxExported  # noqa: E402
from kvconform_backends.torch.decoder import Decoder  # noqa: E402
from kvconform_specs.config import Config  # noqa: E402
from kvconform_specs.configs import config_named  # noqa: E402
from kvconform_specs.tensors import weights  # noqa: E402

SMALL = Config("decoder", 2, 1, 4, layers=2, width=6, vocabulary=11, positions="alibi", window=3, window_every=2)


def tensors(config: Config, batch: int, t: int) -> list[np.ndarray]:
    made = np.random.default_rng(0)
    heads = (config.heads, config.kv_heads, config.kv_heads)
    return [made.standard_normal((batch, count, t, config.head_dim)).astype(np.float32) for count in heads]


@pytest.mark.parametrize(
    ("name", "masked", "operators", "dtype", "columns"),
    [
        ("attention-gqa", False, ["Attention"], None, 0),
        ("attention-gqa", True, ["Attention"], np.bool_, 7),
        ("attention-window", True, ["Attention"], np.bool_, 7),
        ("attention-softcap", True, ["Attention"], np.float32, 7),
        ("attention-sink", True, ["Concat", "Pad", "Concat", "Pad", "Attention"], np.float32, 8),
    ],
)
def test_attention_is_causal_or_has_a_mask_that_leaves_no_query_to_broadcasting(
    name: str, masked: bool, operators: list[str], dtype: type | None, columns: int
) -> None:
    config = config_named(name)
    graph = onnx.load_from_string(onnx_graphs.attention_model(config, cached=True, masked=masked)).graph
    assert [node.op_type for node in graph.node] == operators
    attributes = {attribute.name: attribute.i for attribute in graph.node[-1].attribute}
    assert attributes["is_causal"] == int(not masked)
    if masked:
        mask = onnx_graphs.attention_mask(config, 4, 3, np.ones((2, 7), np.bool_))
        assert (mask.shape, mask.dtype) == ((2, config.heads if dtype is np.float32 else 1, 3, columns), dtype)


def test_a_query_that_the_callers_mask_leaves_nothing_gives_exactly_zero() -> None:
    for name in ("attention-gqa", "attention-window", "attention-softcap", "attention-sink"):
        config = config_named(name)
        backend = OnnxExported(config, {})
        query, key, value = tensors(config, 2, 3)
        blind = np.array([[False, False, False], [True, True, True]])
        output, cache = backend.step(backend.start(2), query, key, value, mask=blind)
        assert (output[0] == 0).all(), name
        assert (output[1] != 0).all(), name
        assert (backend.contents(cache)[0][0][0] == key[0]).all(), name  # what is hidden is in the cache all the same


def test_rows_that_are_not_there_cannot_be_reordered() -> None:
    backend = OnnxExported(config_named("attention-gqa"), {})
    _, cache = backend.step(backend.start(2), *tensors(backend.config, 2, 3))
    for rows in ([-1, 0], [0, 2], []):
        with pytest.raises(ValueError, match=r"rows are .*, expected one or more of 0\.\.1"):
            backend.reorder(cache, rows)
    assert backend.length(backend.reorder(cache, [1, 1, 0])) == [3, 3, 3]


# --- the export ---
def test_an_axis_that_the_export_made_a_constant_is_an_error() -> None:
    value = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", 3])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [value], []))
    with pytest.raises(RuntimeError, match=r"specialised input_ids: axes \[.batch., 3\], expected"):
        onnx_graphs.check_symbolic(model, {"input_ids": {0: "batch", 1: "new"}}, {0: "batch", 2: "past"})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnnxExported]:
    """Its files are kept, so that each graph is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCONFORM_ARTEFACTS", str(tmp_path_factory.mktemp("artefacts")))
        yield OnnxExported(SMALL, weights(SMALL))


@pytest.mark.slow
def test_an_export_is_compared_with_the_module_it_was_made_from(small: OnnxExported) -> None:
    made = small.artefact(cached=True).read_bytes()
    for other in (replace(SMALL, window_every=1), replace(SMALL, window=2), replace(SMALL, positions="none")):
        module = onnx_graphs.Exportable(Decoder(other, weights(SMALL)))
        with pytest.raises(RuntimeError, match=r"the exported graph's .* differs from torch for \(b, t, p\)"):
            onnx_graphs._check_values(made, module, other, cached=True)


def test_a_decoder_has_one_graph_for_each_step_whichever_logits_are_asked_for(small: OnnxExported) -> None:
    backend = OnnxExported(SMALL, weights(SMALL))
    cache = backend.start(2)
    for t, last in ((3, False), (1, False), (2, True), (1, True)):
        _, cache = backend.step(cache, np.ones((2, t), np.int64), last_only=last)
    assert backend.length(cache) == [7, 7]
    assert backend.runtime_info()["files"] == [small.artefact(cached=True).name]
    assert len(backend.sessions) == 1


@pytest.mark.slow
def test_the_last_positions_logits_are_those_among_all_and_only_its_row_is_multiplied(small: OnnxExported) -> None:
    ids = np.arange(10).reshape(2, 5)
    every, last = small.uncached_forward(ids), small.uncached_forward(ids, last_only=True)
    _, cache = small.step(small.start(2), ids[:, :2])
    stepped, _ = small.step(cache, ids[:, 2:], last_only=True)
    assert last.shape == stepped.shape == (2, 1, SMALL.vocabulary)
    # the products of one row and of many are summed in other orders: a few eps of float32 of the largest logit
    slack = 64 * np.finfo(np.float32).eps * np.abs(every).max()
    assert np.abs(last - every[:, -1:]).max() <= slack
    assert np.abs(stepped - every[:, -1:]).max() <= slack
    whole, one = (
        small.count(lambda asked=asked: small.uncached_forward(ids, last_only=asked))["multiply_adds"]["MatMul"]
        for asked in (False, True)
    )
    assert whole - one == 2 * 4 * SMALL.width * SMALL.vocabulary  # two rows, four of five tokens


# --- CUDA: a missing kernel concerns a config, a missing device concerns the backend ---
@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU were there; what is built in this test is forgotten."""
    monkeypatch.setattr(OnnxExported, "reach_device", lambda self: None)
    onnx_subject.unable.cache_clear()
    yield
    onnx_subject.unable.cache_clear()


class Session:
    """A session that believes to run on CUDA."""

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.usefixtures("reached")
def test_a_config_whose_heavy_node_strays_from_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counter({("CUDAExecutionProvider", "MatMul"): 3, ("CPUExecutionProvider", "Attention"): 1})
    monkeypatch.setattr(onnx_subject, "nodes", lambda session: counted)
    monkeypatch.setattr(OnnxExported, "prove_device", lambda self: self.prove_session(Session()))
    reason = OnnxExported.refuses(config_named("attention-gqa"), "cuda")
    assert reason is not None
    assert reason.endswith("has no CUDA kernel for Attention here")
    del counted["CPUExecutionProvider", "Attention"]
    assert OnnxExported.refuses(config_named("attention-window"), "cuda") is None


@pytest.mark.usefixtures("reached")
def test_a_config_that_a_cuda_kernel_refuses_at_run_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: OnnxExported, *inputs: object, **keywords: object) -> None:
        raise RuntimeError("softcap is not supported yet")

    monkeypatch.setattr(OnnxExported, "start", lambda self, batch: ())
    monkeypatch.setattr(OnnxExported, "step", step)
    reason = OnnxExported.refuses(config_named("attention-softcap"), "cuda")
    assert reason is not None
    assert reason.endswith("cannot run it on CUDA: softcap is not supported yet")
    with pytest.raises(CannotRun):
        OnnxExported(config_named("attention-softcap"), {}, "cuda")


def test_a_session_that_fell_back_to_the_cpu_is_no_cuda_at_all() -> None:
    backend = OnnxExported(config_named("attention-gqa"), {})
    with pytest.raises(Unavailable, match="runs on CPUExecutionProvider, not on CUDA"):
        backend.prove_session(backend.session(cached=True, masked=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_is_unavailable_and_no_config_is_refused() -> None:
    with pytest.raises(Unavailable, match="cannot use CUDA"):
        OnnxExported.refuses(config_named("attention-gqa"), "cuda")


def test_sixteen_bit_attention_is_refused_where_the_kernel_rounds_the_bias() -> None:
    assert OnnxExported.refuses(config_named("attention-gqa", "float16"), "cpu") is None
    assert "float16 would round it" in (OnnxExported.refuses(config_named("attention-sink", "float16"), "cuda") or "")
    assert OnnxExported.refuses(config_named("decoder-rope", "float16"), "cpu") is None
