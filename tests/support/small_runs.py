"""A small run of three configs, and its results without what differs between equal runs."""

from __future__ import annotations

import msgspec

from kvconform.results.results import Results
from kvconform.run.run import Plan
from kvconform.search.effort import EFFORTS

CONFIGS = ("attention-gqa", "attention-mha", "attention-odd")
PLAN = Plan(EFFORTS["smoke"], clauses=("shape", "equivalence.decode", "lifecycle.reset"), configs=CONFIGS, explain=True)
FAULT = "kvconform_backends.faults.published:FirstListing"


def without_times(results: Results) -> Results:
    verdicts = [msgspec.structs.replace(verdict, seconds=0.0) for verdict in results.verdicts]
    return msgspec.structs.replace(results, verdicts=verdicts, seconds=0.0, started="")
