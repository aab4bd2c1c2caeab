"""The relations that look at what a backend says and shows: what they accuse, and what they let pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvconform.judging.judge import RELATIONS, judge
from kvconform.judging.mismatch import Kind, Place
from kvconform.judging.observed import Checked
from kvconform.worker.execute import Trace, execute
from kvconform.worker.protocol import pack, unpack
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_backends.numpy.static import NumpyStatic
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Relation
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import Append, Program, ReadCache, Reorder
from kvconform_specs.reference.oracle import expect
from kvconform_specs.strategies import alone, appends, arranged
from kvconform_specs.tensors import weights

CONFIG, DECODER = CONFIGS["attention-gqa"], CONFIGS["decoder-rope"]
GROWING = Program(
    CONFIG, (Append("a", (4, 4), 5), ReadCache("a"), Reorder("a", (1, 0)), Append("a", (2, 2), 5), ReadCache("a"))
)
METERED = Program(CONFIG, tuple(Append("a", (2,), 5, count_macs=True) for _ in range(4)))
READ_BEFORE = Place(program=0, step=1, call="read_cache a", row=0, position=2)
"""Row 1 was row 0 before the reorder."""
Spoil = Callable[[Trace], Trace]


def judged(
    case: Case,
    relation: Relation,
    spoil: Spoil = lambda t: t,
    claims: Claims = NumpyCache.claims,
    kind: type = NumpyCache,
) -> Checked:
    """The verdict on a numpy cache's traces, those of the last program changed by ``spoil``."""
    config = case.programs[0].config
    backend, traces = kind(config, {}), []
    for number, program in enumerate(case.programs):
        made = execute(backend, program, (0, 1))
        if number == len(case.programs) - 1:
            made = [spoil(trace) for trace in made]
        traces.append(unpack(*pack(made)))
    return judge(case, [relation], claims, traces, [expect(p, (0, 1), claims.precision) for p in case.programs])


def told(step: int, name: str, *numbers: int) -> Spoil:
    def change(trace: Trace) -> Trace:
        return tuple(
            replace(done, reported={**done.reported, name: numbers}) if i == step else done
            for i, done in enumerate(trace)
        )

    return change


def shown(step: int, row: int, slot: int, element: int, value: float) -> Spoil:
    def change(trace: Trace) -> Trace:
        output = np.array(trace[step].output)
        output[row, slot, element] = value
        return (*trace[:step], replace(trace[step], output=output), *trace[step + 1 :])

    return change


def test_every_relation_is_judged() -> None:
    assert set(RELATIONS) == set(Relation)
    assert {relation.name for relation in Relation} <= {kind.name for kind in Kind}


@pytest.mark.parametrize(
    ("relation", "program", "spoil", "facts"),
    [
        (Relation.FREE_SLOTS, GROWING, told(3, "free_slots", 34, 33), {"step": 3, "got": (34, 33), "want": (34, 34)}),
        (Relation.LENGTHS, GROWING, told(2, "length", 4, 5), {"step": 2, "got": (4, 5), "want": (4, 4)}),
        (
            Relation.RETAINED_COUNT,
            GROWING,
            told(4, "token_counts", 6, 5),
            {"step": 4, "row": 1, "got": 5, "want": 6, "want_max": 6},
        ),
        (
            Relation.CONTENTS,
            GROWING,
            shown(1, 1, 3, 9, 0.5),
            {"step": 1, "row": 1, "position": 3, "layer": 0, "part": "key", "head": 1, "element": 1, "got": 0.5},
        ),
        (
            Relation.CONTENTS,
            GROWING,
            shown(4, 0, 5, 24, np.nan),
            {"position": 5, "layer": 0, "part": "value", "head": 0, "element": 0, "got": "nan"},
        ),
        (
            Relation.STABLE_CONTENTS,
            GROWING,
            shown(4, 1, 2, 0, 0.5),
            {"step": 4, "row": 1, "position": 2, "part": "key", "head": 0, "got": 0.5, "other": READ_BEFORE},
        ),
        (Relation.BYTES, GROWING, told(3, "bytes", 6 * 2 * 6 * 3 * 8 * 4), {"step": 3, "want": 2304}),
        (
            Relation.POSITIONS,
            METERED,
            told(3, "macs", 2 * 6 * 8 * 8 * 8),
            {"step": 3, "got": 6144, "want": 0, "new_tokens": 2, "depths": (8,)},
        ),
        (
            Relation.LINEAR_COST,
            METERED,
            told(3, "macs", 2 * 6 * 2 * 8 * 7),
            {"step": 3, "want_max": 192, "steps": (1, 2, 3), "depths": (4, 6, 8)},
        ),
    ],
)
def test_a_wrong_book_is_found_and_a_right_one_is_not(
    relation: Relation, program: Program, spoil: Spoil, facts: dict[str, Any]
) -> None:
    clean = judged(Case((program,)), relation)
    assert clean.mismatch is None
    assert clean.compared > 0
    found = judged(Case((program,)), relation, spoil).mismatch
    assert found is not None
    assert found.kind is Kind[relation.name]
    assert {name: getattr(found, name) for name in facts} == facts


def test_bytes_follow_the_claim() -> None:
    """A buffer of the capacity is not what its length says, and the other way round."""
    program = Program(CONFIG, (Append("a", (3,), 5),))
    assert judged(Case((program,)), Relation.BYTES, claims=NumpyStatic.claims, kind=NumpyStatic).mismatch is None
    wrong = replace(NumpyStatic.claims, memory="length")
    assert judged(Case((program,)), Relation.BYTES, claims=wrong, kind=NumpyStatic).mismatch is not None


def test_more_graphs_than_claimed_are_found() -> None:
    claims = replace(NumpyCache.claims, max_graphs=2)
    case = Case((Program(CONFIG, (Append("a", (3,), 5),)),))
    assert judged(case, Relation.GRAPH_COUNT, told(0, "graph_count", 2), claims).mismatch is None
    found = judged(case, Relation.GRAPH_COUNT, told(0, "graph_count", 3), claims).mismatch
    assert found is not None
    assert (found.kind, found.step, found.got, found.want_max) == (Kind.GRAPH_COUNT, 0, 3, 2)


def test_a_cache_that_evicts_may_show_less_and_no_less_than_the_window() -> None:
    window = CONFIGS["attention-window"]
    case = Case((Program(window, (Append("a", (9,), 5), ReadCache("a"))),))
    claims = replace(NumpyCache.claims, retention="window")

    def evicted(held: int) -> Spoil:
        def change(trace: Trace) -> Trace:
            output = np.array(trace[1].output)[:, -held:]
            return (trace[0], replace(trace[1], output=output, reported={"token_counts": (held,)}))

        return change

    assert judged(case, Relation.RETAINED_COUNT, evicted(4), claims).mismatch is None
    assert judged(case, Relation.CONTENTS, evicted(4), claims).mismatch is None
    assert judged(case, Relation.RETAINED_COUNT, evicted(3), claims).mismatch is not None
    assert (
        judged(case, Relation.RETAINED_COUNT, evicted(4)).mismatch is not None
    )  # who claims to keep all must show all


def test_bitwise_takes_no_bound() -> None:
    base = Program(CONFIG, appends("a", (4, 2), 2, 5))
    case = Case((base, alone(base, 1)))
    assert judged(case, Relation.AGREEMENT).mismatch is None

    def last_bit(trace: Trace) -> Trace:
        output = np.array(trace[1].output)
        output[0, 2, 1, 3] = np.nextafter(output[0, 2, 1, 3], np.float32(9))
        return (trace[0], replace(trace[1], output=output))

    assert judged(case, Relation.AGREEMENT, last_bit).mismatch is None
    found = judged(case, Relation.BITWISE, last_bit).mismatch
    assert found is not None
    assert (found.kind, found.row, found.position, found.head, found.element) == (Kind.BITWISE, 0, 5, 2, 3)
    assert found.other == Place(program=0, step=1, call="append 2 to a of 2 rows", row=1, position=5, column=1)


def test_a_permuted_batch_is_compared_row_by_row() -> None:
    base = Program(CONFIG, appends("a", (4, 2), 3, 5))
    turned = Program(CONFIG, arranged("a", (4, 2), (2, 0, 1), 5))
    assert judged(Case((base, turned)), Relation.AGREEMENT).compared == 2 * 3 * 6 * 48  # variants, rows, tokens, h d

    def unturned(trace: Trace) -> Trace:
        return tuple(replace(done, output=np.array(done.output)[[1, 2, 0]]) for done in trace)

    assert judged(Case((base, turned)), Relation.AGREEMENT, unturned).mismatch is not None


def test_infinity_is_no_finite_output() -> None:
    case = Case((Program(CONFIG, appends("a", (4,), 2, 5)),))

    def infinite(trace: Trace) -> Trace:
        output = np.array(trace[0].output)
        output[1, 0, 0, 0] = np.inf
        return (replace(trace[0], output=output),)

    assert judged(case, Relation.FINITE).mismatch is None
    found = judged(case, Relation.FINITE, infinite).mismatch
    assert found is not None
    assert (found.kind, found.row, found.position, found.head, found.got) == (Kind.FINITE, 1, 0, 0, "inf")


def test_the_token_is_compared_only_where_it_is_sure() -> None:
    """Where two logits tie within their bounds either may win; where one leads by more, it must."""

    class Decoder(NumpyCache):
        def __init__(self, config: object, _weights: object) -> None:
            super().__init__(DECODER, weights(DECODER))

    case = Case((Program(DECODER, appends("a", (4,), 2, 5)),))
    clean = judged(case, Relation.SAME_TOKEN, kind=Decoder)
    assert clean.mismatch is None
    assert 0 < clean.compared <= 2 * 2 * 4

    def other(trace: Trace) -> Trace:
        output = np.array(trace[0].output)
        output[0, 1, output[0, 1].argmin()] = 1e3
        return (replace(trace[0], output=output),)

    found = judged(case, Relation.SAME_TOKEN, other, kind=Decoder).mismatch
    assert found is not None
    assert (found.kind, found.row, found.position, found.part) == (Kind.SAME_TOKEN, 0, 1, "logit")
    assert found.element == found.got != found.want


def test_a_step_that_gives_its_last_position_alone_may_spare_the_head_for_the_others() -> None:
    t, head = 5, DECODER.width * DECODER.vocabulary
    spared = []
    for last in (False, True):
        program = Program(DECODER, (Append("a", (t, t), 5, count_macs=True, last_only=last),))
        (trace,) = execute(NumpyCache(DECODER, weights(DECODER)), program, (0,))
        spared.append(trace[0].reported["macs"][0])

        def says(work: int, program: Program = program, trace: Trace = trace) -> bool:
            told_so = unpack(*pack([told(0, "macs", work)(trace)]))
            case, expected = Case((program,)), [expect(program, (0,))]
            return judge(case, [Relation.POSITIONS], NumpyCache.claims, [told_so], expected).mismatch is None

        matrices = (w.size for name, w in weights(DECODER).items() if w.ndim == 2 and name not in ("embed", "context"))
        least = 2 * t * sum(matrices) - last * 2 * (t - 1) * head
        assert says(trace[0].reported["macs"][0])
        assert says(least)
        assert not says(least - 1)
    assert spared[0] - spared[1] == 2 * (t - 1) * head
