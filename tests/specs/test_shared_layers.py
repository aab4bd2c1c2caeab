"""Layers that read another layer's keys and values: the definition, costs and what a config may say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvconform.worker.execute import execute
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.costs import cache_bytes, multiply_adds
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Program, ReadCache
from kvconform_specs.reference.definition import decoder
from kvconform_specs.tensors import Streams, weight_shapes, weights

SHARED = CONFIGS["decoder-shared"]
OWN = replace(SHARED, kv_source=())


def logits(config: Config, held: dict[str, np.ndarray]) -> np.ndarray:
    tokens = Streams(config, 14, (0,)).tape(3)[0]
    return decoder(tokens, {name: value.astype(np.float64) for name, value in held.items()}, config)


def test_a_layer_that_shares_has_no_projections_of_its_own() -> None:
    missing = set(weight_shapes(OWN)) - set(weight_shapes(SHARED))
    assert missing == {"layers.2.key", "layers.2.value"}
    assert SHARED.caching == (0, 1)


def test_a_layer_reads_the_keys_and_values_of_its_source() -> None:
    """If source and reader see the same input, sharing is the same as equal projections."""
    held = weights(OWN)
    # layers 0 and 1 add nothing to the residual stream, so that all layers see the embedding
    for layer in (0, 1):
        held[f"layers.{layer}.output"] = np.zeros_like(held[f"layers.{layer}.output"])
    held["layers.2.norm_attention"] = held["layers.0.norm_attention"]
    for name in ("key", "value"):
        held[f"layers.2.{name}"] = held[f"layers.0.{name}"]
    assert np.array_equal(logits(SHARED, held), logits(OWN, held))
    for name in ("key", "value"):
        held[f"layers.2.{name}"] = held[f"layers.1.{name}"]
    assert np.max(np.abs(logits(SHARED, held) - logits(OWN, held))) > 1e-3


def test_shared_layers_are_stored_once_and_multiplied_every_time() -> None:
    assert cache_bytes(SHARED, 10) == cache_bytes(OWN, 10) * 2 // 3
    projections = 2 * SHARED.width * SHARED.kv_heads * SHARED.head_dim
    assert multiply_adds(OWN, 5, 1) - multiply_adds(SHARED, 5, 1) == projections


def test_a_read_shows_the_layers_that_have_keys_and_values() -> None:
    program = Program(SHARED, (Append("a", (4, 4), 5), ReadCache("a")))
    (trace,) = execute(NumpyCache(SHARED, weights(SHARED), "cpu"), program, (0,))
    assert trace[1].output is not None
    assert trace[1].output.shape == (2, 4, SHARED.kept)


@pytest.mark.parametrize("source", [(0, 1), (1, 1, 1), (0, 0, 1), (0, 1, 2, 3)])
def test_a_layer_reads_an_earlier_one_that_has_its_own(source: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"config\.kv_source"):
        replace(SHARED, kv_source=source)
