"""The controller's side of one block: it asks a worker to time itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

from kvconform.speed.presets import Preset
from kvconform.speed.protocol import WARM_AGREE, WARM_BLOCK_NS, WARM_SECONDS, WARM_STEPS
from kvconform.speed.record import Arm
from kvconform.speed.stopwatch import Block
from kvconform.subject import Death, Infrastructure, Subject


class Lost(Exception):
    """A backend can no longer be timed on a preset: which, and why."""

    def __init__(self, backend: str, why: str) -> None:
        super().__init__(why)
        self.backend, self.why = backend, why


class Clock:
    """``digests``: of the tokens that each preset's arms must be timed on, made from ``seed``."""

    def __init__(self, subjects: Mapping[str, Subject], seed: int, digests: Mapping[str, str]) -> None:
        self.subjects, self.seed, self.digests = subjects, seed, digests

    def blocks(
        self, preset: Preset, arm: Arm, depth: int, steps: int, count: int, timeout: float | None = None
    ) -> list[Block]:
        """``count`` blocks of ``steps`` calls each; ``timeout`` in seconds, the step timeout if None. Raises Lost."""
        subject = self.subjects[arm.backend]
        message = {
            "op": "clock", "config": preset.config.to_json(), "seed": self.seed,
            "phase": arm.phase, "depth": depth, "steps": steps, "count": count,
        }  # fmt: skip
        try:
            reply = subject.ask(message, timeout or subject.launch.step_timeout)
        except (Death, Infrastructure) as words:
            raise Lost(arm.backend, f"{arm.phase}({depth}): {words}") from words
        if reply["digest"] != self.digests[preset.name]:
            raise Lost(arm.backend, "its interpreter makes other tokens of the same seed")
        return [(int(ns), int(cpu_ns), int(switched)) for ns, cpu_ns, switched in reply["blocks"]]

    def warm(self, preset: Preset, arm: Arm, depth: int, limit: float) -> float:
        """Runs an arm until it has come to rest, at most ``limit`` seconds. Returns nanoseconds per step."""
        deadline = time.perf_counter() + min(WARM_SECONDS, limit)
        medians: list[float] = []
        count = 1
        while True:
            medians.append(median(ns for ns, _, _ in self.blocks(preset, arm, depth, 1, count)))
            count = max(1, min(WARM_STEPS, int(WARM_BLOCK_NS // medians[-1])))
            last = medians[-3:]
            at_rest = len(last) == 3 and max(last) <= (1 + WARM_AGREE) * min(last)
            if at_rest or time.perf_counter() > deadline:
                return median(last)
