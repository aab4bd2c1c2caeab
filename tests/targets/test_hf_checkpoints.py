"""``hf:`` targets: checkpoints of real sizes, and quantised caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import broken

from kvconform.errors import BackendUnavailable
from kvconform.run import run
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import CHECK
from kvconform.worker.client import WorkerSpec

torch = pytest.importorskip("torch", reason="transformers runs on it")
pytest.importorskip("transformers", reason="it is what is tested here")

import transformers  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402

from kvconform_backends.targets import black_box  # noqa: E402
from kvconform_backends.targets.hf.opening import open_hf  # noqa: E402
from kvconform_backends.targets.hf.recipe import tokens_of  # noqa: E402
from kvconform_backends.targets.hf.sizes import tiny  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with more tokens than programs use."""
    folder = tmp_path_factory.mktemp("checkpoint")
    fields = tiny(transformers.GPT2Config()) | {"vocab_size": 700, "eos_token_id": 699}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).save_pretrained(folder)
    return folder


def test_of_a_large_vocabulary_a_part_is_used_and_kept(large: Path) -> None:
    backend = open_hf(str(large), {})
    assert "of its 700 tokens the first 512 are used, and their logits are compared" in backend.assumed
    assert backend.made.get_input_embeddings().weight.shape[0] == 512
    config = backend.configs["decoder-self"]
    assert (config.vocabulary, config.reserved) == (512, (0, 1))
    ids = np.array([tokens_of(config, 9)])
    whole = GPT2LMHeadModel.from_pretrained(large).eval()
    want = whole(torch.from_numpy(ids)).logits[..., :512].detach().numpy()
    assert np.abs(backend(config, {}).uncached_forward(ids) - want).max() < 1e-5
    assert broken(backend, ["equivalence.decode"], 4) == {}


def test_what_cannot_be_cut_is_left_as_it_is(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(self: Any, tokens: int) -> None:
        raise NotImplementedError

    monkeypatch.setattr(GPT2LMHeadModel, "resize_token_embeddings", raising)
    backend = open_hf(str(large), {})
    assert backend.made.get_input_embeddings().weight.shape[0] == 700
    config = backend.configs["decoder-self"]
    assert backend(config, {}).uncached_forward(np.array([[5, 6]])).shape == (1, 2, 512)


def test_perturbed_copies_share_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_hf("LlamaConfig", {})
    (config,) = backend.configs.values()
    ids = np.array([tokens_of(config, 6)])
    alone = {seed: backend(config, {}).perturbed(1e-3, 1e-4, seed).uncached_forward(ids) for seed in (1, 2, 3)}
    weights = sum(weight.numel() * weight.element_size() for weight in backend.made.parameters())
    monkeypatch.setattr(black_box, "COPIES", 2 * weights)
    monkeypatch.setattr(black_box, "free_memory", lambda: weights)
    assert black_box.room() == 2 * weights
    client = backend(config, {})
    exact = client.uncached_forward(ids)
    noisy = {seed: client.perturbed(1e-3, 1e-4, seed) for seed in (1, 2, 3)}
    for seed in (1, 2, 3, 1, 2):  # with two copies, 2 is made a second time
        assert np.array_equal(noisy[seed].uncached_forward(ids), alone[seed])
        assert not np.array_equal(alone[seed], exact)
    assert len(client.copies._held) == 2
    assert np.array_equal(client.uncached_forward(ids), exact)


def test_a_quantised_cache_is_judged_within_its_precision_or_refused_with_the_reason() -> None:
    backend = open_hf("LlamaConfig", {"cache": "fp8"})
    assert backend.recognised == "transformers LlamaForCausalLM, QuantizedCache (fp8), sdpa"
    assert (backend.claims.kv_bits, backend.claims.quantiser.scheme) == (8, "float8_e4m3")
    with pytest.raises(
        BackendUnavailable, match=r"QuantizedCache. is only supported for models with only full attention"
    ):
        open_hf("MistralConfig", {"cache": "fp8"})
    with pytest.raises(BackendUnavailable, match="MiniMaxForCausalLM makes its own cache"):
        open_hf("MiniMaxConfig", {"cache": "static"})


def test_less_is_tried_on_a_large_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = WorkerSpec('hf:GPT2Config?{"cache": "dynamic"}')
    plan = Plan(CHECK, clauses=("equivalence.decode", "equivalence.full-stable"))
    small = run_backend("small", spec, plan, tmp_path)
    monkeypatch.setattr(run, "LARGE", 1000)
    large = run_backend("large", spec, plan, tmp_path)
    assert (small.effort, large.effort) == ("check", "check-large")
    programs = [sum(verdict.programs for verdict in results.verdicts) for results in (small, large)]
    assert programs[0] > 2 * programs[1] > 0
    assert not small.failures
    assert not large.failures
