"""The fault catalogue: deliberately faulty backends, each modelled on a real bug.

Every clause must detect at least one of them (``kvconform audit``). Importing this package imports no framework: the
published torch listings are referred to by address.
"""

from __future__ import annotations

from kvconform_backends.faults import (
    accounting,
    batch,
    branches,
    cache_dtype,
    capacity,
    capture,
    causality,
    contents,
    context,
    controls,
    definition,
    determinism,
    equivalence,
    errors,
    eviction,
    generation,
    graphs,
    grouped,
    last_position,
    latent,
    layout,
    lifecycle,
    memory,
    node_by_node,
    numerics,
    paging,
    positions,
    quantised,
    rollbacks,
    scale,
    scaled_rope,
    shape,
    shared_layers,
    window,
)
from kvconform_backends.faults.planted import GITHUB, Fault, faults_of
from kvconform_backends.numpy import grouped as numpy_grouped
from kvconform_backends.numpy.cache import NumpyCache

__all__ = ["CONTROLS", "FAULTS"]

PUBLISHED = (
    Fault(
        "published-first-listing",
        "kvconform_backends.faults.published:FirstListing",
        ("causality.past-seen", "equivalence.decode"),
        GITHUB + "pytorch/pytorch/issues/108108",
        "A published notebook always passes is_causal=True: each decode step attends to the first key only.",
        classes=("M1",),
        configs=("attention-gqa", "decoder-rope"),
    ),
    Fault(
        "published-second-listing",
        "kvconform_backends.faults.published:SecondListing",
        ("causality.future-blind", "equivalence.chunks"),
        GITHUB + "QwenLM/Qwen/issues/979",
        "A published notebook passes is_causal=(past_kv is None): a chunk on a non-empty cache sees its own future.",
        classes=("M2",),
        conditional=True,
        configs=("attention-gqa", "decoder-rope"),
    ),
    Fault(
        "published-generation",
        "kvconform_backends.faults.published:PrefillTwice",
        ("equivalence.generation",),
        GITHUB + "nod-ai/amd-shark-ai/pull/338",
        "A published notebook's generation loop runs the prefill twice and drops the first generated token.",
        classes=("L1",),
        configs=("decoder-rope",),
    ),
    Fault(
        "published-chunk",
        "kvconform_backends.faults.published:ChunkOnCache",
        ("shape.output",),
        GITHUB + "rasbt/LLMs-from-scratch/pull/697",
        "A published decoder cuts its mask to the new tokens: a chunk on a non-empty cache raises an exception.",
        classes=("M5",),
        conditional=True,
        configs=("attention-gqa", "decoder-rope"),
    ),
    Fault(
        "published-global-list",
        "kvconform_backends.faults.published:GlobalList",
        ("lifecycle.independent",),
        GITHUB + "Lightning-AI/litgpt/pull/1596",
        "A published article keeps keys and values in a global list that is never cleared: a second prompt reads "
        "the keys of the first.",
        classes=("C6", "C7"),
        configs=("attention-gqa",),
    ),
)

MODULES = (
    shape,
    causality,
    equivalence,
    generation,
    last_position,
    definition,
    positions,
    scale,
    scaled_rope,
    shared_layers,
    latent,
    lifecycle,
    context,
    branches,
    rollbacks,
    contents,
    batch,
    window,
    eviction,
    capacity,
    errors,
    numerics,
    cache_dtype,
    layout,
    memory,
    paging,
    quantised,
    grouped,
    capture,
    determinism,
    accounting,
    graphs,
)
FAULTS: tuple[Fault, ...] = (*(fault for module in MODULES for fault in faults_of(module)), *PUBLISHED)
CONTROLS: tuple[type, ...] = (
    *(
        kind
        for kind in vars(controls).values()
        if isinstance(kind, type) and issubclass(kind, NumpyCache) and kind.__module__ == controls.__name__
    ),
    rollbacks.SlackRing,
    eviction.CutToWindow,
    cache_dtype.EightBitDecoder,
    cache_dtype.HalfCache,
    cache_dtype.MeanOfMasked,
    determinism.OneByOne,
    capture.Captures,
    node_by_node.Graph,
    *numpy_grouped.CONTROLS,
)
"""Equivalent mutants: unusual but correct backends (``kvconform audit --controls``)."""
