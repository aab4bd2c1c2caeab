"""The closed table of configs on which every backend is tested; the sizes of each are pairwise distinct.

Together they cover MHA, GQA, MQA, window, softcap, a sink, a bias, a given scale and head dims of every kind: each pair
of these in some config, and each option alone in one, so that a backend that refuses the others still meets it. A given
scale is positive, negative or 0.
Further: layers with and without a window in one decoder, each kind of positions, rotary factors that are scaled and
that change with the length, layers that share keys and values, latent attention, a context for each sequence, and a
long sequence.
"""

from __future__ import annotations

from dataclasses import replace

from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.rotary import Rotary

CONFIGS: dict[str, Config] = {
    "attention-gqa": Config("attention", heads=6, kv_heads=3, head_dim=8),
    "attention-window": Config("attention", heads=8, kv_heads=2, head_dim=16, window=5),
    "attention-softcap": Config(
        "attention", heads=5, kv_heads=1, head_dim=12, softcap=1.5, scale=0.37, positions="alibi"
    ),
    "attention-sink": Config("attention", heads=7, kv_heads=7, head_dim=10, window=6, sink=1.0),
    # each option alone, plain multi-head attention, and head dims of every kind
    "attention-mha": Config("attention", heads=5, kv_heads=5, head_dim=10),
    "attention-scale": Config("attention", heads=3, kv_heads=3, head_dim=16, scale=-0.21),
    "attention-capped": Config("attention", heads=3, kv_heads=3, head_dim=32, softcap=1.2),
    "attention-alibi": Config("attention", heads=4, kv_heads=2, head_dim=64, positions="alibi"),
    "attention-bare-sink": Config("attention", heads=3, kv_heads=1, head_dim=16, sink=0.8),
    # all scores are equal, so that no key matters: for the few clauses about the scale
    "attention-mean": Config("attention", heads=4, kv_heads=2, head_dim=24, scale=0.0),
    # and together
    "attention-odd": Config("attention", heads=4, kv_heads=2, head_dim=9, window=6, softcap=1.8, sink=0.7, scale=-0.3),
    "attention-small": Config(
        "attention", heads=3, kv_heads=3, head_dim=8, window=6, softcap=1.7, sink=0.9, positions="alibi"
    ),
    "attention-wide": Config(
        "attention", heads=2, kv_heads=1, head_dim=128, window=7, sink=0.6, scale=0.1, positions="alibi"
    ),
    # among 4 096 random keys a needle stands out from head dim 24 on (a test of the bounds)
    "attention-long": Config("attention", heads=2, kv_heads=1, head_dim=32, capacity=4160),
    "decoder-rope": Config(
        "decoder",
        heads=6,
        kv_heads=3,
        head_dim=8,
        layers=2,
        width=20,
        mlp=28,
        vocabulary=53,
        positions="rope",
        contexts=3,
    ),
    "decoder-learned": Config(
        "decoder",
        heads=8,
        kv_heads=2,
        head_dim=6,
        layers=3,
        width=20,
        mlp=0,
        vocabulary=59,
        positions="learned",
        window=5,
        window_every=2,
        seed=1,
    ),
    "decoder-softcap": Config(
        "decoder",
        heads=4,
        kv_heads=1,
        head_dim=10,
        layers=2,
        width=22,
        mlp=26,
        vocabulary=61,
        positions="alibi",
        softcap=2.0,
        seed=2,
    ),
    # the commonest kind of windowed model, and its head dim is width / heads
    "decoder-sliding": Config(
        "decoder",
        heads=6,
        kv_heads=3,
        head_dim=8,
        layers=2,
        width=48,
        mlp=36,
        vocabulary=67,
        positions="rope",
        window=6,
        seed=5,
    ),
    # the angles of all keys change with token 13; one layer, so that a cache of unrotated keys is enough
    "decoder-longrope": Config(
        "decoder",
        heads=3,
        kv_heads=3,
        head_dim=8,
        width=24,
        vocabulary=47,
        positions="rope",
        rotary=Rotary("longrope", 3.0, 12, short=(1.0, 1.1, 1.2, 1.5), long=(1.5, 2.5, 3.5, 5.0)),
        seed=3,
    ),
    # the last layer reads the keys and values of the other one with a window, as in Gemma 3n
    "decoder-shared": Config(
        "decoder",
        heads=8,
        kv_heads=2,
        head_dim=6,
        layers=3,
        width=22,
        vocabulary=43,
        positions="rope",
        window=5,
        window_every=2,
        rotary=Rotary("yarn", 4.0, 16),
        kv_source=(0, 1, 0),
        seed=4,
    ),
    "decoder-latent": Config(
        "decoder",
        heads=5,
        kv_heads=5,
        head_dim=6,
        width=18,
        vocabulary=41,
        positions="rope",
        latent=9,
        rotary_dim=4,
        seed=6,
    ),
}
SHARES = {
    "attention-mha": 0.2,
    "attention-scale": 0.2,
    "attention-mean": 0.2,
    "attention-capped": 0.2,
    "attention-alibi": 0.2,
    "attention-bare-sink": 0.2,
    "attention-odd": 0.2,
    "attention-small": 0.2,
    "attention-wide": 0.2,
    "decoder-sliding": 0.2,
    "decoder-longrope": 0.3,
    "decoder-shared": 0.3,
    "decoder-latent": 0.3,
}
"""The share of an effort's structures that is drawn for a config, where it is not all: what these configs vary shows in
nearly any program, or in a situation that clauses name."""
LONG = 1024
"""A config of this capacity or more is for clauses about long contexts only: its programs take long."""


def config_named(name: str, dtype: str = "float32") -> Config:
    """The config of that name in a dtype. Raises SpecError if there is none."""
    if name not in CONFIGS:
        raise SpecError("config", f"no config named {name!r}; known: {', '.join(CONFIGS)}")
    return replace(CONFIGS[name], dtype=dtype)


def share(label: str) -> float:
    """The share of an effort's structures that is drawn for a config with that label."""
    name = max((name for name in CONFIGS if label == name or label.startswith(f"{name}-")), key=len, default="")
    return SHARES.get(name, 1.0)


def label(name: str, dtype: str) -> str:
    """The name of a config in results: its own, with its dtype unless that is float32."""
    return name if dtype == "float32" else f"{name}-{dtype}"
