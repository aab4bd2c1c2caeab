"""How a target differs from another artefact that is its reference, where it does so without a cache.

The target's own forward is compared with the reference's on a few long sequences. Variants of the reference, which
differ from it in one thing each, are tried: those are named that give all outputs within the bounds of the reference
where the reference itself does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from kvconform.errors import WorkerDied
from kvconform.explain.diagnosis.record import Disagreement
from kvconform.explain.visibility import FORBIDDEN, REQUIRED, Map
from kvconform.judging.observed import Array
from kvconform.worker.client import WorkerClient
from kvconform_specs.claims import Precision
from kvconform_specs.config import Config
from kvconform_specs.reference.own_forward import ROWS
from kvconform_specs.reference.solver import model
from kvconform_specs.tensors import Streams

STREAM = 17
"""Of the sequences that are compared."""


def agrees(client: WorkerClient, config: Config) -> bool:
    """Whether the own forward is within the bounds of the reference. Raises WorkerDied where a forward fails."""
    got, want, bound = _compared(client, config)
    return bool(_within(got, want, bound).all())


def disagreement(client: WorkerClient, config: Config, maps: Sequence[Map]) -> Disagreement | None:
    """None if the own forward is within the bounds of the reference. Raises WorkerDied where a forward fails."""
    got, want, bound = _compared(client, config)
    right = _within(got, want, bound)
    if right.all():
        return None
    first = int(np.argmin(right))
    alike = [*_alike(client, config, got, bound)]
    return Disagreement(
        reference=client.reference_address,
        first_token=first,
        correlation=round(float(np.corrcoef(got[:, first].ravel(), want[:, first].ravel())[0, 1]), 3),
        size=float(np.max(np.abs(got - want)[:, first]) / np.sqrt(np.mean(np.square(want[:, first])))),
        window=config.window if config.window == first else None,
        sees_more=_shows(maps, FORBIDDEN),
        sees_less=_shows(maps, REQUIRED),
        variants=alike,
        cache_dtype="" if alike else _cache_dtype(client, config, got),
    )


def _alike(client: WorkerClient, config: Config, got: Array, bound: Array) -> Iterator[str]:
    """The variants of the reference that give these outputs. One that raises is none."""
    for variant in client.reference_variants(config):
        with suppress(WorkerDied):
            if _within(got, client.variant_forward(config, variant)(_tape(config), 0.0, 0.0, 0), bound).all():
                yield variant


def _cache_dtype(client: WorkerClient, config: Config, got: Array) -> str:
    """The dtype of the target's cache, if that explains all of the difference."""
    told = "" if client.target is None else str(client.target["cache_dtype"])
    if not told:
        return ""
    want, bound = _wanted(client, config, replace(client.claims.precision, cache_dtype=told))
    return told if _within(got, want, bound).all() else ""


def _tape(config: Config) -> Array:
    return Streams(config, config.capacity, range(ROWS)).tape(STREAM)


def _compared(client: WorkerClient, config: Config) -> tuple[Array, Array, Array]:
    """What the own forward gives, what the reference does, and the bounds, ``(rows, tokens, outputs)``."""
    return client.own_forward(config, _tape(config)), *_wanted(client, config, client.claims.precision)


def _wanted(client: WorkerClient, config: Config, precision: Precision) -> tuple[Array, Array]:
    """What the reference gives, and the bounds in a precision."""
    forward, tape = client.reference_forward, _tape(config)
    assert forward is not None
    numbers = model(config, forward(config), lambda: tape[:, None], 0, 0, precision).numbers
    return numbers("value")[:, 0], numbers("bound")[:, 0]


def _within(got: Array, want: Array, bound: Array) -> Array:
    """For each token, whether its outputs are within the bounds in all sequences."""
    return np.asarray(np.all(np.abs(got - want) <= bound, axis=(0, 2)))


def _shows(maps: Sequence[Map], kind: str) -> bool:
    """Whether the map without a cache shows such a difference."""
    return any(kind == shown for one in maps if one.schedule == "full" for _query, _key, shown in one.differences)
