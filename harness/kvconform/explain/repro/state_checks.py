"""What a subject says and shows of its cache, compared in Python source: the relations of ``bookkeeping``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvconform.explain.repro.calls import cache
from kvconform.explain.repro.failure import Check, Failure, compared, rows, same, wanted, worst
from kvconform.explain.repro.inputs import Run
from kvconform_specs.clause import Relation
from kvconform_specs.program import Append


def _tells(ability: str, listed: bool = True) -> Check:
    def told(failure: Failure, runs: Sequence[Run], backend: str) -> list[str]:
        name = cache(getattr(failure.one.program.steps[failure.step], "seq", ""))
        call = f"{backend}.{ability}({name})"
        return compared(f"[int(n) for n in {call}]" if listed else call, failure.want, "got != want", f"{ability} ")

    return told


def _graphs(failure: Failure, _runs: Sequence[Run], backend: str) -> list[str]:
    most = failure.one.claims.max_graphs or 0
    return compared(f"{backend}.graph_count()", str(most), "got > want", "graphs, at most ")


def _positions(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    least, most = map(int, re.findall(r"\d+", failure.want)[:2])
    return compared(
        runs[-1].name("work", failure.step),
        f"({least}, {most})",
        "not want[0] <= got <= want[1]",
        "multiply-adds within ",
    )


def _affine(failure: Failure, runs: Sequence[Run], backend: str) -> list[str]:
    steps = failure.one.program.steps
    last = steps[failure.step]
    assert isinstance(last, Append)
    alike = [n for n, s in enumerate(steps[: failure.step + 1]) if _metered(s) == (last.seq, last.counts)][-3:]
    sizes = [max(map(len, rows(failure.one, n, last.seq))) for n in alike]
    most = int(failure.sentence.rpartition("slope ")[2].split()[0])
    w, s = [runs[-1].name("work", n) for n in alike], sizes
    grows = f"0 <= {w[1]} - {w[0]} <= {most * (s[1] - s[0])}"
    line = f"({w[1]} - {w[0]}) * {s[2] - s[1]} == ({w[2]} - {w[1]}) * {s[1] - s[0]}"
    want = f'"a line of slope {most} at most over the depths {s}"'
    return compared(f"[{', '.join(w)}]", want, f"not ({grows} and {line})", "multiply-adds on ")


def _metered(step: object) -> tuple[str, tuple[int, ...]] | None:
    return (step.seq, step.counts) if isinstance(step, Append) and step.count_macs else None


def _held(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, (least, *most) = failure.number("row"), [int(n) for n in re.findall(r"\d+", failure.want)]
    shown = f"max(layer[{row}][0].shape[1] for layer in {runs[-1].name('held', failure.step)})"
    return compared(
        shown, f"({least}, {(most or [least])[0]})", "not want[0] <= got <= want[1]", "tokens shown, within "
    )


def _contents(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, position = failure.number("row"), failure.number("position")
    want = failure.one.want(failure.step)
    kind, head = _part(failure)
    c = failure.one.program.config
    cut = slice((kind * c.kv_heads + head) * c.head_dim, (kind * c.kv_heads + head + 1) * c.head_dim)
    value, bound = want.value[0, row, position, cut], want.bound[0, row, position, cut]
    shown, slot = _slot(failure, failure.step, row, position)
    output = failure.one.trace[failure.step].output
    assert output is not None
    return [
        f"got = {runs[-1].name('held', failure.step)}[0][{row}][{kind}][{head}, {shown}]  # position {position}",
        *wanted(output[0, row, slot, cut], value, bound),
        "off = ~(np.abs(got - want) <= bound)",
        *worst(),
    ]


def _kept(failure: Failure, runs: Sequence[Run], _backend: str) -> list[str]:
    row, position = failure.number("row"), failure.number("position")
    since = int(failure.sentence.rpartition("at step ")[2].split()[0])
    seq = getattr(failure.one.program.steps[failure.step], "seq", "")
    history = rows(failure.one, failure.step, seq)[row][: position + 1]
    earlier = rows(failure.one, since, getattr(failure.one.program.steps[since], "seq", ""))
    was = next(r for r, tokens in enumerate(earlier) if tokens[: position + 1] == history)
    layer = int(failure.sentence.partition(", layer ")[2].partition(",")[0])
    kind, head = _part(failure)
    names = [
        f"{runs[-1].name('held', step)}[{layer}][{r}][{kind}][{head}, {_slot(failure, step, r, position, layer)[0]}]"
        for step, r in ((failure.step, row), (since, was))
    ]
    return [f"got = {names[0]}  # position {position}", f"want = {names[1]}", *same("as it was")]


def _part(failure: Failure) -> tuple[int, int]:
    """0 for a key or 1 for a value, and its KV head."""
    found = re.search(r", (key|value) of KV head (\d+)", failure.sentence)
    assert found is not None, failure.sentence
    return int(found[1] == "value"), int(found[2])


def _slot(failure: Failure, step: int, row: int, position: int, layer: int | None = None) -> tuple[str, int]:
    """Where a read shows the token: counted from the end of what a layer shows, and in the trace's array."""
    seq = getattr(failure.one.program.steps[step], "seq", "")
    length, held = len(rows(failure.one, step, seq)[row]), failure.one.trace[step].reported["token_counts"][row]
    back = length - position
    return f"-{back}", held - back


TOLD: dict[Relation, Check] = {
    Relation.LENGTHS: _tells("length"),
    Relation.FREE_SLOTS: _tells("free_slots"),
    Relation.BYTES: _tells("bytes", listed=False),
    Relation.CONTENTS: _contents,
    Relation.STABLE_CONTENTS: _kept,
    Relation.RETAINED_COUNT: _held,
    Relation.GRAPH_COUNT: _graphs,
    Relation.POSITIONS: _positions,
    Relation.LINEAR_COST: _affine,
}
