"""Greedy generation with any backend's ``step``: one prefill, then one step per token except the last."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def greedy(backend: Any, tokens: Array, new: int, **options: Any) -> Array:
    """The ``new`` tokens ``(b, new)`` int64 after prompts ``(b, t)``. The last one is not fed back.

    ``options``: keywords of every step.
    """
    logits, cache = backend.step(backend.start(len(tokens)), tokens, **options)
    picked = [logits[:, -1:].argmax(axis=-1)]  # (b, 1)
    while len(picked) < new:
        logits, cache = backend.step(cache, picked[-1], **options)
        picked.append(logits[:, -1:].argmax(axis=-1))
    return np.concatenate(picked, axis=1).astype(np.int64)
