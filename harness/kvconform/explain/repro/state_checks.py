"""What a backend reports and shows of its cache, compared in Python source: the relations of ``cache_state``."""

from __future__ import annotations

from collections.abc import Sequence

from kvconform.explain.repro.calls import cache
from kvconform.explain.repro.failure import Check, Failure, compared, rows, same, wanted, worst
from kvconform.explain.repro.inputs import Run
from kvconform_specs.clause import Relation
from kvconform_specs.reference.quantisation import grid_error


def _tells(ability: str) -> Check:
    def told(failure: Failure, runs: Sequence[Run], backend: str) -> list[str]:
        name = cache(getattr(failure.one.program.steps[failure.step], "seq", ""))
        call, want = f"{backend}.{ability}({name})", failure.mismatch.want
        if failure.mismatch.want_max not in (None, want):
            both = f"({want}, {failure.mismatch.want_max})"
            return compared(call, both, "not want[0] <= got <= want[1]", f"{ability} within ")
        got, expected = (f"[int(n) for n in {call}]", list(want)) if isinstance(want, tuple) else (call, want)
        return compared(got, f"{expected}", "got != want", f"{ability} ")

    return told


def _graphs(failure: Failure, _runs: Sequence[Run], backend: str) -> list[str]:
    return compared(f"{backend}.graph_count()", str(failure.mismatch.want_max), "got > want", "graphs, at most ")


def _positions(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    return compared(
        runs[-1].name("work", failure.step),
        f"({failure.mismatch.want}, {failure.mismatch.want_max})",
        "not want[0] <= got <= want[1]",
        "multiply-adds within ",
    )


def _affine(failure: Failure, runs: Sequence[Run], backend: str) -> list[str]:
    m = failure.mismatch
    assert m.want_max is not None
    w, s, most = [runs[-1].name("work", step) for step in m.steps], m.depths, m.want_max
    grows = f"0 <= {w[1]} - {w[0]} <= {most * (s[1] - s[0])}"
    line = f"({w[1]} - {w[0]}) * {s[2] - s[1]} == ({w[2]} - {w[1]}) * {s[1] - s[0]}"
    want = f'"a line of slope {most} at most over the depths {list(s)}"'
    return compared(f"[{', '.join(w)}]", want, f"not ({grows} and {line})", "multiply-adds on ")


def _held(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    m = failure.mismatch
    shown = f"max(layer[{m.row}][0].shape[1] for layer in {runs[-1].name('held', failure.step)})"
    return compared(shown, f"({m.want}, {m.want_max})", "not want[0] <= got <= want[1]", "tokens shown, within ")


def _contents(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, position, layer, kind, head = _place(failure)
    want, c = failure.one.want(failure.step), failure.one.program.config
    first = ((layer * 2 + kind) * c.kv_heads + head) * c.head_dim
    cut = slice(first, first + c.head_dim)
    value, bound = want.value[0, row, position, cut], want.bound[0, row, position, cut]
    back, slot = _slot(failure, failure.step, row, position)
    output = failure.one.trace[failure.step].output
    assert output is not None
    shown = f"{runs[-1].name('held', failure.step)}[{layer}][{row}][{kind}][{head}, -{back}]"
    return [
        f"got = {shown}  # position {position}",
        *wanted(output[0, row, slot, cut], value, bound),
        "off = ~(np.abs(got - want) <= bound)",
        *worst(),
    ]


def _quantised(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, position, layer, kind, head = _place(failure)
    back, _at = _slot(failure, failure.step, row, position)
    largest = 2 ** (failure.one.claims.kv_bits - 1) - 1
    return [
        f"got = {runs[-1].name('held', failure.step)}[{layer}][{row}][{kind}][{head}, -{back}]  # position {position}",
        f"groups = np.arange(len(got)) // {failure.one.claims.quantiser.group or 'len(got)'}  # that share a step",
        f"unit = np.array([np.abs(got[groups == g]).max() for g in groups]) / {largest}  # of the largest integer",
        "want = np.rint(got / unit) * unit",
        f"bound = {grid_error(largest, failure.one.program.config.dtype):.3g} * unit",
        "off = ~(np.abs(got - want) <= bound)",
        *worst(),
    ]


def _kept(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, position, layer, kind, head = _place(failure)
    other = failure.mismatch.other
    assert other is not None and other.step is not None and other.row is not None
    names = [
        f"{runs[-1].name('held', step)}[{layer}][{r}][{kind}][{head}, -{_slot(failure, step, r, position)[0]}]"
        for step, r in ((failure.step, row), (other.step, other.row))
    ]
    return [f"got = {names[0]}  # position {position}", f"want = {names[1]}", *same("as it was")]


def _inputs(_failure: Failure, _runs: Sequence[Run], _backend: str) -> list[str]:
    return compared("memory.overwritten()", "None", "got is not None", "inputs and the memory around them as given: ")


def _outputs(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    m, name = failure.mismatch, runs[-1].name("y", failure.step)
    at = f"{name}[{', '.join(map(str, m.index))}]"
    want = f"float({m.want!r})" if isinstance(m.want, str) else repr(m.want)
    return compared(f"float({at})", want, "got != want", "as it was when the step returned it: ")


def _place(failure: Failure) -> tuple[int, int, int, int, int]:
    """Row, position, layer, 0 for a key or 1 for a value, and KV head of a number that a read shows."""
    m = failure.mismatch
    assert m.row is not None and m.position is not None and m.layer is not None and m.head is not None
    return m.row, m.position, m.layer, int(m.part == "value"), m.head


def _slot(failure: Failure, step: int, row: int, position: int) -> tuple[int, int]:
    """Where a read shows a token: counted back from the end of what a layer shows, and from the front of the trace's
    array."""
    seq = getattr(failure.one.program.steps[step], "seq", "")
    back = len(rows(failure.one, step, seq)[row]) - position
    return back, failure.one.trace[step].reported["token_counts"][row] - back


TOLD: dict[Relation, Check] = {
    Relation.LENGTHS: _tells("length"),
    Relation.FREE_SLOTS: _tells("free_slots"),
    Relation.BYTES: _tells("bytes"),
    Relation.CONTENTS: _contents,
    Relation.QUANTISED: _quantised,
    Relation.STABLE_CONTENTS: _kept,
    Relation.RETAINED_COUNT: _held,
    Relation.INPUTS: _inputs,
    Relation.OUTPUTS: _outputs,
    Relation.GRAPH_COUNT: _graphs,
    Relation.POSITIONS: _positions,
    Relation.LINEAR_COST: _affine,
}
