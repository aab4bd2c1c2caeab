"""The record of the soak, and the page that is made from it: docs/reliability.md."""

from __future__ import annotations

import msgspec

from soak.adapters import Adapter
from soak.inputs import Kind
from soak.kills import Kills
from soak.steady import Steady

GROWTH = 1.0
"""MiB by which resident memory may grow from the second to the last quarter: less than twelve bytes a program."""
SCHEMA = "kvconform-soak/1"


class Record(msgspec.Struct, kw_only=True):
    """What a soak found."""

    schema: str = SCHEMA
    inputs: list[Kind]
    adapters: list[Adapter] = []
    kills: Kills
    steady: Steady

    @property
    def bad(self) -> list[str]:
        """What must not be, one sentence each."""
        found = [f"{one.name}: {one.tracebacks} tracebacks: {one.places}" for one in self.inputs if one.tracebacks]
        found += [f"{one.name}: {one.ending}" for one in self.adapters if one.ending.startswith("traceback")]
        wrong = ("lost", "twice", "unreadable", "left", "convicted")
        found += [f"kills: {name}: {count}" for name in wrong if (count := getattr(self.kills, name))]
        for name, allowed in (("mib", GROWTH), ("files", 0.0)):
            for whose in ("worker", "parent"):
                was, now = getattr(self.steady, f"{whose}_{name}")
                if now - was > allowed:
                    found.append(f"{whose}: {name} grew from {was} to {now}")
        return found


def render(record: Record, source: str) -> str:
    kills, steady, total = record.kills, record.steady, sum(one.tried for one in record.inputs)
    lines = [
        "# Reliability",
        "",
        f"What `nox -s soak` found; this page is made from [the record]({source}).",
        "",
        "## Malformed inputs",
        "",
        f"{total} inputs, drawn by Hypothesis: valid files with up to three changes (a value replaced, removed,",
        "doubled, renamed or moved, bytes lost), files that were never right, and command lines out of options and",
        "words. Each must be read, or refused with one sentence; any other exception is a traceback.",
        "",
        "| input | tried | refused | tracebacks |",
        "|---|--:|--:|--:|",
        *(f"| {one.name} | {one.tried} | {one.refused} | {one.tracebacks} |" for one in record.inputs),
        "",
        "## Adapters that misbehave",
        "",
        f"{len(record.adapters)} adapters, each judged by `shape.output` and `equivalence.decode`. A run ends with",
        "verdicts, whatever its backend does; what does no harm to outputs passes.",
        "",
        "| adapter | cells |",
        "|---|---|",
        *(f"| `{one.name}` | {one.ending} |" for one in record.adapters),
        "",
        "## Kills",
        "",
        f"`kvconform run -b numpy` was killed with SIGKILL at random moments {kills.parents} times alone and",
        f"{kills.groups} times with its workers, and {kills.workers} times one of its workers was killed.",
        f"{kills.runs} runs came to their end; {kills.undecided} of their cells are inconclusive, since their worker",
        "was killed.",
        "",
        "| what must not be | count |",
        "|---|--:|",
        f"| a verdict that a file held and a later one does not | {kills.lost} |",
        f"| a verdict that was found a second time | {kills.twice} |",
        f"| a file that cannot be read after a kill | {kills.unreadable} |",
        f"| a process that stays after its run was killed | {kills.left} |",
        f"| a failure of the backend, which is right | {kills.convicted} |",
        "",
        "## A long run",
        "",
        f"One worker ran {steady.programs} programs. Medians over the second quarter and over the last one:",
        "",
        "| | second quarter | last quarter |",
        "|---|--:|--:|",
        *(
            f"| {words} | {pair[0]:g} | {pair[1]:g} |"
            for words, pair in (
                ("memory of the worker, MiB", steady.worker_mib),
                ("memory of the parent, MiB", steady.parent_mib),
                ("open files of the worker", steady.worker_files),
                ("open files of the parent", steady.parent_files),
            )
        ),
    ]
    return "\n".join(lines) + "\n"
