"""Faults of a given scale that is negative or 0."""

from __future__ import annotations

import math

import numpy as np

from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array

SCALE = "definition.scale"
DEFINITION = "definition.attention"
ZERO = ("attention-mean",)
NEGATIVE = ("attention-scale", "attention-odd")


class ScaleZeroIsDefault(
    Planted, breaks=(SCALE, DEFINITION), kind="M11", bug="SKaiNET-developers/SKaiNET/pull/880", configs=ZERO
):
    """A scale of 0 is taken for one that is not given: ``scale or 1 / sqrt(d)``."""

    def scores(self, query: Array, keys: Array) -> Array:
        right = super().scores(query, keys)
        if self.config.scale != 0:
            return right
        scores = self.product(query, keys.swapaxes(-1, -2)) * np.float32(1 / math.sqrt(self.config.head_dim))
        return self.instead(np.where(np.isneginf(right), right, scores), right)


class ScaleSignLost(
    Planted, breaks=(SCALE, DEFINITION), kind="M11", bug="pytorch/pytorch/pull/105202", configs=NEGATIVE
):
    """The root of the scale's absolute value multiplies queries and keys: the sign is lost."""

    def scores(self, query: Array, keys: Array) -> Array:
        wrong = query if self.config.score_scale >= 0 else -query
        return super().scores(self.instead(wrong, query), keys)


class DecodeRootOfScale(
    Planted,
    breaks=(SCALE, DEFINITION),
    kind="M11",
    bug="pytorch/pytorch/pull/105202",
    conditional=True,
    configs=NEGATIVE,
):
    """In decode steps the root of the scale multiplies queries and keys: that of a negative one is NaN."""

    def scores(self, query: Array, keys: Array) -> Array:
        wrong = query if self.config.score_scale >= 0 else np.full_like(query, np.nan)
        decode = keys.shape[2] > query.shape[2] == 1
        return super().scores(self.instead(wrong, query) if decode else query, keys)


class MaskBeforeScale(
    Planted, breaks=(SCALE, DEFINITION), kind="M11", bug="NVIDIA/cudnn-frontend/pull/804", configs=(*ZERO, *NEGATIVE)
):
    """Scores are masked with minus infinity and then scaled: a negative scale makes that plus infinity, and 0 NaN."""

    def scores(self, query: Array, keys: Array) -> Array:
        right = super().scores(query, keys)
        hidden = np.isneginf(right)
        with np.errstate(invalid="ignore"):
            return self.instead(np.where(hidden, right * np.float32(self.config.score_scale), right), right)
