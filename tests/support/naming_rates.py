"""How often diagnoses name the right mistake: ``python tests/support/naming_rates.py`` measures the whole catalogue.

No rule knows the faults, so each counts as one that was never seen. A fault is diagnosed under the first config where
it shows: one of its own, else one of ``TRIED``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress

from kvconform.errors import BackendUnavailable, WorkerDied
from kvconform.explain import visibility
from kvconform.explain.diagnosis import diagnose
from kvconform.explain.diagnosis.text import sentence
from kvconform.mutation.fault import Fault, load_faults
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform_specs.configs import CONFIGS

TRIED = ("attention-gqa", "decoder-rope", "attention-window")
STRIDE = 6
"""Every so many-th fault comes first, so that an unfinished measurement is of a fair sample."""


def named(faults: Iterable[Fault]) -> Iterator[tuple[Fault, str, str, str]]:
    """Fault, config, ``right``, ``wrong`` or ``none``, and the sentence, of each fault that shows in a diagnosis."""
    for fault in faults:
        for config in fault.configs or TRIED:
            found = None
            with suppress(BackendUnavailable, WorkerDied), WorkerClient(WorkerSpec(fault.address)) as client:
                maps = visibility.maps(client, CONFIGS[config])
                found = diagnose(client, CONFIGS[config], [], maps)
            if found is not None:
                outcome = "none" if not found.mistake else "right" if found.mistake in fault.classes else "wrong"
                yield fault, config, outcome, sentence(found)
                break


if __name__ == "__main__":
    counts: Counter[str] = Counter()
    faults = load_faults("kvconform_backends.faults:FAULTS")
    spread = [fault for first in range(STRIDE) for fault in faults[first::STRIDE]]
    for fault, config, outcome, words in named(spread):
        counts[outcome] += 1
        print(f"{outcome:<6} {fault.name} [{config}] {'/'.join(fault.classes)}: {words}", flush=True)
    print(", ".join(f"{name}: {count} ({count / counts.total():.1%})" for name, count in counts.items()))
