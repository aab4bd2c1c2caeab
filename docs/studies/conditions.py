"""How often the condition of a diagnosis is true: ``python -m conditions --every 8`` measures every eighth fault.

A diagnosis finds its condition on its own probes. Here it is tested on other programs, those that clauses draw, some of
them first in their process. A condition is

- wrong, if outputs are wrong that do not meet it;
- weak, if more than a quarter of the outputs that meet it are right;
- untested, if no output of these programs meets it or is wrong;
- right, if none of these is so;
- silent, if there is none, although outputs are wrong.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvconform.errors import BackendUnavailable, WorkerDied
from kvconform.explain.diagnosis import diagnose
from kvconform.explain.diagnosis.conditions import predicates
from kvconform.explain.diagnosis.probes import Probe
from kvconform.explain.diagnosis.record import Condition, Diagnosis
from kvconform.explain.diagnosis.symptoms import OutputCell, ReferenceOutputs, death, symptom
from kvconform.explain.diagnosis.text import condition as in_words
from kvconform.explain.diagnosis.text import precision
from kvconform.mutation.fault import Fault, load_faults
from kvconform.search.cell import Cell, unsupported
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.clauses import ALL
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.history import holds_nan
from kvconform_specs.program import Generate, Program, ReadCache
from kvconform_specs.strategies import explore

TRIED = ("attention-gqa", "decoder-rope", "attention-window")
"""The configs of faults that name none."""
CASES, PROGRAMS, FRESH, DEATHS = 3, 120, 12, 4
"""Cases of each clause; the most programs; every so many-th runs in a fresh process; deaths after which none runs."""
WEAK = 0.25
"""The largest share of right outputs among those that meet a condition that is not weak."""


@dataclass
class Measured:
    """What one fault showed."""

    fault: Fault
    config: str
    diagnosis: Diagnosis
    outcome: str = "silent"
    remark: str = ""


@dataclass
class HeldOut:
    """Programs that no diagnosis runs, and what the reference gives on them; kept, since faults share them."""

    references: dict[tuple[Config, str], ReferenceOutputs] = field(default_factory=dict)

    def cells(self, client: WorkerClient, config: Config) -> list[OutputCell]:
        """The outputs of a backend under these programs."""
        key = config, str(client.claims.precision)
        reference = self.references.setdefault(key, ReferenceOutputs(client.claims.precision, client.reference_forward))
        found: list[OutputCell] = []
        deaths, process = 0, -1
        for number, program in enumerate(programs(client, config)):
            if number % FRESH == 0:
                client.fresh()
            probe = Probe(str(number), "a program of a clause", program)
            try:
                trace = client.run(program, (0,)).apart()[0]
            except WorkerDied as died:
                found += death(probe, died, client.claims, earlier=client.starts == process).cells
                deaths, process = deaths + 1, -1
                if deaths == DEATHS:
                    break
            else:
                found += symptom(probe, trace, reference, client.claims, earlier=client.starts == process).cells
                process = client.starts
        uncached = any(cell.wrong for cell in found if cell.facts.get("uncached forward"))
        return [cell for cell in found if uncached or not cell.facts.get("uncached forward")]


def programs(client: WorkerClient, config: Config) -> list[Program]:
    """A few programs of every clause that the claims allow."""
    found: dict[Program, None] = {}
    for place, clause in enumerate(ALL):
        if clause.concerns(config) and unsupported(Cell(clause, config, ""), client) is None:

            def keep(case: object) -> None:
                found.update(dict.fromkeys(case.programs))  # type: ignore[attr-defined]

            explore(clause.strategy(config, client.claims), keep, CASES, place)
    other = Generate, ReadCache
    short = [one for one in found if not any(isinstance(step, other) for step in one.steps) and one.span < 200]
    short = [one for one in short if not holds_nan(one)]
    return short[:: max(len(short) // PROGRAMS, 1)][:PROGRAMS]


def judged(found: Condition | None, cells: Sequence[OutputCell], config: Config) -> tuple[str, str]:
    """The outcome, and the counts."""
    if found is None:
        return "silent", ""
    cells = [cell for cell in cells if not cell.wrong or cell.first or not found.first_only]
    wrong = [cell for cell in cells if cell.wrong]
    if not found.predicates:
        share = f"{len(wrong)} of {len(cells)} are wrong"
        return ("right" if len(wrong) >= (1 - WEAK) * len(cells) else "wrong"), share
    known = predicates(config)
    holds = [known[words] for words in found.predicates]
    met = [cell for cell in cells if all(one(cell.facts) for one in holds)]
    outside, inside = len(wrong) - sum(cell.wrong for cell in met), sum(not cell.wrong for cell in met)
    remark = f"{outside} of {len(wrong)} wrong ones do not meet it, {inside} of {len(met)} that meet it are right"
    if outside:
        return "wrong", remark
    if not met:
        return "untested", remark
    return ("weak" if inside > WEAK * len(met) else "right"), remark


def measured(faults: Sequence[Fault]) -> Iterator[Measured]:
    """Each fault that shows in a diagnosis, under the first config where it does."""
    held_out = HeldOut()
    for fault in faults:
        for name in fault.configs or TRIED:
            config = CONFIGS[name]
            with suppress(BackendUnavailable, WorkerDied), WorkerClient(WorkerSpec(fault.address)) as client:
                found = diagnose(client, config, [], [])
                if found is None:
                    continue
                one = Measured(fault, name, found)
                one.outcome, one.remark = judged(found.condition, held_out.cells(client, config), config)
                yield one
                break


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--faults", default="kvconform_backends.faults:FAULTS", help="module:LIST")
    options.add_argument("--every", type=int, default=1, help="every so many-th fault")
    options.add_argument("--first", type=int, default=0, help="the first of these")
    asked = options.parse_args()
    counts: Counter[str] = Counter()
    for one in measured(load_faults(asked.faults)[asked.first :: asked.every]):
        counts[one.outcome] += 1
        found = one.diagnosis.condition
        words = "no condition" if found is None else in_words(found)
        if one.diagnosis.precision is not None:
            words += f"; {precision(one.diagnosis.precision)}"
        print(f"{one.outcome:<6} {one.fault.name} [{one.config}] {words}; {one.remark}", flush=True)
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
