"""What is timed: a decoder's config, and how many tokens are in its cache when."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvconform_specs.config import Config


@dataclass(frozen=True)
class Preset:
    """``depths``: tokens in the cache where a decode step is timed, and recomputed without it; ``prompts``: lengths of
    a timed prefill. All in tokens, batch 1. ``about``: one sentence."""

    name: str
    config: Config
    depths: tuple[int, ...]
    prompts: tuple[int, ...]
    about: str

    def __post_init__(self) -> None:
        if self.config.profile != "decoder":
            raise ValueError(f"preset {self.name}: only decoders are timed")
        for n in (*self.depths, *self.prompts):
            if not 0 < n < self.config.capacity:
                raise ValueError(f"preset {self.name}: no room for a step at {n} of {self.config.capacity} tokens")

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self), "config": self.config.to_json(), "depths": list(self.depths), "prompts": list(self.prompts),
        }  # fmt: skip


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "small",
            Config(
                "decoder", heads=8, kv_heads=4, head_dim=32, layers=4, width=256, mlp=512, vocabulary=1024,
                positions="rope", capacity=528,
            ),
            depths=(64, 128, 256, 512),
            prompts=(64, 256, 512),
            about="four layers of a usual decoder: how each phase grows with the depth",
        ),
        Preset(
            "past-tuples",
            Config(
                "decoder", heads=8, kv_heads=8, head_dim=64, layers=1, width=512, mlp=0, vocabulary=50257,
                positions="learned", capacity=264,
            ),
            depths=(128, 192, 255),
            prompts=(128,),
            about="one layer under GPT-2's vocabulary, prompt 128, 128 tokens generated: the LM head weighs most",
        ),
    )
}  # fmt: skip
