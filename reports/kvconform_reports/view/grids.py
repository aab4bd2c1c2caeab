"""The speed record's plain tables: scaling, memory, roofline, throughput by batch, and what a restart does once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvconform.bench.record import Arm, Exponent, Memory, Once, Record
from kvconform_reports.view.figures import Unit, digits, octets, operations, roofline
from kvconform_reports.view.findings import GENERATING, Findings, Numbered

Row = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Grid:
    """Texts under columns; an empty one was not measured. ``corner``: what the rows' heads are. ``groups``: rows that
    belong together, under a head of their own where ``corner`` has two."""

    caption: str
    corner: tuple[str, ...]
    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]


def scaling(record: Record, preset: str, batch: int) -> Grid | None:
    """Exponents beside the expected ones, a row for each backend."""
    found = [e for e in record.exponents if (e.preset, e.batch) == (preset, batch)]
    phases = tuple(dict.fromkeys(e.phase for e in found))
    spans = list(dict.fromkeys(_depths(e.depths) for e in found))
    same = spans[0] if len(spans) == 1 else ""
    texts = {(e.backend, e.phase): exponent(e) + ("" if same else f" from {_depths(e.depths)}") for e in found}
    rows = [(name, tuple(texts.get((name, p), "") for p in phases)) for name in dict.fromkeys(e.backend for e in found)]
    heads = tuple("recompute / decode" if phase == "ratio" else phase for phase in phases)
    return _grid(f"Exponent of the growth with depth{same and f' from {same}'}", ("Backend",), heads, [("", rows)])


def exponent(e: Exponent) -> str:
    ends = "" if e.low is None or e.high is None else f" [{e.low:.2f}, {e.high:.2f}]"
    return f"{e.exponent:.2f}{ends} (expected {e.expected:.2f})"


def _depths(depths: Sequence[int]) -> str:
    return f"{min(depths)} to {max(depths)}" if depths else "no depth"


def memory(found: Sequence[Memory]) -> Grid | None:
    """The cache's bytes as the formula gives them, as reported, as the process grew, and in the GPU's allocator."""
    kinds: list[tuple[str, list[int | None]]] = [
        ("by formula", [m.analytic for m in found]),
        ("reported by the backend", [m.reported for m in found]),
        ("growth of the process", [m.resident for m in found]),
        ("GPU allocator", [m.allocated for m in found]),
    ]
    kept = [(name, values) for name, values in kinds if any(value is not None for value in values)]
    groups = [
        (
            str(depth),
            [
                (m.backend, tuple(octets(values[i]) for _, values in kept))
                for i, m in enumerate(found)
                if m.depth == depth
            ],
        )
        for depth in sorted({m.depth for m in found})
    ]
    return _grid("Memory of the cache", ("Depth", "Backend"), [name for name, _ in kept], groups)


def roofs(findings: Findings, cases: Iterable[Numbered], one: Unit) -> Grid | None:
    """What a decode step must move and compute at least, and how long that takes this machine."""
    groups: dict[int, list[Row]] = {}
    for number, case in cases:
        for i, arm in enumerate(case.arms):
            roof = findings.roofs.get((number, i))
            if roof is not None:
                texts = octets(roof.bytes_min), octets(roof.bytes_expected), operations(roof.flops), one.of(roof.floor)
                groups.setdefault(case.depth, []).append((arm.backend, (*texts, roofline(roof).words)))
    columns = ("bytes at least", "bytes of its design", "FLOPs", f"floor, {one.name}", "floor / time")
    return _grid(
        "Roofline of a decode step", ("Depth", "Backend"), columns, [(str(n), rows) for n, rows in groups.items()]
    )


def throughput(findings: Findings, preset: str, batches: Iterable[int]) -> Grid | None:
    """Tokens a second by batch, where there are several."""
    found: dict[tuple[int, int, Arm], dict[int, str]] = {}
    for batch in batches:
        for cases in findings.generating(preset, batch):
            for arm in findings.arms(cases, GENERATING):
                one = findings.generation(cases, arm)
                if one is not None:
                    key = cases[0][1].depth, cases[0][1].new, arm
                    found.setdefault(key, {})[batch] = digits(one.throughput)
    columns = sorted({batch for texts in found.values() for batch in texts})
    groups: dict[str, list[Row]] = {}
    for (depth, new, arm), texts in found.items():
        row = f"{arm.backend} {arm.phase}", tuple(texts.get(batch, "") for batch in columns)
        groups.setdefault(f"{new} after {depth}", []).append(row)
    heads = [f"batch {batch}" for batch in columns]
    corner = ("Tokens", "Backend and phase")
    return _grid("Throughput, tokens a second", corner, heads, list(groups.items())) if len(heads) > 1 else None


def once(found: Iterable[Once], preset: str) -> Grid | None:
    """A column for each backend; each cell has the seconds of all restarts, in their order."""
    mine = sorted((o for o in found if o.preset == preset), key=lambda o: o.restart)
    backends = list(dict.fromkeys(o.backend for o in mine))
    rows = [_seconds("load: start of the worker", backends, [(o.backend, o.load) for o in mine])]
    rows.append(_seconds("build of the backend", backends, [(o.backend, o.build) for o in mine]))
    for phase in dict.fromkeys(phase for o in mine for phase in o.compile):
        texts = [(o.backend, o.compile[phase]) for o in mine if phase in o.compile]
        rows.append(_seconds(f"first call of {phase}", backends, texts))
    return _grid("Once in each restart, seconds", ("What",), backends, [("", rows if mine else [])])


def _seconds(what: str, backends: Iterable[str], found: Sequence[tuple[str, float]]) -> Row:
    return what, tuple(" · ".join(digits(s) for name, s in found if name == backend) for backend in backends)


def _grid(
    caption: str, corner: tuple[str, ...], columns: Sequence[str], groups: Sequence[tuple[str, Sequence[Row]]]
) -> Grid | None:
    kept = tuple((head, tuple(rows)) for head, rows in groups if rows)
    return Grid(caption, corner, tuple(columns), kept) if kept else None
