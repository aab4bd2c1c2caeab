"""The power of a set of vectors: what counts as detected, and a sample of what docs/vectors-power.json says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import kvconform
from places import ROOT

from kvconform.mutation.fault import Fault
from kvconform.run.run import plan_for
from kvconform.vectors.power import Power, power, read, tried
from kvconform.vectors.write import write
from kvconform_backends.faults import FAULTS

RECORDED = read(ROOT / "docs" / "vectors-power.json")
DETECTED = [one for one in RECORDED.faults if one.detected_by]
BY_NAME = {fault.name: fault for fault in FAULTS}
LEAST = 0.9
"""The share of the faults that outputs can show which the core set detects, at least."""
MOST = 20_000_000
"""Bytes of the core set."""


def test_the_core_set_detects_most_of_the_faults_that_outputs_can_show() -> None:
    assert {one.fault for one in RECORDED.faults} <= BY_NAME.keys()
    shown = [one for one in RECORDED.faults if one.shown]
    assert (RECORDED.shown, RECORDED.detected) == (len(shown), len([one for one in shown if one.detected_by]))
    assert RECORDED.detected >= LEAST * RECORDED.shown
    assert RECORDED.shown >= 0.75 * len(RECORDED.faults)


def test_the_core_set_is_small_enough_to_be_attached_to_a_release() -> None:
    assert 0 < RECORDED.bytes < MOST
    assert RECORDED.vectors > 500


@pytest.mark.slow
@pytest.mark.parametrize("one", DETECTED[::40], ids=lambda one: one.fault)
def test_a_recorded_detection_can_be_repeated(one: object, tmp_path: Path) -> None:
    assert isinstance(one, type(DETECTED[0]))
    config, _, name = one.detected_by.partition("/")
    plan = plan_for("smoke", clauses=(name.rpartition("-")[0],), configs=(config,))
    manifest = write(tmp_path / "set", plan)
    again = tried(tmp_path / "set", manifest, BY_NAME[one.fault])
    assert again.shown
    assert again.detected_by.startswith(one.detected_by.rpartition("-")[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("power") / "set"
    write(made, plan_for("smoke", clauses=("equivalence.decode", "lifecycle.reset"), configs=("attention-gqa",)))
    return made


def found(folder: Path, *faults: Fault) -> Power:
    return power(folder, faults)


def test_a_fault_whose_clauses_have_no_vectors_is_not_shown(folder: Path) -> None:
    (one,) = found(folder, Fault("elsewhere", "numpy", ("accounting.bytes",))).faults
    assert (one.shown, one.detected_by) == (False, "")
    assert one.sentence == "no vectors of its clauses on its configs"


def test_a_right_backend_is_shown_and_not_detected(folder: Path) -> None:
    result = found(folder, Fault("right", "numpy"))
    assert (result.shown, result.detected) == (1, 0)
    assert result.faults[0].sentence == "no vector detects it"


def test_a_detection_counts_only_if_the_faulty_path_ran(folder: Path) -> None:
    wrong = "kvconform_backends.faults.causality:DecodeSeesOneLess"
    (one,) = found(folder, Fault("ran", wrong)).faults
    assert one.detected_by.startswith("attention-gqa/equivalence.decode")
    assert found(folder, Fault("never", wrong, marker="graphs")).detected == 1  # it counts nothing by that name


def test_a_quantised_cache_is_not_tried(folder: Path) -> None:
    result = found(folder, Fault("int8", "numpy-int8"))
    assert (result.shown, result.detected) == (0, 0)
    assert "not tried: the set is for caches in the config's dtype" in result.faults[0].sentence


def test_the_command_exits_with_1_while_a_fault_survives(folder: Path, tmp_path: Path) -> None:
    done = kvconform("vectors", "power", str(folder), "reset", "-o", "power.json", folder=tmp_path)
    recorded = json.loads((tmp_path / "power.json").read_text())
    assert done.returncode == int(recorded["detected"] < recorded["shown"])
    assert f"{recorded['detected']} of {recorded['shown']} faults that outputs can show are detected" in done.stdout
    assert recorded["detected"] > 0
