"""The speed section: every number is a field of the record, and where there is none the reason stands."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import msgspec
import pytest
from report_data import HOSTILE
from report_page import page, section, shape
from speed_data import DEPTHS, FLAG, PUBLISHED, RESTARTS, latency

from kvconform.bench.record import MACHINE, Arm, Exponent, Ratio, Record, Round, Summary
from kvconform_reports import markdown
from kvconform_reports.html import render
from kvconform_reports.view import charts
from kvconform_reports.view.figures import UNITS, digits, octets, percent, unit

MS = UNITS[1]


def said(record: Record) -> str:
    return section(render([], [], record), "speed")


def every(record: Record, **fields: dict[str, Any]) -> Record:
    """The record with fields of all entries of a list replaced."""
    for name, values in fields.items():
        setattr(record, name, [msgspec.structs.replace(one, **values) for one in getattr(record, name)])
    return record


def flipped(ratios: list[Ratio]) -> list[Ratio]:
    """The same, recorded the other way round."""
    return [
        msgspec.structs.replace(r, arm=r.reference, reference=r.arm, ratio=1 / r.ratio, low=1 / r.high, high=1 / r.low)
        for r in ratios
    ]


def three(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


# --- numbers are fields ---
@cache
def plain() -> str:
    return said(latency(("eager", "onnx")))


FIELDS = [
    ("summaries", "median", 8.761e6, ("8761", "8.76", "0.00876")),
    ("summaries", "low", 8.761e6, ("8761 to", "8.76 to", "0.00876 to")),
    ("summaries", "high", 8.761e6, ("to 8761", "to 8.76", "to 0.00876")),
    ("summaries", "q1", 8.761e6, ("8761 to", "8.76 to", "0.00876 to")),
    ("summaries", "q3", 8.761e6, ("to 8761", "to 8.76", "to 0.00876")),
    ("summaries", "p90", 8.761e6, ("8761", "8.76", "0.00876")),
    ("summaries", "p99", 8.761e6, ("8761", "8.76", "0.00876")),
    ("summaries", "device", 8.761e6, ("8761", "8.76", "0.00876")),
    ("summaries", "spread", 0.0877, ("8.8 %",)),
    ("summaries", "n", 87654, ("87654",)),
    ("summaries", "restarts", 87654, ("87654",)),
    ("generations", "ttft", 8.761e6, ("8761", "8.76", "0.00876")),
    ("generations", "tpot", 8.761e6, ("8761", "8.76", "0.00876")),
    ("generations", "itl", 8.761e6, ("8761", "8.76", "0.00876")),
    ("generations", "itl_p99", 8.761e6, ("8761", "8.76", "0.00876")),
    ("generations", "throughput", 87654.0, ("87654",)),
    ("ratios", "ratio", 876.54, ("877", "0.00114")),
    ("ratios", "low", 0.000087654, ("8.77e-05", "11409")),
    ("ratios", "high", 87654.0, ("87654", "1.14e-05")),
    ("ratios", "spread", 0.0877, ("spread 8.8 %",)),
    ("roofs", "fraction", 0.8765, ("87.7 %", "87.6 %")),
    ("roofs", "low", 0.8765, ("87.7 % to", "87.6 % to")),
    ("roofs", "high", 0.8765, ("to 87.7 %", "to 87.6 %")),
    ("roofs", "floor", 8.761e6, ("8761", "8.76")),
    ("roofs", "bytes_min", 876 * 2**20, ("876 MiB",)),
    ("roofs", "bytes_expected", 876 * 2**20, ("876 MiB",)),
    ("roofs", "flops", 876_000_000, ("876 M",)),
    ("memory", "analytic", 876 * 2**20, ("876 MiB",)),
    ("memory", "reported", 876 * 2**20, ("876 MiB",)),
    ("memory", "resident", 876 * 2**20, ("876 MiB",)),
    ("memory", "allocated", 876 * 2**20, ("876 MiB",)),
    ("once", "load", 8765.4, ("8765",)),
    ("once", "build", 8765.4, ("8765",)),
    ("once", "compile", {"prefill(64)": 8765.4}, ("8765",)),
    ("exponents", "exponent", 8.77, ("8.77",)),
    ("exponents", "expected", 8.77, ("expected 8.77",)),
    ("exponents", "low", -8.77, ("[-8.77",)),
    ("exponents", "high", 8.77, ("8.77]",)),
]


@pytest.mark.parametrize(("name", "field", "value", "texts"), FIELDS, ids=[f"{f[0]}.{f[1]}" for f in FIELDS])
def test_a_number_that_is_shown_is_a_field_of_the_record(
    name: str, field: str, value: Any, texts: tuple[str, ...]
) -> None:
    assert not any(text in plain() for text in texts)
    for place in (0, -1):
        record = latency(("eager", "onnx"))
        entries = getattr(record, name)
        if name == "roofs":  # the flag of the second backend goes, so that there is a number
            entries[:] = [msgspec.structs.replace(one, flag="", fraction=0.5, low=0.4, high=0.6) for one in entries]
        if name == "ratios":
            entries[:] = [msgspec.structs.replace(one, valid=True) for one in entries]
        entries[place] = msgspec.structs.replace(entries[place], **{field: value})
        after = said(record)
        assert any(text in after for text in texts), f"{name}[{place}].{field}"


def test_every_field_of_a_figure_is_asked_for() -> None:
    """So that a new field of the record cannot be forgotten here: the others name what the number is of, or why there
    is none."""
    names = {"case", "arm", "reference", "preset", "backend", "batch", "depth", "depths", "phase", "restart"}
    reasons = {"valid", "why_invalid", "flag"}
    counted = {("ratios", "n"), ("ratios", "restarts")}  # those of the two summaries beside it
    record, asked = latency(device=True), {(name, field) for name, field, *_ in FIELDS}
    for name in ("summaries", "generations", "ratios", "roofs", "memory", "once", "exponents"):
        fields = {f.name for f in msgspec.structs.fields(type(getattr(record, name)[0]))}
        assert {(name, field) for field in fields - names - reasons} == {a for a in asked | counted if a[0] == name}


def test_every_summary_ratio_generation_and_start_of_the_record_is_shown() -> None:
    record = latency()
    text = said(record)
    for s in record.summaries:
        assert any(three(s.median / one.ns) in text for one in UNITS), s
    for ratio in record.ratios:
        assert not ratio.valid or three(ratio.ratio) in text or f"{ratio.ratio:.3g}" in text, ratio
    for g in record.generations:
        assert three(g.throughput) in text
    for name in ("eager", "onnx", "numpy"):
        loads = [f"{o.load:.2f}" for o in record.once if o.backend == name]
        assert len(loads) == RESTARTS
        assert " · ".join(loads) in text
    for e in record.exponents:
        assert f"{e.exponent:.2f} [{e.low:.2f}, {e.high:.2f}] (expected {e.expected:.2f})" in text
    for one in record.excluded:
        assert one.why in text


def test_raw_rounds_and_tokens_are_counted_and_never_computed_with() -> None:
    record = latency()
    before = said(record)
    every(record, rounds={"ns": 1, "cpu_ns": 2, "nivcsw": 3, "device_ns": 4}, tokens={"ns": [1, 2]})
    assert said(record) == before


# --- the answer ---
def test_the_answer_comes_first_in_one_sentence() -> None:
    record = latency()
    text = said(record)
    number, case = next((n, c) for n, c in enumerate(record.cases) if c.depth == DEPTHS[-1] and c.steps > 1)
    decodes = [s for s in record.summaries if s.case == number and case.arms[s.arm].backend != MACHINE]
    least = min(decodes, key=lambda s: s.median)
    name = case.arms[least.arm].backend
    ratio = next(r for r in record.ratios if (r.case, r.arm) == (number, least.arm))
    assert (
        f"Batch 1 With {DEPTHS[-1]} tokens in the cache the next token takes {name} {three(least.median / 1e3)} µs, "
        f"the least of {len(decodes)} backends: {three(ratio.ratio)} × eager."
    ) in text
    assert text.index("With 2048 tokens in the cache") < text.index("Decode with 2048") < text.index("Exponent of")


def test_the_sentence_says_ratio_and_how_much_longer_it_takes_without_the_cache() -> None:
    record = every(latency(), ratios={"valid": True, "ratio": 0.125, "low": 0.1, "high": 0.2, "why_invalid": ""})
    text = said(record)
    assert "0.125 × eager. Without the cache it takes 8.00 times as long with all positions projected" in text
    assert "8.00 times as long with the last position alone projected." in text
    every(record, ratios={"valid": False, "why_invalid": "a storm"})
    text = said(record)
    assert "; its ratio to eager is not valid. The ratio to the time without the cache, all positions projected" in text
    assert "or the last position alone projected, is not valid: the reason is in the table." in text
    assert "times as long" not in text


def test_a_ratio_is_turned_to_cached_over_recomputed_whichever_way_it_was_recorded() -> None:
    record = latency(("eager",))
    straight = said(record)
    assert len(record.ratios) > len(DEPTHS)
    record.ratios = flipped(record.ratios)
    assert said(record) == straight


def test_both_loops_without_a_cache_are_named_and_one_that_cannot_run_says_why() -> None:
    record = latency()
    text = said(record)
    assert "Cached / recomputed, all positions" in text
    assert "Cached / recomputed, last position" in text
    wide = text[text.index("a wide decoder") :]
    assert wide.index("claims no last") < wide.index("Every time and ratio")  # in the table of the answer, too
    assert "not measured" in wide


def test_of_two_cases_of_one_depth_the_answer_takes_the_one_with_more_blocks() -> None:
    record = latency(("eager",))
    few = next(s for s in record.summaries if (c := record.cases[s.case]).depth == DEPTHS[-1] and c.steps == 1)
    assert record.cases[few.case].arms[few.arm].phase == "decode"
    place = record.summaries.index(few)
    record.summaries[place] = msgspec.structs.replace(few, median=8.761e6)
    text = said(record)
    assert "8761" in text
    assert "takes eager 8761" not in text
    record.summaries[place] = msgspec.structs.replace(few, median=8.761e6, n=10**6)
    assert "takes eager 8761" in said(record)


# --- what is not there ---
def test_an_invalid_ratio_shows_its_reason_and_no_number() -> None:
    why = "load 9 on 2 cores"
    numbers = {"ratio": 0.12345, "low": 0.12245, "high": 0.12445}
    record = every(latency(("eager", "numpy")), ratios={**numbers, "valid": False, "why_invalid": why})
    text, short = said(record), markdown.render([], [], record)
    assert text.count(why) >= len(record.ratios) > 0
    assert why in short
    record.ratios = []
    for number in ("0.123", "0.122", "0.124", "8.10", "8.17", "8.04"):
        assert text.count(number) == said(record).count(number)
        assert short.count(number) == markdown.render([], [], record).count(number)


def test_a_flagged_roof_shows_its_flag_and_no_number() -> None:
    record = every(latency(("eager",)), roofs={"fraction": 0.87654, "low": 0.86, "high": 0.88, "flag": FLAG})
    text = said(record)
    assert text.count(FLAG) >= len(record.roofs) > 0
    assert "87.7 %" not in text
    assert "87.7 %" not in markdown.render([], [], record)


def test_an_arm_without_a_median_says_why_it_has_none() -> None:
    record = latency(("eager",))
    arms = sum(len(case.arms) for case in record.cases)
    assert "too few blocks" not in said(record)
    record.summaries, record.ratios = [], []
    text = said(record)
    assert text.count("too few blocks") == arms + 1  # once more beside what was published
    assert "No decode step has a time." in text
    record.rounds = []
    assert said(record).count("too few blocks") == 0


def test_percentiles_and_device_times_have_columns_only_where_something_was_measured() -> None:
    cpu, gpu = said(latency()), said(latency(device=True))
    assert "Device time" not in cpu
    assert "GPU allocator" not in cpu
    assert "Device time" in gpu
    assert "GPU allocator" in gpu
    small = cpu[: cpu.index("a wide decoder")]
    assert " p90 " in small
    assert " p99 " not in small.replace("ITL p99", "")
    assert " p90 " not in said(every(latency(), summaries={"p90": None}))
    assert "Spread between restarts" in small
    assert "Spread between restarts" not in said(every(latency(), summaries={"spread": None}))


def test_a_preset_of_which_nothing_was_timed_still_says_why() -> None:
    record = latency(("eager",))
    record.cases, record.summaries, record.ratios, record.roofs, record.generations = [], [], [], [], []
    record.rounds = []
    text = said(record)
    assert text.count("Nothing was timed") == 2
    assert "not conformant: 4 of 95 cells broken" in text


def test_what_a_record_notes_is_said() -> None:
    record = latency(("eager",))
    record.notes = ["4 of 36 blocks were slow"]
    assert "4 of 36 blocks were slow." in said(record)


def test_an_unfinished_run_says_so_and_loads_are_told_apart() -> None:
    record = latency(("eager",))
    assert "did not finish" not in said(record) + markdown.render([], [], record)
    assert "0.42 at the start, 0.61, 0.73 after restarts, 1.17 at the end" in said(record)
    record.finished, record.load = False, [0.5]
    assert "did not finish" in said(record)
    assert "did not finish" in markdown.render([], [], record)
    assert "0.50 at the start" in said(record)


# --- published, reproduced, ours ---
def test_what_differs_begins_with_the_device_of_the_record() -> None:
    def first_of(record: Record) -> str:
        text = said(record)
        return text[text.index("What differs") :]

    record = latency()
    assert "one thread of a CPU here" in first_of(record)
    for entry in record.presets["decoder-small"]["published"]:
        entry["differs"] = ("its cached loop ran the prefill twice",)
    assert "one thread of a CPU here" in first_of(record)
    record.protocol["threads"] = 4
    assert "4 threads of a CPU here" in first_of(record)
    record.device, record.machine["gpu"] = "cuda", "a GPU of ours"
    told = first_of(record)
    assert "a GPU here" in told
    assert "of a CPU here" not in told
    table = said(record)
    assert "a GPU of ours" in table[table.index("Published, reproduced, ours") : table.index("What differs")]


def test_published_reproduced_and_ours_stand_side_by_side() -> None:
    record = latency()
    text = said(record)
    table = text[text.index("Published, reproduced, ours") : text.index("What differs")]
    places = [
        table.index(word)
        for word in ("A100", "0.0315 s", "3.17 ×", "0.0997 s without", "reproduced numpy", "ours eager")
    ]
    assert places == sorted(places)
    alone, beside = [(n, c) for n, c in enumerate(record.cases) if c.new and c.batch == 1]
    for number, case in (alone, beside):
        for ratio in (r for r in record.ratios if r.case == number):
            one, other = case.arms[ratio.arm], case.arms[ratio.reference]
            turned = f"{three(1 / ratio.ratio)} {three(1 / ratio.high)} to {three(1 / ratio.low)}"
            assert (turned in table) == (one.backend == other.backend)
            over = f"{three(1 / ratio.ratio)} × numpy {three(1 / ratio.high)} to {three(1 / ratio.low)}"
            pair = one.backend, other.backend
            assert (over in table) == ((number, pair) == (alone[0], ("numpy", "eager")))  # the case of the most rounds
    assert table.count("generate 16 after 64") == 3, "one row for each backend"
    for sentence in PUBLISHED["differs"]:
        assert sentence in text
    short = markdown.render([], [], record)
    assert "published 3.17 ×" in short
    assert "reproduced by numpy" in short
    assert "ours by onnx" in short


def test_a_mean_of_several_runs_is_told_as_it_was_published() -> None:
    record = latency()
    assert "As published" not in said(record)  # one run has no deviation
    record.presets["decoder-small"]["published"][0]["runs"] = 10
    parts, means = [], []
    for phase, words in (("generate", "with"), ("regenerate", "without")):
        arm = Arm("numpy", phase)
        runs = [
            block.ns / 1e6
            for block in record.rounds
            if (case := record.cases[block.case]).batch == 1 and case.new and case.arms[block.arm] == arm
        ]
        means.append(fmean(runs))
        parts.append(f"{digits(means[-1])} ± {digits(stdev(runs))} ms {words} the cache ({len(runs)} runs)")
    text = said(record)
    assert f"As published, mean ± standard deviation of single runs: numpy {', '.join(parts)}: " in text
    assert f"{digits(means[1] / means[0])} ×." in text


@pytest.mark.parametrize(
    ("phases", "cells"),
    [
        (("generate", "regenerate"), ["3.17 × 0.0997 s without", "–", "–"]),
        (("generate", "regenerate-last"), ["–", "3.17 × 0.0997 s without", "–"]),
        ((), ["3.17 × 0.0997 s without", "–"]),
    ],
)
def test_a_published_ratio_stands_under_the_loop_that_it_is_of(phases: tuple[str, ...], cells: list[str]) -> None:
    record = latency()
    record.presets["decoder-small"]["published"] = [{**PUBLISHED, "phases": phases, "arm": "numpy"}]
    source = render([], [], record)
    start = source.index('<th scope="row">published</th>')
    row = source[start : source.index("</tr>", start)]
    texts = [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in re.findall("<td.*?</td>", row)]
    assert texts[4:] == cells
    assert ("colspan" in row) == (not phases)


def test_what_was_published_of_a_step_is_compared_with_steps() -> None:
    record = latency()
    record.presets["decoder-small"]["published"] = [{**PUBLISHED, "phases": ("decode", "recompute"), "arm": "onnx"}]
    text = said(record)
    table = text[text.index("Published, reproduced, ours") : text.index("What differs")]
    assert "reproduced onnx decode at depth 2048" in table
    assert "generate" not in table


def test_a_published_design_that_has_no_time_is_missed_aloud() -> None:
    record = latency()
    record.presets["decoder-small"]["published"] = [{**PUBLISHED, "arm": "past-tuples"}]
    text = said(record)
    assert "This record has no time of the published design (past-tuples)." in text
    assert "reproduced numpy" not in text
    assert "no time of the published design" in markdown.render([], [], record)


@pytest.mark.parametrize("published", [None, [], {}, "x", [3], [None]])
def test_a_preset_without_published_figures_has_no_comparison(published: object) -> None:
    record = latency(("eager",))
    record.presets["decoder-small"]["published"] = published
    assert "Published, reproduced" not in said(record)
    record.presets = {}
    assert "Published, reproduced" not in said(record)


@pytest.mark.parametrize("entry", [{}, {"differs": "one sentence"}, {"ratio": "about 3", "cached": 2}, {"phases": 7}])
def test_published_figures_with_gaps_are_shown_as_far_as_they_go(entry: dict[str, Any]) -> None:
    record = latency(("eager",))
    record.presets["decoder-small"]["published"] = [entry]
    text = said(record)
    assert "Published, reproduced" in text
    for value in entry.values():
        assert isinstance(value, int) or value in text
    assert "cached" not in entry or "2.00 s" in text


# --- tables and charts ---
def test_every_table_of_the_section_has_a_caption_that_labels_it() -> None:
    source = render([], [], latency(device=True))
    source = source[source.index('<section id="speed">') : source.index('<section id="power">')]
    source = source[: source.index('id="h-software"')]
    tables = re.findall(r'aria-labelledby="([^"]+)">\s*<table class="times.*?<caption id="([^"]+)">', source, re.DOTALL)
    assert len(tables) == source.count("<table") > 10
    assert all(region.split()[-1] == caption for region, caption in tables)
    assert len({region for region, _ in tables}) == len(tables)
    assert all("<th scope=" in table for table in source.split("<table")[1:])


def test_throughput_is_compared_by_batch_where_there_are_several() -> None:
    record = latency()
    text = said(record)
    assert "Throughput, tokens a second" in text
    assert "batch 1 batch 4" in text
    record.generations = [g for g in record.generations if record.cases[g.case].batch == 1]
    assert "Throughput, tokens a second" not in said(record)


def test_exponents_of_other_depths_name_them() -> None:
    record = latency(("eager",))
    assert "growth with depth from 1024 to 2048" in said(record)
    record.exponents.append(Exponent("decoder-small", "onnx", 1, "decode", [16, 64], 0.5, 0.25))
    text = said(record)
    assert "0.50 (expected 0.25) from 16 to 64" in text
    assert "(expected 0.21) from 1024 to 2048" in text


def test_a_chart_has_a_line_for_each_backend_and_phase_and_one_for_the_floor() -> None:
    source = render([], [], latency())
    svg = source[source.index('<svg class="chart"') : source.index("</svg>", source.index('<svg class="chart"'))]
    for stroke in ("solid", "dashed", "dotted"):
        assert [f"t{kin}" for kin in range(3)] == re.findall(rf'<g class="(t\d) {stroke}">', svg)
    assert svg.count('<g class="bound solid">') == 1
    labels = re.findall(r'<text class="label"[^>]*>([^<]*)', svg)
    assert len(labels) == 10
    assert {"onnx decode", "onnx recompute", "onnx recompute-last", "floor of the roofline"} <= set(labels)


def test_lines_of_a_chart_keep_their_labels_apart_and_their_marks_in_the_frame() -> None:
    lines = [
        charts.Series(f"{name} {phase}", kin, "solid", ((16, y, y * 0.98, y * 1.02), (256, 2 * y, y, y * 3)))
        for kin, name in enumerate("abcdefghijkl")
        for phase, y in (("decode", 1e5 + kin), ("recompute", 1e5 + 10 * kin))
    ]
    chart = charts.log_log(lines, MS)
    assert chart is not None
    assert {line.name for line in chart.lines} == {line.name for line in lines}
    places = sorted(line.label_y for line in chart.lines)
    assert all(b - a >= charts.LABEL_GAP - 0.2 for a, b in pairwise(places))
    assert chart.top <= places[0] < places[-1] <= chart.bottom
    for line in chart.lines:
        for mark in line.marks:
            assert chart.left <= mark.x <= chart.right
            assert chart.top <= mark.high <= mark.y <= mark.low <= chart.bottom


def test_an_interval_without_end_does_not_flatten_the_chart() -> None:
    points = ((16.0, 1e5, 1.0, 1e12), (64.0, 2e5, 1.9e5, 2.1e5))
    chart = charts.log_log([charts.Series("a decode", 0, "solid", points)], MS)
    assert chart is not None
    wide, narrow = chart.lines[0].marks
    assert wide.high >= chart.top
    assert wide.low <= chart.bottom
    assert wide.y - narrow.y > (chart.bottom - chart.top) / 10


def test_a_long_label_keeps_the_word_that_tells_the_lines_of_a_backend_apart() -> None:
    name = "a-backend-with-a-very-long-name"
    lines = [charts.Series(f"{name} {p}", 0, "solid", ((8, 1e6, 1e6, 1e6),)) for p in ("decode", "recompute-last")]
    chart = charts.log_log(lines, MS)
    assert chart is not None
    assert [line.short.split("… ")[1] for line in chart.lines] == ["decode", "recompute-last"]
    assert all(len(line.short) <= charts.LABEL_CHARACTERS for line in chart.lines)


@pytest.mark.parametrize("points", [(), ((0, 5.0, 4.0, 6.0),), ((8, 0.0, 0.0, 0.0),), ((8, float("nan"), 1.0, 2.0),)])
def test_what_has_no_logarithm_is_not_drawn(points: tuple[tuple[float, float, float, float], ...]) -> None:
    assert charts.log_log([charts.Series("a", 0, "solid", points)], MS) is None


@pytest.mark.parametrize("y", [1.0, 999.0, 1e3, 12345.0, 9.99e8])
def test_a_chart_of_one_point_has_axes(y: float) -> None:
    chart = charts.log_log([charts.Series("a", 0, "solid", ((64, y, y, y),))], MS)
    assert chart is not None
    assert len(chart.x_ticks) == 1
    assert len([tick for tick in chart.y_ticks if tick.text]) >= 2


# --- words ---
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (digits(0.01234), "0.0123"),
        (digits(99.96), "100"),
        (digits(1234.0), "1234"),
        (digits(0.0), "0"),
        (percent(0.7234), "72.3 %"),
        (percent(0.000321), "0.0321 %"),
        (percent(None), ""),
        (octets(1023), "1023 B"),
        (octets(1536), "1.50 KiB"),
        (octets(3 * 2**30), "3.00 GiB"),
        (octets(None), ""),
        (unit([]).name, "ms"),
        (unit([9e4]).name, "µs"),
        (unit([1e5, 5e9]).name, "ms"),
        (unit([1e9]).name, "s"),
        (unit([1e9], "ms").name, "ms"),
        (unit([None, float("inf")]).name, "ms"),
    ],
)
def test_a_number_has_three_digits_and_the_unit_that_fits_its_column(text: str, wanted: str) -> None:
    assert text == wanted


def spoken(name: str) -> Record:
    """A record in which every text that a stranger may choose is ``name``."""
    record = latency((name,))
    kept = record.presets["decoder-small"]
    kept["about"], kept["config"] = name, {name: name}
    words = {key: name for key in PUBLISHED if key not in ("differs", "phases")}
    kept["published"] = [{**words, "arm": name, "differs": [name, name]}, {**PUBLISHED, "arm": f"{name} too"}]
    record.presets = {name: kept}
    for one in ("cases", "memory", "exponents", "once", "excluded"):
        entries = [entry for entry in getattr(record, one) if entry.preset == "decoder-small"]
        setattr(record, one, [msgspec.structs.replace(entry, preset=name) for entry in entries])
    last = len(record.cases)
    for one in ("rounds", "tokens", "summaries", "generations", "ratios", "roofs"):
        setattr(record, one, [entry for entry in getattr(record, one) if entry.case < last])
    every(
        record,
        roofs={"flag": name},
        ratios={"valid": False, "why_invalid": name},
        once={"compile": {name: 1.0}},
        excluded={"why": name, "phase": name, "backend": name},
    )
    record.exponents = [msgspec.structs.replace(e, phase=name) for e in record.exponents[:1]]
    record.protocol, record.machine, record.device = {name: name}, {"cpu": name, name: name}, name
    record.software, record.started = {name: {name: name}}, name
    return record


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_words_of_a_speed_record_come_out_as_text(name: str) -> None:
    tame, wild = (page(render([], [], spoken(words))) for words in ("tame", name))
    assert wild.text.count(name) >= 100
    cut = [attributes for _, attributes in wild.tags if attributes.get("class") == "label"]  # long ones of a chart
    assert 0 <= tame.text.count("tame") - wild.text.count(name) <= len(cut)
    assert shape(wild) == shape(tame)


@pytest.mark.parametrize("name", [*HOSTILE, "a|b\n# title", "@someone", "`x`", "x://y"])
def test_hostile_words_of_a_speed_record_are_text_in_the_job_summary(name: str) -> None:
    tame, wild = (markdown.render([], [], spoken(words)) for words in ("tame", name))
    assert not re.search(r"<|(?<!\\)!\[|(?<!\\)`|://|@", wild)
    assert [line[:2] for line in wild.splitlines()] == [line[:2] for line in tame.splitlines()]
    bars = [[len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()] for text in (wild, tame)]
    assert bars[0] == bars[1]


def test_rounds_and_summaries_of_the_sample_agree() -> None:
    """The sample is a record as a run would write it: no entry points nowhere."""
    record = latency(device=True)
    places = {(number, arm) for number, case in enumerate(record.cases) for arm in range(len(case.arms))}
    entries: list[Round | Summary] = [*record.rounds, *record.summaries]
    assert {(one.case, one.arm) for one in entries} == places
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) is not None
