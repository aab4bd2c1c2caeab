"""The study of conditions tells right conditions from wrong and weak ones, on programs that no diagnosis runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from conditions import HeldOut, judged, programs
from places import SUPPORT

from kvconform.explain.diagnosis.record import Condition
from kvconform.explain.diagnosis.symptoms import OutputCell
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.configs import CONFIGS

CONFIG = CONFIGS["attention-gqa"]


@pytest.fixture(scope="module")
def cells() -> Sequence[OutputCell]:
    """Of a backend that is wrong from a length of 13 on."""
    with WorkerClient(WorkerSpec(f"{SUPPORT / 'conditional_faults.py'}:LengthFrom13")) as client:
        assert len(programs(client, CONFIG)) > 50
        return HeldOut().cells(client, CONFIG)


@pytest.mark.parametrize(
    ("predicates", "outcome"),
    [
        (["with length after the step ≥ 13"], "right"),
        (["with length after the step ≥ 14"], "wrong"),
        (["with length after the step ≥ 3"], "weak"),
        (["with length after the step ≥ 13", "with batch > 1"], "wrong"),
        (["after a refused call"], "wrong"),
        ([], "wrong"),
    ],
)
def test_a_condition_is_tested_on_other_programs(
    cells: Sequence[OutputCell], predicates: list[str], outcome: str
) -> None:
    found = Condition(predicates=predicates, wrong=1, right=1, wrong_met=1, right_met=0)
    assert judged(found, cells, CONFIG)[0] == outcome


def test_no_condition_is_silent(cells: Sequence[OutputCell]) -> None:
    assert judged(None, cells, CONFIG)[0] == "silent"


def test_a_condition_that_no_output_meets_is_untested(cells: Sequence[OutputCell]) -> None:
    found = Condition(predicates=["with padding on the left"], wrong=1, right=1, wrong_met=1, right_met=0)
    assert judged(found, [cell for cell in cells if not cell.wrong], CONFIG)[0] == "untested"
