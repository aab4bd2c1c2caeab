"""Compares backends with one another: their outputs for the same weights and the same program."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvconform.errors import WorkerDied
from kvconform.worker.client import WorkerClient
from kvconform_specs.claimed import claimed
from kvconform_specs.config import Config
from kvconform_specs.program import Program
from kvconform_specs.reference.oracle import expect
from kvconform_specs.strategies import appends

Outputs = NDArray[np.float32]


class Pair(msgspec.Struct, frozen=True):
    """Two backends under one config. ``ratio``: largest difference over the sum of the two bounds."""

    config: str
    one: str
    other: str
    ratio: float
    difference: float
    compared: int


def common_program(config: Config) -> Program:
    """Prefill, decode, chunk and decode on two rows."""
    return Program(config, appends("a", (7, 1, 1, 4, 1), batch=2, seed=2024))


def outputs(client: WorkerClient, config: Config) -> Outputs | None:
    """All outputs of the common program in one flat array, or None if the backend cannot run it."""
    claims, program = client.claims, common_program(config)
    if not claimed(program.steps, claims) or claims.returns != "all":
        return None
    try:
        traces = client.run(program, (0,))
    except WorkerDied:
        return None
    steps = [done.output for done in traces.stacked or () if done.output is not None]
    return np.concatenate([step.ravel() for step in steps]) if len(steps) == len(program.steps) else None


def pairs(folder: Path, backends: Sequence[str], configs: dict[str, Config]) -> list[Pair]:
    """Compares every two of these backends whose outputs are in ``folder`` (``<backend>.npz``, by config)."""
    loaded: dict[str, dict[str, Outputs]] = {}
    for file in sorted(file for file in folder.glob("*.npz") if file.stem in backends):
        with np.load(file, allow_pickle=False) as arrays:
            loaded[file.stem] = {name: arrays[name] for name in arrays.files}
    found = []
    for name, config in configs.items():
        have = [backend for backend, arrays in loaded.items() if name in arrays]
        bound = _bounds(config) if len(have) > 1 else None
        for one, other in combinations(have, 2):
            a, b = loaded[one][name].astype(np.float64), loaded[other][name].astype(np.float64)
            if bound is None or not a.shape == b.shape == bound.shape:
                continue
            difference = np.abs(a - b)
            ratio = float(
                np.max(np.nan_to_num(difference / (2 * bound), nan=np.finfo(np.float64).max))
            )  # JSON has no NaN
            found.append(Pair(name, one, other, ratio, float(np.nan_to_num(np.max(difference))), a.size))
    return found


def _bounds(config: Config) -> NDArray[np.float64]:
    """The bound of each number in ``outputs``, in the same order."""
    flat = []
    for want in expect(common_program(config)):
        assert want is not None
        bound = np.broadcast_to(want.bound, want.value.shape)[0]  # (b, t, e)
        if config.profile == "attention":
            b, t, _e = bound.shape
            bound = bound.reshape(b, t, config.heads, config.head_dim).swapaxes(1, 2)  # (b, h, t, d), as outputs
        flat.append(bound.ravel())
    return np.concatenate(flat)
