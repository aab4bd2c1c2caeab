"""What a run shows beyond verdicts: visibility maps, diagnoses, and the noise floor of a black box. No verdict depends
on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from kvconform.errors import BackendUnavailable, WorkerDied
from kvconform.explain import diagnosis, visibility
from kvconform.judging.verdict import Outcome, Reason, Verdict
from kvconform.results.results import Results
from kvconform.search import counterexample
from kvconform.worker.client import WorkerClient
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Program
from kvconform_specs.reference.oracle import expect

SHARED = (
    "the last bits of an output depend on other tokens of the call, also in the uncached forward: where a change must "
    "not be seen, outputs may move within the bounds"
)
CHANGES = (
    "its own forward is not a function of the prefix: with {} tokens it gives the tokens before the last other outputs "
    "than with {}; each step is judged by the forward on exactly the tokens up to its end"
)
TOKENS = 8
"""How many tokens the noise floor is measured on."""


def add(client: WorkerClient, results: Results, configs: Mapping[str, Config], failures: Path) -> None:
    """Adds maps and diagnoses of the configs with broken clauses; of a black box, maps and noise floor of all. What
    ends the backend's process is left out: verdicts report it."""
    for name, config in configs.items():
        broken = [v for v in results.failures if v.config == name]
        ran = any(v.config == name and v.outcome in (Outcome.PASS, Outcome.REFUTED) for v in results.verdicts)
        own = results.target is not None and ran
        if own:
            with suppress(WorkerDied, BackendUnavailable):
                _add_noise(client, results, name, config)
        if broken or own:
            with suppress(WorkerDied, BackendUnavailable):
                results.maps[name] = visibility.maps(client, config, tokens_needed(broken))
        if broken:
            files = [failures / v.counterexample for v in broken if v.counterexample]
            cases = [Case.from_json(counterexample.read(file).case) for file in files if file.exists()]
            with suppress(WorkerDied, BackendUnavailable):
                unstable = any(v.config == name and v.reason is Reason.REFERENCE_BROKEN for v in results.verdicts)
                found = diagnosis.diagnose(client, config, cases, results.maps.get(name, []), unstable)
                if found is not None:
                    results.diagnoses[name] = found


def tokens_needed(broken: Sequence[Verdict]) -> int:
    """After how many tokens the first of these failures shows, the most useful first; 0 where none has a position."""
    positions = (one.mismatch.position for one in broken if one.mismatch is not None)
    return next((position + 1 for position in positions if position is not None), 0)


def _add_noise(client: WorkerClient, results: Results, name: str, config: Config) -> None:
    assert results.target is not None
    noise = {**results.target.noise, name: noise_floor(client, config)}
    claims = client.claims
    measured = [SHARED] if claims.rounding == "shared" else []
    measured += [CHANGES.format(at, at - 1) for at in claims.changes_at[:1]]
    assumed = dict.fromkeys((*results.target.assumed, *measured))
    results.target = msgspec.structs.replace(results.target, noise=noise, assumed=list(assumed))


def noise_floor(client: WorkerClient, config: Config) -> float:
    """The largest bound of a black box's outputs on a few tokens, relative to the root mean square of the outputs."""
    own = client.reference_forward
    assert own is not None
    program = Program(config, (Append("a", (min(TOKENS, config.capacity),), 0),))
    (want,) = expect(program, reference=own(config))
    assert want is not None
    return float(np.max(want.bound) / np.sqrt(np.mean(np.square(want.value))))
