"""Groups of suite configs on which faults show."""

from __future__ import annotations

LAYERS = ("attention-gqa", "attention-window", "attention-softcap", "attention-sink")
DECODERS = ("decoder-rope", "decoder-learned", "decoder-softcap")
PLACED = ("decoder-rope", "decoder-learned")
ROPE = ("decoder-rope",)
LONGROPE = ("decoder-longrope",)
SHARED = ("decoder-shared",)
LATENT = ("decoder-latent",)
SCALED = (*LONGROPE, *SHARED)
LEARNED = ("decoder-learned",)
WINDOWED = ("attention-window", "attention-sink", "decoder-learned")
SOFTCAPPED = ("attention-softcap", "decoder-softcap")
WITH_SINK = ("attention-sink",)
LONG = ("attention-long",)
