"""``py:`` targets: modules with many conventions are recognised, called accordingly and judged by their own forward."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import InProcess, broken
from numpy.typing import NDArray
from places import SUPPORT

from kvconform.api import conformance
from kvconform.errors import BackendUnavailable, InvalidBackend
from kvconform.worker.execute import feeds_of
from kvconform.worker.registry import load
from kvconform_specs.program import AliasHandle, Append, Close, Program, Reset, UncachedForward
from kvconform_specs.reference.oracle import expect

torch = pytest.importorskip("torch", reason="modules are torch's")

from kvconform_backends.targets.module import calls, conventions  # noqa: E402
from kvconform_backends.targets.module import target as module  # noqa: E402

pytestmark = pytest.mark.xdist_group("modules")


HERE = SUPPORT
FILE, FAULTY_FILE = HERE / "third_party_modules.py", HERE / "third_party_faulty_modules.py"
EXAMPLES = HERE.parents[1] / "examples"
ASKED = (
    "shape.output",
    "shape.length",
    "shape.first-step",
    "causality.future-blind",
    "causality.past-seen",
    "equivalence.decode",
    "equivalence.chunks",
    "equivalence.full-stable",
    "contents.old-handle",
    "lifecycle.reset",
    "lifecycle.independent",
    "batch.row-solo",
    "batch.nan-isolated",
    "contents.dead-slots",
    "memory.inputs-unchanged",
    "memory.inputs-reused",
    "memory.outputs-kept",
)
"""Clauses for any target, from every relevant chapter."""

STATES, PAIR = "hidden states in, ", "as one (key, value) pair, (b, h, s, d); called as module(x, "
CORRECT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "attention.py:Attention": (f"{STATES}past_kv passed and returned {PAIR}past_kv=past)", {}),
    "buffers.py:Decoder": (
        "token ids in, the module owns the cache, emptied by module.reset_kv_cache(); called as "
        "module(x, use_cache=True)",
        {"capacity": 32, "vocabulary": 61, "heads": 4, "layers": 2, "head_dim": 8},
    ),
    "LayerPast": (
        f"{STATES}layer_past passed and returned as one (key, value) pair, (b, s, h, d); called as "
        "module(x, layer_past=past, use_cache=True)",
        {"width": 24, "heads": 3, "kv_heads": 3, "head_dim": 8},
    ),
    "ready": (f"{STATES}layer_past passed and returned as one (key, value) pair, (b, s, h, d)", {"heads": 3}),
    "TwoPasts": (f"{STATES}past_k and past_v passed and returned {PAIR}past_k=past[0], past_v=past[1])", {}),
    "Stacked": (f"{STATES}kv_cache passed and returned as one array, (..., h, s, d)", {"head_dim": 8}),
    "MaskFromCaller": (
        f"{STATES}past passed and returned {PAIR}past=past, "
        "mask=torch.ones(new, cached + new, dtype=torch.bool).tril(cached))",
        {},
    ),
    "CacheObject": (f"{STATES}cache passed and modified in place, an object of class KVCache, (b, h, s, d)", {}),
    "MakesCache": (
        f"{STATES}kv_cache passed and modified in place, a dict of 'k', 'v', 'length', of constant size",
        {"capacity": 30},
    ),
    "Rotary": (f"{STATES}past passed and returned {PAIR}past=past, pos=cached)", {}),
    "QueryKeyValue": (
        f"{STATES}past passed and returned as one (key, value) pair, (b, h, s, d); called as "
        "module(x, x, x, past=past)",
        {},
    ),
    "OneRow": (f"{STATES}past passed and returned as one array, (b, s, d); called as module(x, past=past)", {}),
    "attend": (
        f"{STATES[:-2]}, without a batch axis, past passed and returned as one (key, value) pair, (s, d)",
        {"width": 16, "vocabulary": 0},
    ),
    "in_numpy": (
        f"{STATES[:-2]}, without a batch axis, numpy arrays, past passed and returned as one (key, value) pair, (s, d)",
        {"width": 16},
    ),
    "LikeTransformers": (
        "token ids in, past_key_values passed and returned as a tuple of 2 (key, value) pairs, (b, h, s, d); called "
        "as module(x, past_key_values=past, use_cache=True)",
        {"capacity": 24, "vocabulary": 53, "layers": 2, "heads": 2, "head_dim": 10},
    ),
    "ListOfPasts": (
        "token ids in, kv_caches passed and returned as a list of 2 (key, value) pairs, (b, h, s, d); called as "
        "module(x, kv_caches=past)",
        {"capacity": 24, "vocabulary": 53},
    ),
    "ModuleBuffers": (
        f"{STATES}the module owns the cache, emptied by module.reset_cache(); called as module(x, use_cache=True)",
        {"width": 20},
    ),
    "AlwaysCaches": (f"{STATES}the module owns the cache, emptied by module.reset_cache(); called as module(x)", {}),
    "StartPos": (f"{STATES}the module owns the cache; called as module(x, start_pos=cached)", {"capacity": 26}),
    "FourRows": (f"{STATES}the module owns the cache; called as module(x, start_pos=cached)", {"capacity": 26}),
    "SetsCache": (
        f"{STATES}the module owns the cache, emptied by module.set_kv_cache(batch_size=batch); called as "
        "module(x, input_pos=torch.arange(cached, cached + new))",
        {"capacity": 22},
    ),
    "UnusualName": (f"{STATES}pantry passed and modified in place, an object of class KVCache, (b, h, s, d)", {}),
    "InputPos": (
        f"{STATES}the module owns the cache, emptied by "
        "module.setup_caches(max_batch_size=batch, max_seq_length=26); called as "
        "module(x, input_pos=torch.arange(cached, cached + new))",
        {"capacity": 26},
    ),
}
"""How each is called, and fields of its config."""

BROKEN: Mapping[str, tuple[str, set[str], set[str]]] = {
    "attention_broken.py:Attention": ("past_kv", {"equivalence.decode", "causality.past-seen"}, {"shape.first-step"}),
    "ChunkSeesFuture": ("past_kv", {"causality.future-blind", "equivalence.chunks"}, {"equivalence.decode"}),
    "NeverReset": ("module.reset_cache()", {"lifecycle.reset"}, set()),
    "SquareMask": ("module.reset_cache()", {"equivalence.chunks"}, {"equivalence.decode", "shape.first-step"}),
    "GlobalList": ("the module owns the cache;", {"lifecycle.independent"}, set()),
    "RestartedPositions": ("past", {"equivalence.decode"}, {"shape.first-step", "causality.future-blind"}),
    "RotatedTwice": ("past", {"equivalence.decode", "equivalence.chunks"}, {"shape.first-step"}),
    "ForgetsOrder": ("past", {"equivalence.decode"}, {"shape.first-step"}),
    "SharedRow": ("layer_past", {"batch.row-solo"}, {"shape.first-step"}),
    "Overwrites": ("layer_past", {"contents.old-handle"}, {"equivalence.decode", "lifecycle.reset"}),
    "CentresInPlace": ("layer_past", {"memory.inputs-unchanged"}, {"equivalence.decode", "memory.inputs-reused"}),
    "ReadsUnusedSlots": ("start_pos=cached", {"contents.dead-slots"}, {"memory.inputs-unchanged"}),
    "OffByOne": ("modified in place", {"equivalence.decode"}, {"shape.first-step"}),
}
"""Part of how each is called, clauses that it breaks, and clauses that it does not."""


def place_of(name: str) -> str:
    file = FAULTY_FILE if name in BROKEN or name == "KV_CACHE" else FILE
    return f"{EXAMPLES}/{name}" if ":" in name else f"{file}:{name}"


def opened(name: str, **options: Any) -> Any:
    return module.open_module(place_of(name), options)


# --- recognition ---
@pytest.mark.slow
@pytest.mark.parametrize("name", CORRECT)
def test_a_convention_is_recognised_and_a_correct_module_breaks_no_clause(name: str) -> None:
    target = opened(name)
    words, fields = CORRECT[name]
    assert target.recognised.startswith(words)
    (config,) = target.configs.values()
    assert {field: getattr(config, field) for field in fields} == fields
    assert broken(target, ASKED) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_bug_is_reported_and_not_mistaken_for_a_convention(name: str) -> None:
    target = opened(name)
    words, breaks, holds = BROKEN[name]
    assert words in target.recognised
    found = set(broken(target, ASKED, 9))
    assert breaks <= found
    assert not holds & found


def test_an_exception_of_a_step_is_reported_by_the_suite() -> None:
    words = broken(opened("SquareMask"), ("equivalence.chunks",), 12)["equivalence.chunks"]
    assert "raised RuntimeError: The size of tensor a" in words


def test_a_wrong_default_is_judged_and_the_remedy_is_named() -> None:
    assumed = opened("ForgetsOrder").assumed
    given = "torch.arange(cached, cached + new)"
    assert f"position_ids is omitted; given as {given}, cached calls would agree" in assumed
    assert "position_ids is omitted" in opened("LikeTransformers").assumed


def test_claims_match_what_the_target_offers() -> None:
    abilities = {name: set(opened(name).claims.abilities) for name in ("LayerPast", "CacheObject", "MakesCache")}
    assert abilities["LayerPast"] == {"uncached_forward", "length", "reset", "immutable", "fork", "reorder"}
    assert abilities["CacheObject"] == {"uncached_forward", "length", "reset", "fork"}
    assert abilities["MakesCache"] == {"uncached_forward", "length", "reset", "poison", "fork"}
    owned, always, position = (opened(name).claims for name in ("ModuleBuffers", "AlwaysCaches", "StartPos"))
    assert set(owned.abilities) == {"uncached_forward", "reset"}
    assert set(always.abilities) == {"reset"}  # every call uses the cache
    assert set(position.abilities) == {"reset", "poison"}
    assert set(opened("GlobalList").claims.abilities) == {"uncached_forward"}
    assert owned.max_sequences == always.max_sequences == 1
    assert opened("OneRow").claims.max_batch == opened("attend").claims.max_batch == 1
    assert opened("FourRows").claims.max_batch == 4
    assert set(opened("SetsCache").claims.abilities) == {"uncached_forward", "reset", "poison"}
    assert opened("ListOfPasts").claims.returns == "last"
    assert opened("LayerPast").claims.devices == ("cpu", "cuda")
    assert opened("attend").claims.devices == ("cpu",)


@pytest.mark.parametrize(
    ("name", "arrays", "axis"),
    [
        ("buffers.py:Decoder", 4, 2),
        ("MakesCache", 2, 2),
        ("StartPos", 2, 2),
        ("ModuleBuffers", 0, 2),
        ("LayerPast", 0, 2),
    ],
)
def test_the_slots_of_a_cache_are_found_by_watching_its_steps(name: str, arrays: int, axis: int) -> None:
    found = opened(name).found.slots
    assert [*found.values()] == [axis] * arrays


def test_poison_reaches_the_slots_that_hold_no_token() -> None:
    backend = InProcess(opened("MakesCache")).backend
    _, sequence = backend.step(backend.start(2), np.ones((2, 3, backend.target.found.width), np.float32))
    before = sequence.past["k"].clone()
    backend.poison(sequence, None, float("nan"))
    assert torch.equal(sequence.past["k"][:, :, :3], before[:, :, :3])
    for part in "kv":
        assert sequence.past[part][:, :, 3:].isnan().all()
        assert not sequence.past[part][:, :, :3].isnan().any()


def test_a_cache_that_holds_its_inputs_says_so() -> None:
    words = "its cache holds the inputs of earlier calls themselves, which the caller must not overwrite"
    kept, copied = opened("OneRow"), opened("LayerPast")
    assert (kept.claims.inputs, words in kept.assumed) == ("kept", True)
    assert (copied.claims.inputs, words in copied.assumed) == ("copied", False)


def test_with_a_window_the_length_is_not_claimed() -> None:
    assert "length" not in opened("LayerPast", init={"width": 24, "heads": 3, "window": 4}).claims.abilities


# --- options ---
def test_arguments_seed_and_dtype_determine_the_target() -> None:
    target = opened("LayerPast", init={"width": 30, "heads": 5}, seed=3, dtype="bfloat16")
    (config,) = target.configs.values()
    assert (config.width, config.heads, config.dtype, target.claims.dtypes) == (30, 5, "bfloat16", ("bfloat16",))
    assert target.assumed[0].startswith("it is built with width=30, heads=5 after torch.manual_seed(3)")
    assert broken(target, ("equivalence.decode",)) == {}
    x = np.ones((1, 2, 30), np.float32)
    outputs = [
        opened("LayerPast", init={"width": 30, "heads": 5}, seed=seed)(config, {}, "cpu").uncached_forward(x)
        for seed in (3, 3, 4)
    ]
    assert np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])
    backend = target(config, {}, "cpu")
    assert (backend.runtime_info()["device"], backend.runtime_info()["precision"]) == (None, "bfloat16")
    backend.uncached_forward(x)
    assert backend.runtime_info()["device"] == "cpu"


def test_a_config_class_is_built_from_a_json_object() -> None:
    (config,) = opened("LikeTransformers", init={"config": {"vocab_size": 31, "n_layer": 3}}).configs.values()
    assert (config.vocabulary, config.layers) == (31, 3)


def test_a_convention_can_be_given() -> None:
    given = {
        "call": "module(x, position_ids=torch.arange(cached, cached + new), past=past)",
        "present": "out[1]",
        "output": "out[0]",
    }
    target = opened("ForgetsOrder", convention=given)
    assert f"called as {given['call']}" in target.recognised
    assert broken(target, ASKED) == {}


def test_an_address_opens_a_target_and_a_backend_is_returned_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from kvconform_backends.numpy.cache import NumpyCache\n\n\nclass Mine(NumpyCache):\n    pass\n")
    assert load(f"py:{file}:Mine").__name__ == "Mine"
    options = json.dumps({"init": {"width": 30, "heads": 5}})
    assert load(f"py:{FILE}:LayerPast?{options}").configs["hidden-self"].width == 30
    assert load("py:third_party_modules:ready").recognised.startswith(STATES)
    assert load("py:third_party_modules:ready").source == str(FILE)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "Strange",
            {},
            "fits Strange.forward(x: 'Tensor', ledger: 'dict'), whose required parameter 'ledger' is unknown. Give",
        ),
        ("NoCache", {}, "fits NoCache.forward(x: 'Tensor'), whose calls show no cache. Give the call"),
        ("Absent", {}, "has no 'Absent'"),
        ("Layer", {"init": {"width": 5, "heads": 3}}, "fits Layer.forward(x: 'Tensor', past: 'tuple[Tensor, Tensor] |"),
        ("Layer", {"init": {"depth": 5}}, "cannot be built: TypeError: Projections.__init__() got an unexpected keyw"),
        ("Needs", {}, "give its arguments: --init '{\"width\": ...}'"),
        ("KV_CACHE", {}, "is a list, which cannot be called"),
        ("LayerPast", {"dtype": "int8"}, "unknown dtype 'int8'; known: float32, bfloat16, float16"),
        ("LayerPast", {"colour": 1}, "unknown option 'colour'; known: init, seed, dtype, convention"),
    ],
)
def test_a_target_that_cannot_be_opened_is_an_error_of_one_sentence(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        opened(name, **options)
    assert str(caught.value).startswith(f"py:{place_of(name)}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("convention", "words"),
    [
        ({"calls": ""}, "convention.calls: unknown field; known: always, arrays, batched"),
        ({"call": "module(x"}, "convention.call: 'module(x' is not a Python expression"),
        ({"call": "model(x, past)"}, "convention.call: 'model(x, past)' uses 'model'; known names: batch, cached"),
        ({"call": 3}, "convention.call: want a Python expression as a string, got 3"),
        ({"takes": "token"}, "convention.takes: want one of tokens, states, got 'token'"),
        ({"batched": "no"}, "convention.batched: want true or false, got 'no'"),
        ({"imports": ["Absent"]}, "convention.imports: want a list of names in the target's file, got 'Absent'"),
        ("module(x)", "convention: want an object of fields, got 'module(x)'"),
    ],
)
def test_a_bad_convention_is_an_error_of_one_sentence_and_exit_code_2(convention: Any, words: str) -> None:
    with pytest.raises(InvalidBackend) as caught:
        opened("LayerPast", convention=convention)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_target_that_wants_the_whole_sequence_beside_its_past_is_given_it() -> None:
    target = opened("WantsAll")
    assert "module(sofar, past=past)" in target.recognised
    assert broken(target, ASKED) == {}


def test_what_no_trial_agreed_with_is_said_first() -> None:
    pytest.importorskip("torch")
    for name, words in (("TopLeftMask", True), ("RightMask", False)):
        found = module.open_module(f"{SUPPORT / 'published_listings.py'}:{name}", {})
        assert found.assumed[0].startswith("it is called as meant, although in trials its first cached call") is words


def test_what_a_target_has_and_nothing_tries_is_told() -> None:
    assert opened("WithCrop").not_tried == ("crop of its past", "its argument seq_lens")  # one raises, one does nothing
    assert opened("LayerPast").not_tried == ()


def test_a_length_is_claimed_only_where_it_grows_to_the_capacity() -> None:
    right = module.open_module(f"{SUPPORT / 'streaming.py'}:Streaming", {})
    assert not right.claims.can("length")
    assert opened("LayerPast").claims.can("length")


def test_a_file_that_cannot_be_imported_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package_of_anyone\n")
    with pytest.raises(BackendUnavailable, match=r"cannot be imported: ModuleNotFoundError: No module named 'no_such"):
        module.open_module(f"{tmp_path}/broken.py:Net", {})
    with pytest.raises(BackendUnavailable, match=r"py:.*absent\.py:Net: no file"):
        module.open_module(f"{tmp_path}/absent.py:Net", {})


@pytest.mark.slow
def test_the_adapter_in_the_error_is_a_conformant_backend(tmp_path: Path) -> None:
    """Its import of the user's code is replaced by an example."""
    with pytest.raises(BackendUnavailable) as caught:
        opened("NoCache")
    shown = str(caught.value).partition("\n\n")[2]
    assert shown == conventions.ADAPTER.replace("my_file", "third_party_modules").replace("Attention", "NoCache")
    sizes = "heads=6, kv_heads=2, head_dim=8, width=48"
    text = shown.replace("heads=4, kv_heads=4, head_dim=8, width=32", sizes)
    text = text.replace("NoCache", "Attention")
    text = text.replace(
        "from third_party_modules", f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\nfrom attention"
    )
    (tmp_path / "adapter.py").write_text(text)
    target = load(f"{tmp_path}/adapter.py:Adapter")
    assert broken(target, ASKED) == {}


# --- noise ---
@pytest.mark.parametrize("name", ["LayerPast", "LikeTransformers", "attend", "in_numpy", "ModuleBuffers"])
def test_perturbed_weights_change_outputs_by_about_the_noise_and_not_the_target(name: str) -> None:
    target = opened(name)
    (config,) = target.configs.values()
    backend = target(config, {}, "cpu")
    x = np.arange(5)[None] if config.profile == "decoder" else np.ones((1, 5, config.width), np.float32)
    before, noise = backend.uncached_forward(x), 1e-4
    moved = [backend.perturbed(noise, 0.0, seed).uncached_forward(x) for seed in (1, 1, 2)]
    assert np.array_equal(backend.uncached_forward(x), before)
    assert np.array_equal(moved[0], moved[1])
    assert not np.array_equal(moved[0], moved[2])
    relative = np.abs(moved[0] - before).mean() / np.abs(before).mean()
    assert noise / 10 < relative < noise * 10
    calls.perturbed(backend.caller.module, 1.0, 0.0, 1)
    assert np.array_equal(backend.uncached_forward(x), before)


# --- reproductions ---
@pytest.mark.slow
def test_scripts_make_the_same_calls_without_this_package(tmp_path: Path) -> None:
    """A correct target's script exits with 0, a broken one's with 1; all run in one process that cannot import this
    package."""
    wanted = {}
    for name in (*CORRECT, "attention_broken.py:Attention", "RotatedTwice", "SharedRow"):
        backend = InProcess(opened(name))
        program = Program(backend.config, _steps(backend.claims))
        setup, steps = backend.backend.script_setup(), backend.backend.script(program, "a")
        file = tmp_path / f"{name.replace(':', '_').replace('.', '_')}.py"
        arrays: dict[str, NDArray[Any]] = {}
        checks = []
        feeds, wants = (
            feeds_of(program, (0,)),
            expect(program, (0,), reference=backend.reference_forward(backend.config)),
        )
        for number, ((inputs, _), want) in enumerate(zip(feeds, wants, strict=True)):
            if want is None:
                continue
            arrays[f"xa{number}"] = inputs[0][0]
            want = want.last() if backend.claims.returns == "last" and type(program.steps[number]) is Append else want
            arrays[f"want{number}"], arrays[f"bound{number}"] = want.value[0], want.bound[0]
            checks.append(f"off |= not (abs(ya{number} - given['want{number}']) <= given['bound{number}']).all()")
        np.savez(file.with_suffix(".npz"), allow_pickle=False, **arrays)
        given = [f"given = np.load({str(file.with_suffix('.npz'))!r})", "off = False"]
        given += [f"{key} = given[{key!r}]" for key in arrays if key.startswith("xa")]
        file.write_text("\n".join(["import sys", "import numpy as np", *given, setup, steps, *checks, "sys.exit(off)"]))
        assert steps.splitlines()[-1].endswith(f"# step {len(program.steps) - 1}: close a")
        wanted[str(file)] = int(name not in CORRECT)
    driver = (
        "import json, runpy, sys, warnings\n"
        "for name in ('kvconform', 'kvconform_specs', 'kvconform_backends'): sys.modules[name] = None\n"
        "codes = {}\n"
        "for file in sys.argv[1:]:\n"
        "    try: runpy.run_path(file)\n"
        "    except SystemExit as end: codes[file] = int(end.code)\n"
        "print(json.dumps(codes))\n"
    )
    ran = subprocess.run([sys.executable, "-c", driver, *wanted], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == wanted


def _steps(claims: Any) -> tuple[Any, ...]:
    rows = min(claims.max_batch or 2, 2)
    kept = (AliasHandle("a", "b"), Append("a", (2,) * rows, 3), Append("b", (1,) * rows, 4), Close("b")) * claims.can(
        "immutable"
    )
    whole = (UncachedForward("whole", (4,) * rows, 5),) * claims.can("uncached_forward")
    first = (Append("a", (3,) * rows, 1), Append("a", (1,) * rows, 1), *whole, Append("a", (2,) * rows, 1), *kept)
    return (*first, *((Reset("a"), Append("a", (2,) * rows, 6)) * claims.can("reset")), Close("a"))


def test_a_script_reads_like_handwritten_calls() -> None:
    backend = InProcess(opened("attention.py:Attention")).backend
    steps = (Append("a", (2,), 0), Append("a", (1,), 0), Reset("a"), Append("a", (1,), 0))
    (config,) = opened("attention.py:Attention").configs.values()
    assert backend.script_setup() == (
        "import copy\nimport sys\n\nimport torch\n\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "torch.manual_seed(0)\nfrom attention import Attention\n\n"
        "torch.manual_seed(0)\nmodule = Attention()\nmodule.eval()\ntorch.set_grad_enabled(False)\n"
    )
    assert backend.script(Program(config, steps), "") == (
        "past_a = None\n"
        "y0, past_a = module(torch.from_numpy(x0), past_kv=past_a)\n"
        "y0 = y0.numpy()  # step 0: append 2 to a\n"
        "y1, past_a = module(torch.from_numpy(x1), past_kv=past_a)\n"
        "y1 = y1.numpy()  # step 1: append 1 to a\n"
        "past_a = None  # step 2: reset a\n"
        "y3, past_a = module(torch.from_numpy(x3), past_kv=past_a)\n"
        "y3 = y3.numpy()  # step 3: append 1 to a\n"
    )


# --- end to end ---
@pytest.mark.slow
def test_the_examples_are_judged_in_workers(tmp_path: Path) -> None:
    clauses = ("equivalence.decode",)
    results = conformance(f"py:{EXAMPLES}/buffers.py:Decoder", clauses=clauses, out=tmp_path)
    assert results.target is not None
    assert results.target.recognised.startswith("token ids in, the module owns the cache")
    with pytest.raises(AssertionError, match=r"equivalence\.decode on .*attention_broken.py:Attention \[hidden-self\]"):
        conformance(f"py:{EXAMPLES}/attention_broken.py:Attention", clauses=clauses, out=tmp_path)
