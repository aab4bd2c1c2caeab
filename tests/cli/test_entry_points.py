"""The command line: what each command prints, and every exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from commands import kvconform, kvconform_here
from places import SUPPORT

from kvconform.judging.verdict import Outcome
from kvconform.results.results import read
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.configs import CONFIGS

SUBJECTS = SUPPORT / "subjects.py"
ONE_CONFIG = ("--effort", "smoke", "--config", "attention-gqa")
CORE = [c.name for c in BY_NAME.values() if c.core and c.concerns(CONFIGS["attention-gqa"])]
ONLY_CORE = (*ONE_CONFIG, *(word for name in CORE for word in ("--clause", name)))


@pytest.mark.parametrize("command", [("run", "-b", "numpy"), ("check", "numpy")])
def test_results_in_the_place_of_a_file_are_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    done = kvconform_here(*command, "--out", "taken", folder=tmp_path)
    assert done.returncode == 2
    assert "Invalid value for '--out': dir 'taken' is a file." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_conformant_backend_exits_with_0(tmp_path: Path) -> None:
    done = kvconform("run", "-b", "numpy", *ONLY_CORE, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(CORE)
    counts, summary = done.stdout.splitlines()[:2]
    assert counts == f"numpy [attention-gqa]: {count} pass"
    assert summary == f"numpy: the selected part passed: {count} cells; conformance needs the whole suite"
    found = read(tmp_path / "results" / "numpy.json")
    assert found.finished
    assert {verdict.clause: verdict.outcome for verdict in found.verdicts} == dict.fromkeys(CORE, Outcome.PASS)
    assert f"{sum(v.programs for v in found.verdicts)} programs" in done.stdout


@pytest.mark.slow
def test_a_broken_backend_exits_with_1_and_each_failure_is_three_lines(tmp_path: Path) -> None:
    name = f"{SUBJECTS}:PrintsAndIsWrong"
    done = kvconform("run", "-b", name, *ONE_CONFIG, "--clause", "definition.attention", folder=tmp_path)
    assert done.returncode == 1
    fact, steps, replay, counts, diagnosis, summary, _counts = done.stdout.splitlines()
    assert counts == "PrintsAndIsWrong [attention-gqa]: 1 fail"
    assert fact.startswith("definition.attention on PrintsAndIsWrong [attention-gqa]: step ")
    assert steps.startswith("  steps: append ")
    assert read(tmp_path / "results" / "PrintsAndIsWrong.json").failures[0].steps in steps
    assert diagnosis.startswith("diagnosis [attention-gqa]: ")
    assert summary == "PrintsAndIsWrong: non-conformant: 1 of 1 judged cell failed"
    again = kvconform(*replay.split()[2:], folder=tmp_path)
    assert again.returncode == 1
    assert again.stdout.startswith(f"definition.attention on {name}: step ")
    assert fact.partition("]: ")[2] in again.stdout
    healthy = kvconform(*replay.split()[2:], "-b", "numpy", folder=tmp_path)
    assert healthy.returncode == 0
    assert "holds now" in healthy.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "-b", "numpy", "--effort", "lots"), "unknown effort 'lots'; known: smoke, pr, nightly"),
        (("run", "-b", "numpy", "--device", "tpu"), "unknown device 'tpu'; known: cpu, cuda"),
        (("run", "-b", "numpy", "--dtype", "int8"), "unknown dtype 'int8'; known: float32, bfloat16, float16"),
        (("run", "-b", "numpy", "--clause", "nope"), "no clause starts with 'nope'; chapters: shape, causality"),
        (("run", "-b", "numpy", "--config", "nope"), "no config starts with 'nope'; known: attention-gqa,"),
        (
            ("run", "-b", "numpy", "--clause", "definition.decoder", "--config", "attention-gqa"),
            "no cell matches clauses definition.decoder and configs attention-gqa",
        ),
        (("check", "numpy", "--effort", "lots"), "unknown effort 'lots'; known: smoke, pr, nightly"),
        (("audit", "--effort", "lots"), "unknown effort 'lots'; known: smoke, pr, nightly"),
        (("schema", "poetry"), "unknown kind of file 'poetry'; known: results, "),
        (("run", "-b", "numpy", "--python", "eager=py"), "--python: no backend 'eager' in this run; given: numpy"),
        (("run", "-b", "a.py:X", "-b", "b.py:X"), "would write the same results"),
        (("run", "-b", "numpy", "--shard", "3/2"), "shard: want i/n with i from 1 to n, such as 2/5, got '3/2'"),
        (
            ("run", "-b", "numpy", *ONE_CONFIG, "--clause", "shape.output", "--shard", "2/2"),
            "shard 2/2: there are fewer cells than shards",
        ),
        (
            ("run", "-b", "numpy", "--known-failures", "none.toml"),
            "none.toml: cannot be read: No such file or directory",
        ),
        (("merge", "none.json", "-o", "x.json"), "none.json: cannot be read: No such file or directory"),
        (("spec", "poetry"), "no clause or chapter named 'poetry'; chapters: shape, causality"),
        (("replay", "none.json"), "none.json: cannot be read: No such file or directory"),
        (("bench", "-b", "numpy", "--preset", "huge"), "--preset: no preset named 'huge'; known: "),
        (("bench", "-b", "numpy", "--phase", "dance"), "--phase: no phase named 'dance'; known: prefill, decode"),
        (("bench", "-b", "numpy", "gate"), "options of 'gate' are given after that word"),
        (("bench", "gate", "-b", "numpy", "--phase", "decode"), "No such option: --phase"),
        (
            ("bench", "gate", "-b", "numpy", "--self-test", "--time-limit", "9"),
            "--time-limit does not apply to a self-test",
        ),
        (("bench", "gate", "-b", "numpy", "--history", "x"), "--history applies to a self-test only"),
        (("bench", "counters", "-b", "numpy", "--preset", "huge"), "--preset: no preset named 'huge'; known: "),
        (("report", "none.json"), "none.json: cannot be read: No such file or directory"),
        (("run",), "Missing option"),
    ],
)
def test_bad_input_exits_with_2_and_one_clear_sentence(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = kvconform_here(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_counters_that_count_nothing_are_no_success(tmp_path: Path) -> None:
    done = kvconform_here("bench", "counters", "-b", "missing.py:Thing", "--preset", "small", folder=tmp_path)
    assert done.returncode == 5
    assert "no counts: " in done.stdout


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("eagr", "no backend named 'eagr'; installed: compiled, eager, eager-static, flax, flex,"),
        ("nowhere:Thing", "backend 'nowhere:Thing' cannot be imported: no module named 'nowhere'"),
        (
            "kvconform.results.gate:Nothing",
            "backend 'kvconform.results.gate:Nothing': kvconform.results.gate has no 'Nothing'",
        ),
        (f"{SUBJECTS}:CannotRunHere", "this backend needs a quantum computer; install one"),
        ("missing.py:Thing", "no file missing.py"),
    ],
)
def test_what_is_absent_or_broken_exits_with_3_and_one_clear_sentence(backend: str, words: str, tmp_path: Path) -> None:
    done = kvconform_here("run", "-b", backend, *ONE_CONFIG, folder=tmp_path)
    assert done.returncode == 3
    assert words in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_module_that_fails_to_load_is_said_to_be_broken_not_absent(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('libmagic.so.1: cannot open shared object file')\n")
    done = kvconform_here("run", "-b", "broken.py:Thing", *ONE_CONFIG, folder=tmp_path)
    assert done.returncode == 3
    assert "is installed but failed to load: OSError: libmagic.so.1" in done.stdout


@pytest.mark.slow
def test_the_gate_exits_with_4_on_a_lost_pass_and_0_on_none(tmp_path: Path) -> None:
    kvconform("run", "-b", "numpy", *ONE_CONFIG, "--clause", "shape", folder=tmp_path)
    results = tmp_path / "results" / "numpy.json"
    baseline = tmp_path / "baseline.json"
    baseline.write_bytes(results.read_bytes())
    same = kvconform("gate", str(results), "--baseline", str(baseline), folder=tmp_path)
    assert (same.returncode, same.stdout) == (0, "numpy: no regression\n")
    data = json.loads(results.read_text())
    del data["verdicts"][0]
    results.write_text(json.dumps(data))
    lost = kvconform("gate", str(results), "--baseline", str(baseline), folder=tmp_path)
    assert lost.returncode == 5
    words = "1 cell of the baseline not judged: only clauses shape, configs attention-gqa"
    assert lost.stdout == f"undecided: numpy: {words}\nnumpy: undecided\n"
    results.write_text(json.dumps({**data, "clauses": [], "configs": []}))
    lost = kvconform("gate", str(results), "--baseline", str(baseline), folder=tmp_path)
    assert lost.returncode == 4
    assert "regression: numpy: shape.output [attention-gqa]: was pass, is gone" in lost.stdout


@pytest.mark.slow
def test_shards_exit_with_0_and_their_merge_concludes(tmp_path: Path) -> None:
    asked = ("run", "-b", "numpy", *ONE_CONFIG, "--clause", "shape", "--clause", "lifecycle.reset")
    for shard in ("1/2", "2/2"):
        done = kvconform(*asked, "--shard", shard, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"numpy: shard {shard}: " in done.stdout
        assert "conformant:" not in done.stdout
    parts = [f"results/shards/numpy-{index}-of-2.json" for index in (1, 2)]
    half = kvconform("merge", parts[1], "-o", "half.json", folder=tmp_path)
    assert (half.returncode, half.stderr) == (2, "kvconform: merge: shard 1/2 is missing\n")
    assert not (tmp_path / "half.json").exists()
    whole = kvconform("merge", *parts, "-o", "results/numpy.json", folder=tmp_path)
    assert whole.returncode == 0
    assert "numpy: the selected part passed: " in whole.stdout
    assert read(tmp_path / "results" / "numpy.json").shard == ""


@pytest.mark.slow
def test_an_empty_claim_exits_with_5_and_names_what_is_missing(tmp_path: Path) -> None:
    done = kvconform("run", "-b", f"{SUBJECTS}:ClaimsNothing", *ONLY_CORE, folder=tmp_path)
    assert done.returncode == 5
    assert "no PASS on the core clauses" in done.stdout


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_without_repeating_what_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvconform", "run", "-b", "numpy", *ONE_CONFIG]
    path = tmp_path / "results" / "numpy.json"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not (path.exists() and len(read(path).verdicts) >= 3):
            assert time.monotonic() < deadline, "no three verdicts within a minute"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    killed = read(path)
    assert not killed.finished
    done = subprocess.run(command, cwd=tmp_path, check=False, stdout=subprocess.DEVNULL)
    assert done.returncode == 0
    resumed = read(path)
    assert resumed.finished
    count = len(killed.verdicts)
    assert resumed.verdicts[:count] == killed.verdicts  # seconds and all: they were not judged again
    assert len(resumed.verdicts) > count


@pytest.mark.slow
def test_the_spec_prints_every_clause_and_explains_one(tmp_path: Path) -> None:
    whole = kvconform("spec", folder=tmp_path).stdout
    one = kvconform("spec", "causality.future-blind", folder=tmp_path).stdout
    assert "lifecycle.independent (must)" in whole
    assert "causality.future-blind (must, core)" in one
    assert "real bug: https://github.com/QwenLM/Qwen/issues/979" in one
    assert "lifecycle" not in one


@pytest.mark.slow
def test_backends_are_listed_with_what_they_claim(tmp_path: Path) -> None:
    listed = kvconform("backends", folder=tmp_path).stdout
    assert "numpy: ready (attention, decoder; float32" in listed
    assert {line.partition(":")[0] for line in listed.splitlines()} >= {"numpy", "eager", "compiled", "onnx"}


@pytest.mark.slow
def test_cuda_without_a_gpu_exits_with_3_and_one_sentence(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for backend in ("eager", "onnx"):
        done = kvconform("run", "-b", backend, "--device", "cuda", *ONE_CONFIG, folder=tmp_path)
        assert done.returncode == 3, done.stdout
        assert "CUDA" in done.stdout
        assert "Traceback" not in done.stdout + done.stderr


def test_a_quiet_run_prints_its_conclusion_only(tmp_path: Path) -> None:
    cell = ("--effort", "smoke", "--config", "attention-gqa", "--clause", "shape.output", "--quiet")
    done = kvconform("run", "-b", "numpy", *cell, folder=tmp_path)
    words = "numpy: the selected part passed: 1 cell; conformance needs the whole suite\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, words, "")


@pytest.mark.slow
def test_a_run_writes_junit_of_all_its_backends(tmp_path: Path) -> None:
    cell = ("--effort", "smoke", "--config", "attention-gqa", "--clause", "definition.attention")
    both = ("run", "-b", "numpy", "-b", f"{SUBJECTS}:PrintsAndIsWrong", *cell, "--quiet", "--junit", "out/junit.xml")
    assert kvconform(*both, folder=tmp_path).returncode == 1
    suites = ET.parse(tmp_path / "out" / "junit.xml").getroot()
    counts = [(suite.get("name"), suite.get("tests"), suite.get("failures")) for suite in suites]
    assert counts == [("numpy", "1", "0"), ("PrintsAndIsWrong", "1", "1")]
