"""What is timed: a decoder's config, its depths and prompts, the backends that take part, and published figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvconform.bench.record import CEILINGS
from kvconform_specs.config import Config


@dataclass(frozen=True)
class Published:
    """Published figures: what was done, seconds or tokens a second with the cache and without it, and the ratio of the
    two. ``arm``: the backend that has the design here; ``phases``: what corresponds to the figures, with the cache and
    without. ``differs``: sentences. ``runs``: the number of runs whose mean the figures are."""

    what: str
    cached: str
    uncached: str
    ratio: float
    machine: str
    source: str
    arm: str
    phases: tuple[str, str]
    differs: tuple[str, ...]
    runs: int = 1


@dataclass(frozen=True)
class Preset:
    """A decoder and the sizes at which it is timed; all sizes are in tokens.

    depths: tokens in the cache before a timed decode step. prompts: lengths of a timed prefill. about: one sentence.
    batches: numbers of rows, each with the same tokens. recomputed: the depths whose tokens are also computed without
    a cache; None: all depths. generate: the tokens of the prompt and the tokens that are generated after it, with the
    cache and without. backends: those that are timed by default, the reference first. addresses: of names that are
    not installed backends, or are built at other sizes; they need the conformance results of the name.
    """

    name: str
    config: Config
    depths: tuple[int, ...]
    prompts: tuple[int, ...]
    about: str
    batches: tuple[int, ...] = (1,)
    recomputed: tuple[int, ...] | None = None
    generate: tuple[int, int] | None = None
    backends: tuple[str, ...] = ("eager-static", "eager", "compiled", "onnx")
    addresses: dict[str, str] = field(default_factory=dict, hash=False)
    published: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        if self.config.profile != "decoder":
            raise ValueError(f"preset {self.name}: only decoders are timed")
        generated = () if self.generate is None else (sum(self.generate) - 1,)
        for n in (*self.depths, *self.prompts, *generated):
            if not 0 < n < self.config.capacity:
                raise ValueError(f"preset {self.name}: no room for a step at {n} of {self.config.capacity} tokens")

    def to_json(self) -> dict[str, Any]:
        """As it is read back: lists for tuples."""
        found: dict[str, Any] = json.loads(json.dumps({**asdict(self), "config": self.config.to_json()}))
        return found


@dataclass(frozen=True)
class CasePlan:
    """A case before any backend is admitted to it: its phases (``record.PHASES``), depth, batch and new tokens.
    ``designs_only``: only the reference and backends with a published design are timed, because it takes long."""

    phases: tuple[str, ...]
    depth: int
    batch: int = 1
    new: int = 0
    designs_only: bool = False

    def __str__(self) -> str:
        phases = " and ".join(phase for phase in self.phases if phase not in CEILINGS)
        return f"{phases} at {self.depth}{f' x {self.batch}' if self.batch > 1 else ''}"


def case_plans(preset: Preset, phases: Sequence[str] = ()) -> list[CasePlan]:
    """The cases of a preset in the order in which they are run, short ones first; with ``phases`` only theirs."""
    found = []
    for batch in preset.batches:
        found += [CasePlan(("decode", *CEILINGS), n, batch) for n in preset.depths]
        found += [CasePlan(("prefill",), n, batch) for n in preset.prompts]
        if preset.generate is not None:
            found.append(CasePlan(("generate",), preset.generate[0], batch, preset.generate[1]))
    recomputed = preset.depths if preset.recomputed is None else preset.recomputed
    found += [CasePlan(("decode", "recompute", "recompute-last"), n) for n in recomputed]
    if preset.generate is not None:
        loops = ("generate", "regenerate", "regenerate-last")
        found.append(CasePlan(loops, preset.generate[0], 1, preset.generate[1], designs_only=True))
    return [plan for plan in found if not phases or _asked(plan, phases)]


def _asked(plan: CasePlan, phases: Sequence[str]) -> bool:
    """Whether phases select a case; one that compares a cached phase with uncached ones is selected by the latter."""
    first, *others = (phase for phase in plan.phases if phase not in CEILINGS)
    return any(phase in phases for phase in others) if others else first in phases


STEPS_OF = {"generate": ("prefill", "decode"), "regenerate": ("recompute",), "regenerate-last": ("recompute-last",)}
"""The steps of which a generation is made."""


def single_steps(plans: Iterable[CasePlan]) -> list[tuple[str, int, int]]:
    """Each phase of a single step that these cases need, with its depth and its batch, once."""
    found = [
        (step, plan.depth, plan.batch)
        for plan in plans
        for phase in plan.phases
        if phase not in CEILINGS
        for step in STEPS_OF.get(phase, (phase,))
    ]
    return list(dict.fromkeys(found))


def _rope(capacity: int, **sizes: Any) -> Config:
    """A decoder with rotary positions and a vocabulary that is small, so that the LM head does not dominate."""
    return Config("decoder", **sizes, vocabulary=1024, positions="rope", capacity=capacity)


def _learned(capacity: int, **more: Any) -> Config:
    """A decoder with learned positions and GPT-2's vocabulary."""
    return Config("decoder", head_dim=64, vocabulary=50257, positions="learned", capacity=capacity, **more)


def _gpt2(capacity: int) -> Config:
    """The shape of GPT-2 124M; its MLP is gated here, with as many weights. Reserved are the special tokens of a model
    that is made of a transformers config here."""
    sizes: dict[str, Any] = {"heads": 12, "kv_heads": 12, "layers": 12, "width": 768, "mlp": 2048}
    return _learned(capacity, **sizes, init_std=0.02, reserved=(0, 1, 2))


SIZES = {
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "vocab_size": 50257,
    "n_positions": 1032,
    "initializer_range": 0.02,
}
GPT2 = f"hf:GPT2Config?{json.dumps({'config': SIZES})}"
SHAPE = "ours is a decoder of the same shape with as many weights: gated MLP, RMS norm, no biases, an untied LM head"
GATED = "the decoder around the cache is ours, of the same shape with as many weights"

FEWER = "100 new tokens here, not 1000: the ratio grows with them"

LONG_GENERATION = Preset(
    "gpt2-transformers",
    _gpt2(1032),
    depths=(128, 512, 1000),
    prompts=(128,),
    about="GPT-2 124M through transformers, random weights, 1000 new tokens",
    generate=(4, 1000),
    backends=("eager-static", "gpt2-transformers", "compiled"),
    addresses={"gpt2-transformers": GPT2},
    published=(
        Published(
            "1000 new tokens, 10 runs",
            "11.885 ± 0.272 s",
            "56.197 ± 1.855 s",
            4.73,
            "T4",
            "an article on KV caching: GPT-2 through transformers",
            "gpt2-transformers",
            ("generate", "regenerate"),
            (SHAPE,),
            runs=10,
        ),
    ),
)
SMALL = Preset(
    "small",
    _rope(528, heads=8, kv_heads=4, head_dim=32, layers=4, width=256, mlp=512),
    depths=(64, 128, 256, 512),
    prompts=(64, 256, 512),
    about="four layers of a usual decoder: how each phase grows with the depth",
    batches=(1, 4),
    generate=(64, 64),
)
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        replace(
            SMALL,
            name="quick",
            depths=(64, 256, 512),
            prompts=(256,),
            about="the preset small in few cases: a run of three minutes",
            batches=(1,),
            recomputed=(256,),
            generate=None,
        ),
        SMALL,
        Preset(
            "past-tuples",
            _learned(264, heads=8, kv_heads=8, layers=1, width=512, mlp=0),
            depths=(128, 192, 255),
            prompts=(128,),
            about="one layer under GPT-2's vocabulary, prompt 128, 128 tokens generated: the LM head weighs most",
            generate=(128, 128),
            backends=("eager-static", "past-tuples", "compiled", "onnx", "onnx-shared"),
            published=(
                Published(
                    "128 tokens after a prompt of 128",
                    "0.0315 s",
                    "0.0997 s",
                    3.17,
                    "A100",
                    "a notebook on KV caches: one attention layer, width 512, 8 heads, vocabulary 50257",
                    "past-tuples",
                    ("generate", "regenerate"),
                    (
                        "its cached loop ran the prefill twice and dropped a token",
                        "which positions its uncached loop projects decides the ratio: both are timed here",
                    ),
                ),
            ),
        ),
        Preset(
            "module-buffers",
            _gpt2(256),
            depths=(128, 192),
            prompts=(4, 128),
            about="the shape of GPT-2 124M, a prompt of 4 tokens, 200 new ones",
            generate=(4, 200),
            backends=("eager-static", "module-buffers", "compiled"),
            published=(
                Published(
                    "200 tokens after a prompt of 4",
                    "110 tokens/s",
                    "27 tokens/s",
                    110 / 27,
                    "Apple M4",
                    "LLMs from scratch, chapter 4, bonus on KV caches: GPT-124M",
                    "module-buffers",
                    ("generate", "regenerate"),
                    (GATED,),
                ),
            ),
        ),
        LONG_GENERATION,
        replace(
            LONG_GENERATION,
            name="gpt2-transformers-short",
            config=_gpt2(136),
            depths=(64, 128),
            prompts=(64,),
            generate=(4, 100),
            about="as gpt2-transformers with 100 new tokens: minutes of one CPU thread",
            published=tuple(replace(one, differs=(*one.differs, FEWER)) for one in LONG_GENERATION.published),
        ),
        Preset(
            "gqa",
            _rope(1040, heads=16, kv_heads=2, head_dim=64, layers=4, width=512, mlp=1024),
            depths=(128, 256, 512, 1024),
            prompts=(128,),
            about="eight query heads share a KV head: a cache an eighth as large",
            batches=(1, 4),
            backends=("eager-static", "eager", "compiled", "onnx", "onnx-shared"),
        ),
        Preset(
            "long",
            _rope(8208, heads=8, kv_heads=2, head_dim=64, layers=2, width=256, mlp=512),
            depths=(1024, 2048, 4096, 8192),
            prompts=(1024,),
            about="where the cache weighs more than the weights",
            backends=("eager-static", "eager", "onnx", "onnx-shared"),
        ),
    )
}
