"""The parent's side of one block: it asks a worker to time its own calls."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from kvconform.bench.eligibility import config_of
from kvconform.bench.presets import Preset
from kvconform.bench.protocol import WARM_AGREE, WARM_BLOCK_NS, WARM_SECONDS, WARM_STEPS
from kvconform.bench.record import CEILINGS, Arm
from kvconform.bench.worker.timer import Block
from kvconform.errors import BackendLost, BackendUnavailable, WorkerDied
from kvconform.worker.client import BUILD_TIMEOUT, WorkerClient
from kvconform.worker.protocol import Header

WORKER = "kvconform.bench.worker.server"
"""The module that timed workers run."""


class TimingClient:
    """``clients``: live workers by name, the reference first; the machine's ceilings are measured in its worker.
    ``digests``: of the tokens that each preset's arms must be timed on, made from ``seed``."""

    def __init__(self, clients: Mapping[str, WorkerClient], seed: int, digests: Mapping[str, str]) -> None:
        self.clients, self.seed, self.digests = clients, seed, digests

    def blocks(
        self,
        preset: Preset,
        arm: Arm,
        depth: int,
        steps: int,
        count: int,
        *,
        batch: int = 1,
        new: int = 0,
        timeout: float | None = None,
    ) -> list[Block]:
        """``count`` blocks of ``steps`` calls each, or of a generation; ``timeout`` in seconds, the step timeout if
        None. Raises BackendLost."""
        asked = {"op": "time", "phase": arm.phase, "depth": depth, "steps": steps, "count": count, "new": new}
        reply = self._ask(preset, arm, depth, {**asked, "batch": batch}, timeout)
        try:
            digest, blocks = reply["digest"], [_block(one) for one in reply["blocks"]]
        except (KeyError, TypeError, ValueError) as error:  # of another version
            words = f"its worker sends no block that this version understands: {type(error).__name__}: {error}"
            raise BackendLost(arm.backend, words) from error
        if digest != self.digests[preset.name]:
            raise BackendLost(arm.backend, "its interpreter makes other tokens of the same seed")
        return blocks

    def device(self, preset: Preset, arm: Arm, depth: int, steps: int, count: int, *, batch: int = 1) -> list[int]:
        """The device's own nanoseconds of ``count`` blocks: see ``Timer.device``. Raises BackendLost."""
        asked = {"op": "device", "phase": arm.phase, "depth": depth, "steps": steps, "count": count, "batch": batch}
        found: list[int] = self._ask(preset, arm, depth, asked, BUILD_TIMEOUT)["ns"]
        return found

    def memory(self, preset: Preset, backend: str, depth: int, batch: int) -> dict[str, int | None]:
        """Bytes that the cache of a backend takes: see ``Timer.memory``. Raises BackendLost."""
        message = {"op": "memory", "depth": depth, "batch": batch}
        found: dict[str, int | None] = self._ask(preset, Arm(backend, "prefill"), depth, message, None)["memory"]
        return found

    def _ask(self, preset: Preset, arm: Arm, depth: int, message: dict[str, object], timeout: float | None) -> Header:
        client = next(iter(self.clients.values())) if arm.phase in CEILINGS else self.clients[arm.backend]
        common = {"config": config_of(client, preset).to_json(), "timed": preset.config.to_json(), "seed": self.seed}
        try:
            return client.ask({**common, **message}, timeout or client.spec.step_timeout)
        except (WorkerDied, BackendUnavailable) as error:
            raise BackendLost(arm.backend, f"{arm.phase}({depth}): {error}") from error

    def warm(self, preset: Preset, arm: Arm, depth: int, limit: float, batch: int = 1) -> float:
        """Runs an arm until its times agree, for at most ``limit`` seconds. Returns nanoseconds per step."""
        deadline = time.perf_counter() + min(WARM_SECONDS, limit)
        medians: list[float] = []
        count = 1
        while True:
            medians.append(median(block.ns for block in self.blocks(preset, arm, depth, 1, count, batch=batch)))
            count = max(1, min(WARM_STEPS, int(WARM_BLOCK_NS // medians[-1])))
            last = medians[-3:]
            agree = len(last) == 3 and max(last) <= (1 + WARM_AGREE) * min(last)
            if agree or time.perf_counter() > deadline:
                return median(last)


def _block(reply: Mapping[str, Any]) -> Block:
    """Fields that a worker of another version adds are ignored; a field that it lacks is an error."""
    known = {name: reply[name] for name in Block._fields if name in reply}
    return Block(**{**known, "tokens": tuple(reply["tokens"])})
