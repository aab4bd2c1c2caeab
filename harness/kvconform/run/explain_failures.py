"""What a run shows beyond verdicts: what outputs see of tokens, what a broken backend behaves like, and a black box's
noise floor. No verdict depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from kvconform.errors import BackendUnavailable, WorkerDied
from kvconform.explain import diagnosis, visibility
from kvconform.judging.verdict import Outcome
from kvconform.results.results import Results
from kvconform.search import counterexample
from kvconform.worker.client import WorkerClient
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program
from kvconform_specs.reference.oracle import expect

SHARED = (
    "an output's last bits depend on other tokens of the call, without a cache as well: what must not move may move "
    "within the bounds"
)
TOKENS = 8
"""How many tokens the noise floor is measured on."""


def add(client: WorkerClient, results: Results, configs: Mapping[str, Config], failures: Path) -> None:
    """Adds maps and diagnoses of the configs under which something is broken; of a black box, maps and noise floor in
    any case. What ends the backend's process leaves them out: the verdicts tell it."""
    for name, config in configs.items():
        broken = [v for v in results.verdicts if v.config == name and v.outcome.broken]
        ran = any(v.config == name and v.outcome in (Outcome.PASS, Outcome.REFUTED) for v in results.verdicts)
        if results.target is not None and ran:
            with suppress(WorkerDied, BackendUnavailable):
                noise = {**results.target.noise, name: noise_floor(client, config)}
                shared = [SHARED] if client.claims.rounding == "shared" else []
                assumed = list(dict.fromkeys((*results.target.assumed, *shared)))
                results.target = msgspec.structs.replace(results.target, noise=noise, assumed=assumed)
        if broken or (results.target is not None and ran):
            with suppress(WorkerDied, BackendUnavailable):
                results.maps[name] = visibility.maps(client, config)
        if broken:
            files = [failures / v.counterexample for v in broken if v.counterexample]
            cases = [Case.from_json(counterexample.read(file).case) for file in files if file.exists()]
            with suppress(WorkerDied, BackendUnavailable):
                found = diagnosis.diagnose(client, config, cases, results.maps.get(name, []))
                if found is not None:
                    results.diagnoses[name] = found


def noise_floor(client: WorkerClient, config: Config) -> float:
    """The largest bound of a black box's outputs on a few tokens, relative to the root mean square of the outputs."""
    own = client.reference_forward
    assert own is not None
    program = Program(config, (Append("a", (min(TOKENS, config.capacity),), 0),))
    (want,) = expect(program, reference=own(config))
    assert want is not None
    return float(np.max(want.bound) / np.sqrt(np.mean(np.square(want.value))))
