"""Judges black boxes in the test's own process: workers would import torch or transformers again for each test."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from numpy.typing import NDArray

from kvconform.judging.render import render
from kvconform.search.counterexample import attempt
from kvconform.worker.execute import execute
from kvconform.worker.protocol import Traces, pack, unpack
from kvconform_specs.clause import Case
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.program import Program
from kvconform_specs.reference.oracle import ReferenceForward


class InProcess:
    """The part of a client that ``attempt`` needs."""

    def __init__(self, target: Any) -> None:
        (self.config,) = target.configs.values()
        self.claims = target.claims
        # built twice, as in separate processes
        self.backend, self.reference = (target(self.config, {}, "cpu") for _ in range(2))
        self.perturbed: dict[int, Any] = {}
        self.traces: deque[Traces] = deque()

    def reference_forward(self, config: Config) -> ReferenceForward:
        return self._reference_forward

    def _reference_forward(
        self, inputs: NDArray[Any], storage: float, accumulation: float, seed: int, **told: int
    ) -> NDArray[Any]:
        if seed and seed not in self.perturbed:
            self.perturbed[seed] = self.reference.perturbed(storage, accumulation, seed)
        made: NDArray[Any] = (self.perturbed[seed] if seed else self.reference).uncached_forward(inputs, **told)
        return made

    def send(self, program: Program, variants: Sequence[int]) -> None:
        self.traces.append(unpack(*pack(execute(self.backend, program, tuple(variants)))))

    def receive(self, program: Program) -> Traces:
        return self.traces.popleft()


def broken(target: Any, clauses: Sequence[str], examples: int = 5) -> dict[str, str]:
    """The clauses that a few programs break, each with its sentence; clauses that the claims rule out are skipped."""
    client, found = InProcess(target), dict[str, str]()
    for name in clauses:
        clause = BY_NAME[name]
        unclaimed = clause.needs_any and not any(map(client.claims.can, clause.needs_any))
        if unclaimed or not all(map(client.claims.can, clause.needs)) or not clause.concerns(client.config):
            continue

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(clause.strategy(client.config, client.claims))
        def tried(case: Case) -> None:
            client.traces.clear()
            mismatch = attempt(clause, client, case, (0, 1)).mismatch  # noqa: B023 - it is called here
            if mismatch is not None:
                found.setdefault(name, render(mismatch))  # noqa: B023

        tried()
    return found
