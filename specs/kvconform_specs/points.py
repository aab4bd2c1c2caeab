"""The closed table of configs that the suite asks every backend for; their sizes are pairwise distinct.

Together they cover GQA, MQA, window, softcap, a scale of one's own, a head dim that is no multiple of 8, and each kind
of positions. They are few because compiled and exported subjects take long to build.
"""

from __future__ import annotations

from dataclasses import replace

from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError

POINTS: dict[str, Config] = {
    "attention-gqa": Config("attention", heads=6, kv_heads=3, head_dim=8),
    "attention-window": Config("attention", heads=8, kv_heads=2, head_dim=16, window=5),
    "attention-softcap": Config("attention", heads=5, kv_heads=1, head_dim=12, softcap=1.5, scale=0.37),
    "decoder-rope": Config(
        "decoder", heads=6, kv_heads=3, head_dim=8, layers=2, width=20, mlp=28, vocabulary=53, positions="rope"
    ),
    "decoder-learned": Config(
        "decoder", heads=8, kv_heads=2, head_dim=6, layers=3, width=20, mlp=0, vocabulary=59, positions="learned",
        window=5, seed=1,
    ),
    "decoder-softcap": Config(
        "decoder", heads=4, kv_heads=1, head_dim=10, layers=2, width=22, mlp=26, vocabulary=61, softcap=2.0, seed=2,
    ),
}  # fmt: skip


def point(name: str, dtype: str = "float32") -> Config:
    """The config of that name in a dtype. Raises SpecError where there is none."""
    if name not in POINTS:
        raise SpecError("config", f"no config named {name!r}; known: {', '.join(POINTS)}")
    return replace(POINTS[name], dtype=dtype)


def label(name: str, dtype: str) -> str:
    """How a config is called in results: its name, and its dtype where that is not float32."""
    return name if dtype == "float32" else f"{name}-{dtype}"
