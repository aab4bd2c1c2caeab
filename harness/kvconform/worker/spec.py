"""How the workers of one backend are started."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from kvconform.errors import BadArgument
from kvconform.worker.start import FORK, START_METHODS, WORKER

STEP_TIMEOUT = 120.0
"""Seconds without progress that make a timeout. A compilation within a step takes 5 to 15 s, and more under load."""
DEVICES = ("cpu", "cuda")


@dataclass
class WorkerSpec:
    """How to start the workers of one backend. ``cpus``: the processors that they may use, if the system supports it;
    None: any. ``module``: what the interpreter runs as the worker. ``start_method``: ``fork`` or ``spawn``; a worker
    that cannot be forked is a new process. Raises BadArgument for an unknown device or method."""

    address: str
    device: str = "cpu"
    python: str = sys.executable
    step_timeout: float = STEP_TIMEOUT
    environment: dict[str, str] = field(default_factory=dict)
    cpus: tuple[int, ...] | None = None
    module: str = WORKER
    start_method: str = FORK

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise BadArgument("device", self.device, DEVICES)
        if self.start_method not in START_METHODS:
            raise BadArgument("start_method", self.start_method, START_METHODS)
