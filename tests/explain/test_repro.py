"""A failure as one Python file: it shows the bug where the target is alone, and exits with 0 once it is mended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT, SUPPORT

from kvconform.explain import repro
from kvconform.explain.repro.inputs import Run, inputs, literal
from kvconform.judging.verdict import Outcome
from kvconform.search.cell import Cell, run_cell
from kvconform.search.counterexample import Counterexample, read
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.registry import load
from kvconform_backends.faults.planted import Planted
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case, Relation
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program, Step, UncachedForward

EXAMPLES = ROOT / "examples"
SUBJECTS = SUPPORT / "subjects.py"
FAULTS = "kvconform_backends.faults"
GQA, ROPE = "attention-gqa", "decoder-rope"
ALONE = "import runpy, sys; sys.modules.update(dict.fromkeys({packages})); sys.argv = [{file!r}]; "
ALONE += "runpy.run_path({file!r}, run_name='__main__')"
PACKAGES = ("kvconform", "kvconform_specs", "kvconform_backends")


def found(address: str, clause: str, config: str, folder: Path, **spec: Any) -> tuple[str, Counterexample]:
    """The file of the failure that a search finds, and its counterexample."""
    with WorkerClient(WorkerSpec(address, **spec)) as client:
        verdict = run_cell(Cell(BY_NAME[clause], CONFIGS[config], config), client, EFFORTS["smoke"], 0, folder)
        assert verdict.counterexample, f"{verdict.outcome}: {verdict.sentence}"
        known = read(folder / verdict.counterexample)
        return repro.script(known, client), known


def written(address: str, clause: str, *steps: tuple[Step, ...], **spec: Any) -> str:
    """The file of a failure whose programs were written by hand: a search takes long on what is slow to start."""
    with WorkerClient(WorkerSpec(address, **spec)) as client:
        (config,) = client.configs.values() or (CONFIGS[GQA],)
        known = Counterexample(
            suite=SUITE_VERSION,
            clause=clause,
            backend=address,
            device="cpu",
            sentence="",
            outcome=Outcome.FAIL,
            before=[],
            case=Case(tuple(Program(config, program) for program in steps)).to_json(),
            reduced=True,
        )
        return repro.script(known, client)


DECODED = (UncachedForward("a", (6,), 0),), (Append("a", (3,), 0), *(Append("a", (1,), 0) for _ in range(3)))
"""The whole at once, and a prefill and three decode steps."""
SWAPPED = (Append("a", (3,), 0),), (Append("a", (3,), 0, substitutions=((0, 2, 96),)),)
"""The same prefill with another last token, whose first channel has another sign."""


def run(
    text: str, folder: Path, alone: bool = False, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the file in a folder of its own; ``alone``: where nothing of ours can be imported."""
    place = folder / "elsewhere"
    place.mkdir(exist_ok=True)
    file = place / "issue.py"
    file.write_text(text)
    code = ["-c", ALONE.format(packages=PACKAGES, file=str(file))] if alone else [str(file)]
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=False, cwd=place, env=environment
    )


def shows(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether it said what came and what must come, and nothing else happened."""
    return done.returncode == 1 and re.search(r"^got: .*\nwant: ", done.stdout, re.M) is not None and not done.stderr


def holds(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == 0 and done.stdout == "holds: the bug is gone\n" and not done.stderr


def mended(text: str) -> str:
    """The same calls on the numpy cache that is right, of the design that the fault stands on."""
    module, name = re.findall(r"^from (\S+) import (\w+) as Backend$", text, re.M)[0]
    right = next(base for base in load(f"{module}:{name}").__mro__ if not issubclass(base, Planted))
    return text.replace(f"from {module} import {name}", f"from {right.__module__} import {right.__name__}")


# --- what can break, on backends whose weights the harness sets ---
BROKEN = {
    Relation.PARITY: ("causality:TopLeft", "definition.attention", GQA),
    Relation.AGREEMENT: ("causality:TopLeft", "equivalence.decode", GQA),
    Relation.INSENSITIVE: ("causality:NoMaskWithCache", "causality.future-blind", GQA),
    Relation.SENSITIVE: ("causality:TopLeft", "causality.past-seen", GQA),
    Relation.BITWISE: ("determinism:SplitsByChunk", "determinism.chunk-invariant", GQA),
    Relation.SHAPE: ("shape:LastPositionOnly", "shape.output", GQA),
    Relation.LENGTHS: ("shape:LengthCountsHeads", "shape.length", GQA),
    Relation.FREE_SLOTS: ("capacity:RoomOfAllocation", "capacity.room", GQA),
    Relation.CONTENTS: ("contents:PresentSwapped", "contents.round-trip", GQA),
    Relation.QUANTISED: ("quantised:NeverQuantised", "quantised.stored", GQA),
    Relation.STABLE_CONTENTS: ("contents:KeysTurnedAgain", "contents.past-unchanged", ROPE),
    Relation.RETAINED_COUNT: ("contents:CapacityShown", "contents.present", GQA),
    Relation.FINITE: ("numerics:BuffersUninitialised", "numerics.finite", GQA),
    Relation.SAME_TOKEN: ("determinism:DilutedByTail", "determinism.same-token", ROPE),
    Relation.GENERATED: ("generation:LastPromptTokenTwice", "equivalence.generation", ROPE),
    Relation.INPUTS: ("memory:InputsZeroed", "memory.inputs-unchanged", ROPE),
    Relation.OUTPUTS: ("memory:OutputBufferReturned", "memory.outputs-kept", GQA),
    Relation.BYTES: ("accounting:RepeatedHeadsStored", "accounting.bytes", GQA),
    Relation.POSITIONS: ("accounting:Recomputed", "accounting.positions", ROPE),
    Relation.LINEAR_COST: ("accounting:Recomputed", "accounting.affine", ROPE),
}
"""A fault, a clause and a config for each relation."""
MORE = (
    ("positions:RopeInterleaved", "definition.positions", ROPE),
    ("errors:SurplusHeadsCut", "errors.malformed", GQA),  # what must be refused was accepted
    ("causality:DecodeSeesOneLess", "causality.past-seen", GQA),  # off by a part in a thousand
    ("window:ChunkWindowShort", "window.width", "attention-window"),  # arrays in base64
    ("memory:WritesOnePast", "memory.inputs-unchanged", GQA),
    ("memory:KeptKeysScaled", "memory.inputs-unchanged", GQA),
    ("memory:PromptKept", "memory.inputs-reused", GQA),
    ("batch:PaddedWithFirstPage", "batch.nan-isolated", GQA),
    ("batch:PaddingAdvances", "batch.ragged", ROPE),
    ("last_position:FirstForLast", "equivalence.last-position", ROPE),
    ("last_position:WithoutTokensBefore", "equivalence.last-position", ROPE),
)


def test_every_relation_has_a_fault_here() -> None:
    assert {*BROKEN, Relation.GRAPH_COUNT} == set(Relation)  # that one is below


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "clause", "config"), [*BROKEN.values(), *MORE], ids=lambda value: str(value).replace(":", "-")
)
def test_a_failure_of_a_planted_fault_is_shown_and_gone_on_the_cache_that_is_right(
    fault: str, clause: str, config: str, tmp_path: Path
) -> None:
    text, known = found(f"{FAULTS}.{fault}", clause, config, tmp_path)
    assert " ".join(known.sentence.split()) in " ".join(text.split())
    assert " ".join(BY_NAME[clause].text.replace("`", "").split()) in " ".join(text.split())
    assert len(text.splitlines()) <= 150
    compile(text, "issue.py", "exec")
    done = run(text, tmp_path)
    assert shows(done), done
    right = run(mended(text), tmp_path)
    assert holds(right), right


def test_too_many_graphs_are_counted(tmp_path: Path) -> None:
    text = written(
        f"{FAULTS}.capture:GraphForEachLength", "capture.graphs", tuple(Append("a", (2,), 0) for _ in range(5))
    )
    done = run(text, tmp_path)
    assert done.stdout == "got:  5\nwant: graphs, at most 4\n"
    assert holds(run(mended(text), tmp_path))


# --- what has no numbers ---
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "clause", "words"),
    [
        ("Raises", "definition.attention", "got:  RuntimeError: the cache is haunted\nwant: no exception\n"),
        ("Exits", "shape.output", "got:  exit status 7\nwant: 0, of a process that runs to its end\n"),
        ("Segfaults", "shape.output", "got:  exit status -11\nwant: 0, of a process that runs to its end\n"),
        ("GivesADictionary", "shape.output", "got:  ((), 'object')\nwant: ((1, 6, 1, 8), 'float32')\n"),
        ("GlobalCache", "shape.first-step", "want: -0.495358705 ±"),
    ],
)
def test_a_subject_in_a_file_is_imported_from_there(name: str, clause: str, words: str, tmp_path: Path) -> None:
    text, known = found(f"{SUBJECTS}:{name}", clause, GQA, tmp_path)
    assert ("# program 1" in text) == bool(known.before) == (name == "GlobalCache")  # leaked state: in the same file
    assert " ".join(known.sentence.split()) in " ".join(text.split())
    done = run(text, tmp_path)
    assert done.returncode == 1
    assert words in done.stdout
    right = run(text.replace(f"module.{name}", "module.NumpyCache"), tmp_path)
    assert holds(right), right


@pytest.mark.slow
def test_a_hang_is_told_by_a_process_that_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repro, "PATIENCE", 2)
    text, _known = found(f"{SUBJECTS}:Hangs", "shape.output", GQA, tmp_path, step_timeout=0.5)
    done = run(text, tmp_path)
    assert done.returncode == 1
    assert "got:  exit status no end within 2 s" in done.stdout


# --- black boxes: the target, numpy, and nothing of ours ---
TARGET = """
import numpy as np

def mean(x, past=None):
    '''The mean of all states so far; the past is their list.'''
    if past is not None and past.shape[1] > 4: raise RuntimeError("no such mask")
    seen = x if past is None else np.concatenate([past, x], axis=1)
    means = seen.cumsum(1) / np.arange(1, seen.shape[1] + 1, dtype=np.float32)[:, None]
    return means[:, -x.shape[1]:], seen
"""
ADAPTER = """
import sys
sys.path.insert(0, {folder!r})
from target import mean
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config

class Mean:
    claims = Claims(profiles=("hidden",), abilities=("uncached_forward",), reference="self")
    configs = {{"hidden-self": Config("hidden", heads=1, kv_heads=1, head_dim=6, width=6)}}
    recognised, assumed, source = "a function", (), __file__
    def __init__(self, config, weights, device): self.factor = 1
    def start(self, batch): return None
    def step(self, cache, x): return mean(x, cache)
    def uncached_forward(self, x): return mean(self.factor * x)[0]
    def perturbed(self, storage, accumulation, seed):
        other = Mean(None, None, None)
        other.factor = 1 + storage * seed
        return other
    def script_setup(self): return "import sys\\nsys.path.insert(0, {folder!r})\\nfrom target import mean"
    def script(self, program, tag):
        lines = ["past = None"]
        for i, step in enumerate(program.steps):
            if type(step).__name__ == "UncachedForward":
                lines.append(f"y{{tag}}{{i}} = mean(x{{tag}}{{i}})[0]  # step {{i}}")
            else: lines.append(f"y{{tag}}{{i}}, past = mean(x{{tag}}{{i}}, past)  # step {{i}}")
        return "\\n".join(lines)
"""
FORGETFUL = """
import os
if os.environ.get("FORGETFUL"):
    from transformers import DynamicCache
    update = DynamicCache.update
    def forgetful(self, *given, **more):
        keys, values = update(self, *given, **more)
        if values.shape[-2] > 4:
            values[..., 0, :] = 0.0
        return keys, values
    DynamicCache.update = forgetful
"""


def quiet(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Without what a runtime warns of."""
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, "")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ('raise RuntimeError("no such mask")', "got:  RuntimeError: no such mask\nwant: no exception"),
        ("import os; os._exit(3)", "got:  exit status 3\nwant: 0, of a process that runs to its end"),
        ("past = past[:, 1:]", "6 of 6 numbers are off"),
    ],
)
def test_a_black_box_is_called_as_its_adapter_writes_it(trouble: str, words: str, tmp_path: Path) -> None:
    target, adapter = tmp_path / "target.py", tmp_path / "adapter.py"
    adapter.write_text(ADAPTER.format(folder=str(tmp_path)))
    target.write_text(TARGET.replace('raise RuntimeError("no such mask")', trouble))
    text = written(f"{adapter}:Mean", "equivalence.decode", *DECODED)
    assert len(text.splitlines()) <= 60
    done = run(text, tmp_path, alone=True)
    assert shows(done), done
    assert words in done.stdout
    target.write_text(TARGET.replace("> 4", "> 400"))
    right = run(text, tmp_path, alone=True)
    assert holds(right), right


@pytest.mark.slow
def test_the_broken_example_is_shown_and_the_right_one_holds(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the target is a module of it")
    text = written(f"py:{EXAMPLES / 'attention_broken.py'}:Attention", "equivalence.decode", *DECODED)
    assert len(text.splitlines()) <= 80
    done = run(text, tmp_path, alone=True)
    assert shows(done), done
    right = run(text.replace("attention_broken", "attention"), tmp_path, alone=True)
    assert holds(right), right


@pytest.mark.slow
def test_an_onnx_decoder_is_shown_without_this_package(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the target is made with it")
    from decoder_graphs import Style, decoder, saved

    file = saved(decoder(Style(mistake="positions restart")), tmp_path)
    text = written(f"onnx:{file}", "equivalence.decode", *DECODED)
    assert len(text.splitlines()) <= 80
    done = run(text, tmp_path, alone=True)
    assert shows(quiet(done)), done
    saved(decoder(Style()), tmp_path)
    right = run(text, tmp_path, alone=True)
    assert holds(quiet(right)), right


@pytest.mark.slow
def test_a_model_of_transformers_is_shown_without_this_package(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="it makes the target")
    (tmp_path / "sitecustomize.py").write_text(FORGETFUL)
    broken = {"PYTHONPATH": str(tmp_path), "FORGETFUL": "1"}
    text = written("hf:LlamaConfig", "equivalence.decode", *DECODED, environment=broken)
    assert len(text.splitlines()) <= 100
    done = run(text, tmp_path, alone=True, environment={**os.environ, **broken})
    assert shows(quiet(done)), done
    right = run(text, tmp_path, alone=True)
    assert holds(quiet(right)), right


@pytest.mark.parametrize(
    ("name", "clause", "steps", "words"),
    [
        ("DropsOldest", "equivalence.decode", DECODED, "numbers are off"),
        ("Raises", "shape.first-step", ((Append("a", (10,), 0),),), "got:  ValueError: at most nine tokens"),
        ("Liar", "shape.length", ((Append("a", (3,), 0),),), "got:  [4]\nwant: length [3]"),
        ("Peeks", "causality.future-blind", SWAPPED, "numbers are off"),  # its last bits waver, mended or not
    ],
)
def test_what_only_its_adapter_can_say_is_called_through_it(
    name: str, clause: str, steps: tuple[tuple[Step, ...], ...], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "adapters.py"
    file.write_text(ADAPTERS.format(folder=str(SUPPORT)))
    text = written(f"{file}:{name}", clause, *steps)
    done = run(text, tmp_path)
    assert shows(done), done
    assert words in done.stdout
    right = run(text.replace(f"module.{name}", f"module.{'Wavers' if name == 'Peeks' else 'BlackBox'}"), tmp_path)
    assert holds(right), right


ADAPTERS = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np
from black_boxes import BlackBox, DropsOldest, Raises, Wavers

class Peeks(Wavers):
    def seen(self, s, cached):
        return np.tri(s, k=int(cached), dtype=bool)

class Liar(BlackBox):
    def length(self, cache):
        return [n + (n > 2) for n in super().length(cache)]
"""


# --- numbers ---
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32, np.bool_])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (3, 200)])
def test_an_array_survives_its_own_literal(dtype: type, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(0, 1e3, shape).astype(dtype)
    scope: dict[str, object] = {"np": np}
    exec("import base64\ndef raw(t, d, s): return np.frombuffer(base64.b64decode(t), d).reshape(s)", scope)
    again = eval(literal(x), scope)
    assert (again.dtype, again.shape) == (x.dtype, x.shape)
    assert again.tobytes() == x.tobytes()


def test_a_token_is_written_once_and_cut_from_there() -> None:
    config = CONFIGS[ROPE]
    at_once = Program(config, (UncachedForward("a", (5,), 3),))
    in_chunks = Program(config, (Append("a", (3,), 3), Append("a", (1,), 3), Append("a", (1,), 3)))
    swapped = Program(config, (Append("a", (5,), 3, substitutions=((0, 1, 99),)),))
    lines = inputs([Run(at_once, "0_"), Run(in_chunks, "1_"), Run(swapped, "2_")], seeded=False)
    assert lines[0].startswith("tokens = np.array([")
    assert lines[1] == "tokens2 = tokens.copy()"
    assert re.fullmatch(r"tokens2\[0, 1\] = \d+  # another token", lines[2])
    assert lines[3:] == [
        "x0_0 = tokens.copy()",
        "x1_0 = tokens[:, 0:3].copy()",
        "x1_1 = tokens[:, 3:4].copy()",
        "x1_2 = tokens[:, 4:5].copy()",
        "x2_0 = tokens2.copy()",
    ]


@pytest.mark.slow
def test_what_is_too_long_to_write_out_is_made_from_its_seeds(tmp_path: Path) -> None:
    text, _known = found(f"{FAULTS}.numerics:IndexWraps", "numerics.long-context", "attention-long", tmp_path)
    assert len(text) < 20_000
    assert shows(run(text, tmp_path))


# --- doors ---
@pytest.mark.slow
def test_replay_writes_the_script_and_says_that_it_shows_the_bug(tmp_path: Path) -> None:
    _text, known = found(f"{FAULTS}.causality:TopLeft", "equivalence.decode", GQA, tmp_path)
    file = known.write(tmp_path)
    command = [sys.executable, "-m", "kvconform", "replay", str(file), "--script", "out.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done
    assert "out.py shows it, and exits with 1 until it is mended" in done.stdout
    assert (tmp_path / "out.py").read_text() == _text
    other = subprocess.run([*command, "-b", "numpy"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert other.returncode == 0
    assert "holds now" in other.stdout


def test_what_holds_has_no_script(tmp_path: Path) -> None:
    program = Program(CONFIGS[GQA], (Append("a", (1,), 0),))
    known = Counterexample(
        suite=SUITE_VERSION,
        clause="shape.output",
        backend="numpy",
        device="cpu",
        sentence="none",
        outcome=Outcome.FAIL,
        before=[],
        case=Case((program,)).to_json(),
        reduced=True,
    )
    with (
        WorkerClient(WorkerSpec("numpy")) as client,
        pytest.raises(SpecError, match=r"shape\.output holds on numpy now"),
    ):
        repro.script(known, client)
