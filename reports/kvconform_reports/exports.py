"""Results for other tools: the JSON of github-action-benchmark, and a badge of shields.io."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvconform.bench.analysis.moved import times
from kvconform.bench.record import Record
from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform_reports.view.outcomes import labels, standing

COUNTED = {
    "broken cells": (Outcome.FAIL, Outcome.CRASH, Outcome.TIMEOUT),
    "undecided cells": (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED),
    "cells that are not covered": (Outcome.UNSUPPORTED,),
    "known failures": (Outcome.KNOWN_FAILURE,),
    "refuted guarantees": (Outcome.REFUTED,),
}
"""What is counted of each backend; of each of them less is better."""
COLOURS = {0: "brightgreen", 1: "red", 3: "lightgrey", 5: "yellow"}
"""The colour of a badge, by the exit code of a run."""
LABEL = "KV cache"


def benchmark(judged: Sequence[Results], speed: Record | None) -> str:
    """Counts of cells, and times with their intervals, for the tool ``customSmallerIsBetter``: less of each is
    better, so that coverage is the number of cells that are not covered."""
    found: list[dict[str, Any]] = []
    for label, results in zip(labels(judged), judged, strict=True):
        for words, outcomes in COUNTED.items():
            count = sum(verdict.outcome in outcomes for verdict in results.verdicts)
            of = f"of {len(results.verdicts)} cells, suite {results.suite}, effort {results.effort}"
            found.append({"name": f"{label}: {words}", "unit": "cells", "value": count, "extra": of})
    timed = {} if speed is None else times(speed)
    for (preset, backend, phase, depth, batch, new), (median, low, high) in timed.items():
        made = f", {new} new" if new else ""
        name = f"{backend}: {phase} at {depth} tokens x {batch}{made} ({preset})"
        interval = f"95 % interval {low:.0f} to {high:.0f}"
        found.append({"name": name, "unit": "ns/step", "value": round(median), "range": interval})
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def badge(judged: Sequence[Results]) -> str:
    """What an endpoint badge of shields.io shows: of one backend its verdict, of several how many are conformant. The
    colour is that of the worst. A part of the suite is not conformance, and grey."""
    stands = [standing(results) for results in judged]
    whole = [not results.partial for results in judged]
    good = sum(stand.code == 0 and complete for stand, complete in zip(stands, whole, strict=True))
    message = stands[0].word if len(stands) == 1 else f"{good} of {len(stands)} conformant"
    code = next((code for code in (1, 5, 3) if any(stand.code == code for stand in stands)), 0)
    colour = COLOURS[code] if code or (stands and all(whole)) else "lightgrey"
    shown = {"schemaVersion": 1, "label": LABEL, "message": message, "color": colour, "isError": code == 1}
    return json.dumps(shown, ensure_ascii=False) + "\n"
