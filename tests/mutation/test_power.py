"""The null-model power table rejects what it must, is blind where it must be, and never rejects the definition."""

from __future__ import annotations

import pytest

from kvconform.mutation.power import DEFINITION, FIELDS, NO_OUTPUTS, NULLS, Power, power_table, stored
from kvconform_specs.clause import Level, Relation
from kvconform_specs.clauses import ALL, BY_NAME
from kvconform_specs.config import DTYPES

MODELS = (DEFINITION, *NULLS)
ZEROS, MEAN, DROPPED, STALE, WIDE, NARROW, LATE, TILED, NEWEST, FIRST = (model.name for model in NULLS)
pytestmark = [pytest.mark.xdist_group("power"), pytest.mark.slow]  # the power table is computed once


@pytest.fixture(scope="module")
def entries() -> dict[tuple[str, str], Power]:
    return {(entry.clause, entry.model): entry for entry in power_table("float32", models=MODELS)}


def test_every_clause_has_an_entry_for_each_model_or_says_that_it_judges_no_numbers(
    entries: dict[tuple[str, str], Power],
) -> None:
    for clause in ALL:
        mine = [entry for (name, _model), entry in entries.items() if name == clause.name]
        if any(relation.judges_outputs for relation in clause.relations):
            assert [entry.model for entry in mine] == [model.name for model in MODELS]
            assert all(entry.note == "" for entry in mine)
        else:
            assert [(entry.note, entry.power) for entry in mine] == [(NO_OUTPUTS, None)]


def test_the_definition_is_never_wrong_and_never_rejected(entries: dict[tuple[str, str], Power]) -> None:
    mine = [entry for (_clause, model), entry in entries.items() if model == DEFINITION.name]
    assert all(entry.cases > 0 for entry in mine)
    assert [entry for entry in mine if entry.tried or entry.rejected] == []


def test_a_clause_of_parity_rejects_every_case_in_which_a_model_is_wrong(entries: dict[tuple[str, str], Power]) -> None:
    parity = [entry for (name, _), entry in entries.items() if Relation.PARITY in BY_NAME[name].relations]
    assert sum(entry.tried for entry in parity) > 1000
    assert [entry for entry in parity if entry.rejected < entry.tried] == []


@pytest.mark.parametrize("model", [ZEROS, MEAN, DROPPED, STALE, WIDE, NARROW, TILED, NEWEST, FIRST])
def test_the_definition_of_attention_rejects_all_that_apply(entries: dict[tuple[str, str], Power], model: str) -> None:
    entry = entries["definition.attention", model]
    assert entry.rejected == entry.tried > 0
    assert entry.tried >= entry.cases / 2


@pytest.mark.parametrize("model", [model.name for model in NULLS])
def test_the_definition_of_the_decoder_rejects_all(entries: dict[tuple[str, str], Power], model: str) -> None:
    assert entries["definition.decoder", model].power == 1


@pytest.mark.parametrize("clause", ["equivalence.decode", "equivalence.chunks", "lifecycle.reset", "batch.row-solo"])
def test_self_consistency_is_blind_to_what_all_paths_do_alike(
    entries: dict[tuple[str, str], Power], clause: str
) -> None:
    for model in NULLS:
        entry = entries[clause, model.name]
        assert entry.tried > 0
        assert entry.rejected == 0


def test_agreement_to_the_bit_is_blind_too(entries: dict[tuple[str, str], Power]) -> None:
    """A model's answer is a function of the history to the bit, however its arithmetic goes."""
    mine = [entry for (name, _), entry in entries.items() if BY_NAME[name].relations == (Relation.BITWISE,)]
    assert all(entry.tried for entry in mine if entry.model == ZEROS)
    assert [entry for entry in mine if entry.rejected] == []


def test_seeing_no_future_is_not_seeing_the_past(entries: dict[tuple[str, str], Power]) -> None:
    for model in (ZEROS, MEAN, DROPPED, STALE, NEWEST, FIRST):
        assert entries["causality.future-blind", model].power == 0
        assert (entries["causality.past-seen", model].power or 0) > 0.8


def test_being_finite_is_not_being_right(entries: dict[tuple[str, str], Power]) -> None:
    assert {entries["numerics.finite", model.name].rejected for model in NULLS} == {0}


def test_each_model_is_rejected_by_a_clause_that_must_hold(entries: dict[tuple[str, str], Power]) -> None:
    must = [clause.name for clause in ALL if clause.level is Level.MUST]
    for model in NULLS:
        assert sum(entries[name, model.name].rejected for name in must if (name, model.name) in entries) > 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_the_same_each_time(dtype: str) -> None:
    clauses = [BY_NAME["definition.positions"], BY_NAME["causality.visibility"]]
    first = power_table(dtype, clauses)
    assert first == power_table(dtype, clauses)
    assert {entry.dtype for entry in first} == {dtype}
    assert all(entry.power == 1 for entry in first if entry.tried)


def test_the_certificate_that_is_shipped_is_this_suite_s(entries: dict[tuple[str, str], Power]) -> None:
    """In one dtype, computed here; the others hold the same clauses and models."""
    again = "regenerate it with: kvconform power --write harness/kvconform/mutation/power_table.json"
    computed = [entry for (_clause, model), entry in entries.items() if model != DEFINITION.name]
    assert [{name: getattr(row, name) for name in FIELDS} for row in computed] == stored("float32"), again
    for dtype in DTYPES:
        assert [(row["clause"], row["model"]) for row in stored(dtype)] == [(r.clause, r.model) for r in computed]
