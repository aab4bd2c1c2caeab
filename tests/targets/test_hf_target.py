"""``hf:`` targets: transformers models are opened, run like in ``generate``, and judged by their own forward."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import InProcess, broken
from places import ROOT

from kvconform.errors import BackendUnavailable
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import Effort
from kvconform.worker.client import WorkerSpec
from kvconform.worker.execute import execute, feeds_of
from kvconform.worker.registry import load
from kvconform_specs.clause import Level
from kvconform_specs.clauses import ALL
from kvconform_specs.program import Append, Close, Fork, Program, Reject, Reorder, Reset, Truncate, UncachedForward
from kvconform_specs.reference.oracle import expect

torch = pytest.importorskip("torch", reason="transformers runs on it")
pytest.importorskip("transformers", reason="it is what is tested here")

import transformers  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from kvconform_backends.targets.hf import opening  # noqa: E402
from kvconform_backends.targets.hf.opening import open_hf  # noqa: E402
from kvconform_backends.targets.hf.recipe import tokens_of  # noqa: E402
from kvconform_backends.targets.hf.sizes import tiny  # noqa: E402
from kvconform_backends.targets.hf.target import Transformers  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]

FAMILIES = {
    "GPT2Config": "GPT2LMHeadModel",
    "LlamaConfig": "LlamaForCausalLM",
    "MistralConfig": "MistralForCausalLM",
    "Gemma2Config": "Gemma2ForCausalLM",
    "Gemma3TextConfig": "Gemma3ForCausalLM",
    "Qwen3Config": "Qwen3ForCausalLM",
    "GPTNeoXConfig": "GPTNeoXForCausalLM",
    "FalconConfig": "FalconForCausalLM",
    "OPTConfig": "OPTForCausalLM",
    "BloomConfig": "BloomForCausalLM",
    "PhiConfig": "PhiForCausalLM",
    "GptOssConfig": "GptOssForCausalLM",
}
WINDOWED = {"MistralConfig", "Gemma2Config", "Gemma3TextConfig", "GptOssConfig"}
MIXED = WINDOWED - {"MistralConfig"}
TINY = ROOT / "examples" / "tiny_llama"
BRIEF = Effort("brief", structures=2, variants=2, seconds=60.0)


def asked(backend: type[Transformers]) -> list[str]:
    """The clauses that make this target non-conformant if they fail."""
    (config,) = backend.configs.values()
    claims = backend.claims
    return [
        clause.name
        for clause in ALL
        if clause.level is Level.MUST
        and not clause.blind
        and clause.applies(config)
        and all(map(claims.can, clause.needs))
        and (not clause.needs_any or any(map(claims.can, clause.needs_any)))
    ]


# --- opening ---
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_opens_and_its_cached_steps_match_its_uncached_forward(family: str, cache: str) -> None:
    backend = open_hf(family, {"cache": cache})
    assert backend.recognised.startswith(f"transformers {FAMILIES[family]}, {cache.title()}Cache, ")
    client = InProcess(backend)
    assert client.config.window == (5 if family in WINDOWED else None)
    assert client.config.window_every == (2 if family in MIXED else 1)
    assert len(client.backend.runtime_info()["layers"]) == client.config.layers == (4 if family in MIXED else 2)
    program = Program(client.config, tuple(Append("a", (size, size), 7) for size in (4, 1, 6, 1, 1, 3)))
    client.send(program, (0, 1))
    done = client.receive(program)
    assert done.stacked is not None, "a step raised"
    for step, want in zip(
        done.stacked, expect(program, (0, 1), reference=client.reference_forward(client.config)), strict=True
    ):
        assert want is not None
        assert (np.abs(step.output - want.value) <= want.bound).all()


KINDS = {
    "BartConfig": "never",  # the decoder of an encoder-decoder
    "BertConfig": "never",  # an encoder, made a decoder
    "DeepseekV3Config": "never",  # a latent cache, groups of experts
    "Gemma3nTextConfig": "never",  # layers that share keys and values
    "Gemma4TextConfig": "never",  # layers of different head sizes
    "MptConfig": "never",  # a config inside the config
    "MambaConfig": "after the first",  # a recurrent state
    "MiniMaxConfig": "never",  # a cache class of its own
    "JambaConfig": "after the first",  # layers by period and offset
    "BambaConfig": "never",  # logits of the last token only
    "Zamba2Config": "never",  # numbers of layers
    "MusicgenConfig": "never",  # made of a part of the config, and not called as its generate prepares it
    "Dots3NoteConfig": "never",  # sizes of adapters that must agree
    "ReformerConfig": "after the first",  # takes positions, but not behind a cache
    "RecurrentGemmaConfig": "after the first",  # states in the module, and a cache that is not returned
}
"""Classes of which a plain reading of the sizes is not enough, and when each is given one token at a time."""


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_class_is_scaled_and_called_as_it_demands(family: str) -> None:
    backend = open_hf(family, {})
    assert backend.calls.one_by_one == KINDS[family]
    assert sum(parameter.numel() for parameter in backend.made.parameters()) < 300_000
    (config,) = backend.configs.values()
    client = backend(config, {})
    tokens = np.array([tokens_of(config, 12)] * 2)
    whole = client.uncached_forward(tokens)
    _, sequence = client.step(client.start(2), tokens[:, :7])
    rest, _ = client.step(sequence, tokens[:, 7:])
    assert np.abs(rest - whole[:, 7:]).max() < 1e-3 * whole.std()


def test_each_kind_of_layer_stays_in_a_tiny_model() -> None:
    fields = tiny(transformers.Gemma3nTextConfig())
    assert fields["num_hidden_layers"] == 4
    assert fields["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert fields["num_kv_shared_layers"] == 2
    assert fields["activation_sparsity_pattern"] == [0.95, 0.95, 0.0, 0.0]
    assert fields["intermediate_size"] == [48] * 4
    zamba = tiny(transformers.Zamba2Config())
    assert zamba["hybrid_layer_ids"] == [
        number for number, kind in enumerate(zamba["layers_block_type"]) if kind == "hybrid"
    ]
    gemma = tiny(transformers.Gemma4TextConfig())
    full = [number for number, kind in enumerate(gemma["layer_types"]) if kind == "full_attention"]
    assert [int(number) for number in gemma["per_layer_config"]] == full
    assert tiny(transformers.MptConfig())["n_layers"] == 2
    assert tiny(transformers.LlamaConfig())["num_hidden_layers"] == 2


def test_a_size_that_is_small_already_is_kept() -> None:
    small = transformers.LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert not {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"} & tiny(small).keys()


def test_an_encoder_is_no_decoder(tmp_path: Path) -> None:
    transformers.BertConfig(**tiny(transformers.BertConfig()) | {"is_decoder": False}).save_pretrained(tmp_path)
    with pytest.raises(BackendUnavailable, match="BertLMHeadModel is not a decoder: outputs of earlier tokens depend"):
        open_hf(str(tmp_path), {})


def test_the_capacity_is_what_the_forward_takes() -> None:
    assert open_hf("RobertaConfig", {}).configs["decoder-self"].capacity == 39
    assert open_hf("LlamaConfig", {}).configs["decoder-self"].capacity == 40


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="OpenAIGPTLMHeadModel is not a decoder with a cache"):
        open_hf("OpenAIGPTConfig", {})


def test_a_model_whose_forward_takes_no_cache_is_refused_before_it_is_built() -> None:
    words = "Gemma4AssistantForCausalLM is not a decoder with a cache: its forward takes none of past_key_values, "
    with pytest.raises(BackendUnavailable, match=words):
        open_hf("Gemma4AssistantConfig", {})


def test_a_model_that_keeps_states_in_its_modules_holds_one_sequence() -> None:
    backend = open_hf("RecurrentGemmaConfig", {})
    assert backend.claims.max_sequences == 1
    assert not {"uncached_forward", "fork"} & {*backend.claims.abilities}
    assert "states in conv1d_state and recurrent_states: it holds one sequence at a time" in " ".join(backend.assumed)
    assert open_hf("LlamaConfig", {}).calls.states == ()
    (config,) = backend.configs.values()
    steps = (Append("a", (3, 3), 5), Append("a", (1, 1), 5), Reset("a"), Append("a", (4, 4), 13))
    scripted(backend, Program(config, steps))


def test_what_a_sparse_attention_chooses_has_no_ties() -> None:
    backend = open_hf("DeepseekV32Config", {})
    assert backend.recipe.fields["index_n_heads"] == 16
    tokens = np.random.default_rng(0).integers(3, 97, (40, 14))
    client = backend(backend.configs["decoder-self"], {})
    whole = client.uncached_forward(tokens)
    _, sequence = client.step(client.start(40), tokens[:, :3])
    for at in range(3, 14):
        got, sequence = client.step(sequence, tokens[:, at : at + 1])
        assert np.abs(got[:, 0] - whole[:, at]).max() < 1e-3 * whole.std()


def test_padding_on_the_left_is_judged() -> None:
    backend = open_hf("LlamaConfig", {})
    clauses = ["batch.left-padding", "batch.ragged", "batch.padding"]
    assert {*clauses} <= {*asked(backend)}
    assert broken(backend, clauses, 6) == {}

    def unmasked(self: Transformers, sequence: Any, new: Any, mask: Any) -> Any:
        return Transformers._logits(self, sequence, new, torch.ones_like(mask))

    wrong = type("Unmasked", (backend,), {"_logits": unmasked})
    assert {"batch.left-padding", "batch.ragged"} <= {*broken(wrong, clauses, 6)}


def test_the_abilities_of_a_cache_are_found_by_trying() -> None:
    everything, common = (
        {"uncached_forward", "length", "reset", "fork", "reorder", "truncate", "ragged"},
        {"uncached_forward", "length", "reset", "fork", "ragged"},
    )
    assert {*open_hf("LlamaConfig", {}).claims.abilities} == everything
    assert {*open_hf("LlamaConfig", {"cache": "static"}).claims.abilities} == everything - {"truncate"} | {"poison"}
    # a sliding layer can be cropped only if its window never fills
    assert {*open_hf("MistralConfig", {}).claims.abilities} == common | {"reorder"}
    wide = open_hf("MistralConfig", {"config": {"sliding_window": 64}})
    assert {*wide.claims.abilities} == everything
    assert wide.configs["decoder-self"].window is None


@pytest.mark.parametrize("family", ["LlamaConfig", "MistralConfig"])
def test_poison_reaches_the_slots_of_a_static_cache_that_hold_no_token(family: str) -> None:
    backend = InProcess(open_hf(family, {"cache": "static"})).backend
    _, sequence = backend.step(backend.start(2), np.array([[3, 4, 5]] * 2))
    before = [layer.keys.clone() for layer in sequence.cache.layers]
    backend.poison(sequence, float("nan"), None)
    for layer, held in zip(sequence.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :3], held[:, :, :3])
        assert layer.keys[:, :, 3:].numel() > 0
        assert layer.keys[:, :, 3:].isnan().all()
        assert not layer.values.isnan().any()


def test_an_unused_slot_of_a_static_cache_that_attention_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = modeling_llama.eager_attention_forward

    def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        output, weights = right(module, query, key, value, mask, **options)
        return output + value[:, :1, -1:], weights  # zeros, as long as nothing fills the last slot

    backend = open_hf("LlamaConfig", {"cache": "static", "attn_implementation": "eager"})
    program = Program(InProcess(backend).config, (Append("a", (3,), 0), Append("a", (1,), 0)))
    assert broken(backend, ["contents.dead-slots"]) == {}
    before = execute(InProcess(backend).backend, program, (0,))[0]
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", wrong)
    after = execute(InProcess(backend).backend, program, (0,))[0]
    assert all(np.array_equal(mine.output, its.output) for mine, its in zip(after, before, strict=True))
    assert [*broken(backend, ["contents.dead-slots"])] == ["contents.dead-slots"]


def test_random_weights_are_spread_and_depend_only_on_the_seed() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (open_hf("OPTConfig", {"seed": seed}) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    tables = [backend.made.get_input_embeddings().weight[3:] for backend in (first, again, other)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert 0.18 < float(tables[0].detach().std()) < 0.22
    assert first.assumed[1] == "its weights are random (seed 3, of standard deviation 0.2, since 0.02 hides errors)"


def test_special_tokens_are_reserved() -> None:
    backend = open_hf("LlamaConfig", {"config": {"eos_token_id": [5, 2], "pad_token_id": None}})
    assert backend.configs["decoder-self"].reserved == (1, 2, 5)
    assert "tokens 1, 2, 5 are special and not used" in backend.assumed


def test_a_directory_without_weights_gets_random_ones(tmp_path: Path) -> None:
    random = open_hf(str(TINY), {"cache": "static"})
    config = random.configs["decoder-self"]
    assert (config.heads, config.kv_heads, config.layers, config.vocabulary, config.capacity) == (6, 2, 3, 101, 40)
    assert random.assumed[0].startswith("its weights are random (seed 0, of standard deviation 0.2")
    assert random.source == str(TINY / "config.json")
    kept = LlamaForCausalLM(LlamaConfig(**json.loads((TINY / "config.json").read_text())))
    kept.save_pretrained(tmp_path)
    backend = open_hf(str(tmp_path), {})
    assert backend.assumed[0] == f"its weights are those in {tmp_path}"
    for mine, saved in zip(backend.made.parameters(), kept.parameters(), strict=True):
        assert torch.equal(mine, saved)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("gpt2", {}, "neither a local directory with a config.json nor a config class .* nothing is downloaded"),
        ("LlamaForCausalLM", {}, "neither a local directory"),
        ("LlamaConfig", {"caches": "static"}, "unknown option 'caches'; known: cache, config, attn_implementation"),
        ("LlamaConfig", {"cache": "paged"}, "cache is 'paged'; known: dynamic, static, quanto, hqq, fp8"),
        ("LlamaConfig", {"dtype": "float8"}, "dtype is 'float8'; known: float32, bfloat16, float16"),
        ("LlamaConfig", {"config": {"hiden_size": 3}}, "LlamaConfig has no field 'hiden_size'"),
        ("Gemma2Config", {"attn_implementation": "sdpa"}, "transformers .* raised ValueError: Gemma2For"),
        ("LlamaConfig", {"config": {"head_dim": 7}}, "transformers .* raised Strict.* even rotary dimension"),
        ("ViTConfig", {}, "transformers .* raised ValueError: Unrecognized configuration class"),
    ],
)
def test_a_target_that_cannot_be_opened_is_an_error_of_one_sentence(
    target: str, options: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(BackendUnavailable, match=f"^target hf:{target}: .*{words}"):
        open_hf(target, options)


def test_an_address_selects_target_cache_and_dtype() -> None:
    backend = load('hf:Qwen3Config?{"cache": "static", "dtype": "bfloat16", "attn_implementation": "eager"}')
    assert backend.recognised == "transformers Qwen3ForCausalLM, StaticCache, eager"
    assert backend.claims.dtypes == ("bfloat16",)
    assert backend.made.dtype == torch.bfloat16
    client = backend(backend.configs["decoder-self"], {})
    assert (client.runtime_info()["device"], client.runtime_info()["precision"]) == (None, "bfloat16")
    client.uncached_forward(np.array([tokens_of(client.config, 2)]))
    assert client.runtime_info()["device"] == "cpu"


def test_experts_share_no_product_unless_requested() -> None:
    apart, together = open_hf("GptOssConfig", {}), open_hf("GptOssConfig", {"experts_implementation": "grouped_mm"})
    assert "its experts use batched_mm, since grouped_mm makes rounding depend on other tokens" in apart.assumed
    for backend, name in ((apart, "batched_mm"), (together, "grouped_mm")):
        client = backend(backend.configs["decoder-self"], {})
        assert client.runtime_info()["experts"] == name
        assert (f"model.set_experts_implementation({name!r})" in client.script_setup()) is True
    assert broken(apart, ["causality.future-blind"], 3) == {}


# --- judging ---
@pytest.mark.parametrize(
    ("family", "cache"),
    [("LlamaConfig", "dynamic"), ("LlamaConfig", "static"), ("MistralConfig", "dynamic"), ("MistralConfig", "static")],
)
def test_a_clean_model_breaks_no_clause(family: str, cache: str) -> None:
    backend = open_hf(family, {"cache": cache})
    clauses = asked(backend)
    assert {"equivalence.decode", "lifecycle.reset", "causality.past-seen", "lifecycle.fork"} <= {*clauses}
    assert ("window.hybrid" in clauses, "window.width" in clauses) == (False, family == "MistralConfig")
    assert broken(backend, clauses, 2) == {}


def test_the_published_gpt2_is_conformant_in_workers(tmp_path: Path) -> None:
    address = "kvconform_backends.targets.hf.opening:GPT2"
    assert load(address) is opening.gpt2()
    results = run_backend(
        "gpt2", WorkerSpec(address), Plan(BRIEF, 0, ("float32",), ("lifecycle.independent",)), tmp_path
    )
    assert all(v.outcome.value in ("pass", "unsupported") for v in results.verdicts), results.verdicts
    assert results.partial
    assert results.exit_code == 0
    (runtime_info,) = results.runtime_info.values()
    assert (runtime_info["model"], runtime_info["cache"], runtime_info["attention"]) == (
        "GPT2LMHeadModel",
        "DynamicCache",
        "sdpa",
    )
    assert runtime_info["layers"] == ["DynamicLayer"] * 2


class Forgetful(DynamicCache):
    """From the fifth token on, the value of the oldest is lost."""

    def update(self, *given: Any, **more: Any) -> Any:
        keys, values = super().update(*given, **more)
        if values.shape[-2] > 4:
            values[..., 0, :] = 0.0
        return keys, values


class Restarting(DynamicCache):
    """Reports an empty cache, so that positions restart at each step."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class HalfTurned(DynamicCache):
    """A reorder permutes keys but not values."""

    def reorder_cache(self, beam_idx: Any) -> None:
        for layer in self.layers:
            layer.keys = layer.keys[beam_idx]
            layer.values = layer.values[: len(beam_idx)].clone()


class HalfCropped(DynamicCache):
    """A crop drops only the tokens of the first layer."""

    def crop(self, tokens_to_remove: int) -> None:
        self.layers[0].crop(tokens_to_remove)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma2Config"])
def test_an_empty_cache_can_be_reordered_to_any_number_of_rows(family: str, cache: str) -> None:
    backend = open_hf(family, {"cache": cache})
    (config,) = backend.configs.values()
    steps = [Append("a", (7, 7), 5), Reset("a"), Reorder("a", (0, 1, 1)), Append("a", (2, 2, 2), 6), Reorder("a", (2,))]
    if backend.claims.can("truncate"):
        steps += [Truncate("a", 0), Reorder("a", (0, 0)), Append("a", (3, 3), 7)]
    (trace,) = execute(backend(config, {}), Program(config, tuple(steps)), (0,))
    assert [done.error for done in trace] == [None] * len(steps)


@pytest.mark.parametrize(
    ("cache", "clause"),
    [
        (Forgetful, "equivalence.decode"),
        (Forgetful, "causality.past-seen"),
        (Restarting, "equivalence.chunks"),
        (Restarting, "shape.length"),
        (HalfTurned, "lifecycle.reorder"),
        (HalfCropped, "lifecycle.truncate"),
    ],
)
def test_a_broken_cache_is_detected_by_the_clause_about_it(cache: type[DynamicCache], clause: str) -> None:
    backend = type("Broken", (open_hf("LlamaConfig", {}),), {"cache": lambda self: cache(config=self.model.config)})
    assert {*broken(backend, [clause, "equivalence.full-stable", "shape.output"], 12)} == {clause}


def test_a_shallow_copy_of_a_cache_is_not_a_fork() -> None:
    shallow = {"fork": lambda self, sequence: copy.copy(sequence)}
    backend = type("Shallow", (open_hf("GPT2Config", {}),), shallow)
    assert {*broken(backend, ["lifecycle.fork", "equivalence.decode"], 8)} == {"lifecycle.fork"}


# --- reproductions ---
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("OPTConfig", {}),
        ("BloomConfig", {"seed": 4}),
        ("MusicgenConfig", {}),
        (str(TINY), {"cache": "static", "config": {"head_dim": 8}}),
    ],
)
def test_the_script_of_a_program_reproduces_the_backends_outputs(target: str, options: Mapping[str, Any]) -> None:
    backend = open_hf(target, options)
    (config,) = backend.configs.values()
    steps = [
        Append("p", (3, 5), 5, pad=("left", 8)),
        Append("p", (1, 1), 5),
        Reset("p"),
        Close("p"),
        Append("a", (3, 3), 5),
        Append("a", (1, 1), 5),
        Fork("a", "b"),
        Append("b", (2, 2), 9),
        Reorder("a", (1, 1, 0)),
        Append("a", (1, 1, 1), 11),
        Close("b"),
        Reset("a"),
        Append("a", (4, 4, 4), 13),
        UncachedForward("c", (6,), 15),
        Append("b", (2,), 17),
    ]
    if backend.claims.can("truncate"):
        steps += [Truncate("b", 1), Reject(Truncate("b", 9)), Append("b", (2,), 19), Truncate("b", 0)]
        steps += [Reorder("b", (0, 0)), Append("b", (1, 1), 21)]
    scripted(backend, Program(config, tuple(steps)))


def scripted(backend: type[Transformers], program: Program) -> None:
    """Compares the outputs of a program with those of its script."""
    client = backend(program.config, {})
    (trace,) = execute(client, program, (0,))
    assert [done.error for done in trace] == [None] * len(program.steps)
    x = {f"x7_{number}": given[0][0] for number, (given, _) in enumerate(feeds_of(program, (0,))) if given}
    names: dict[str, Any] = {"np": np, **x}
    with torch.random.fork_rng(), torch.no_grad():
        exec(client.script_setup() + client.script(program, "7_"), names)
    outputs = {f"y7_{number}": done.output for number, done in enumerate(trace) if done.output is not None}
    assert {*outputs} == {name for name in names if name.startswith("y7_")}
    for name, output in outputs.items():
        assert np.array_equal(names[name], output), name
        assert names[name].dtype == np.float32
