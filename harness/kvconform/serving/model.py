"""The second reference of an engine: the same weights without an engine, which also shows what cold and warm answers
share, such as a dropped window or what a converter has lost.

It is the forward without a cache of a black box, such as a transformers directory, in a worker process. Its bound is
that of a black box at the engine's dtype (``bounds.black_box_bound``), for a logit. A log-probability is a logit minus
a sum that moves by no more than the largest move of a logit, so that its bound is twice that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvconform.errors import BackendUnavailable, WorkerDied
from kvconform.serving.engine import Description
from kvconform.worker.client import WorkerClient
from kvconform.worker.spec import WorkerSpec
from kvconform_specs.config import Config
from kvconform_specs.reference.bounds import STORAGE
from kvconform_specs.reference.oracle import given
from kvconform_specs.serving.program import stream

Array = NDArray[np.float64]
OF_A_LOGIT = 2
"""How many bounds of a logit are the bound of a log-probability."""
COARSEST = "bfloat16"
"""What stands for a dtype that is unknown or has no rounding of its own: the coarsest of those that have one."""
SEPARATED = 3.0
"""The least ratio of the effect of a changed token and of what rounding may do at which the token is seen."""
PROMPTS, CHANGES = 2, 4


@dataclass(frozen=True)
class Rows:
    """Natural log-probabilities ``(t, vocabulary)`` of the token after each of ``t``, and their bounds ``(t,)``."""

    value: Array
    bound: Array


@dataclass(frozen=True)
class Power:
    """What the model can show: the bound, the smallest effect of a changed token of those that are seen, and how many
    of them are."""

    bound: float
    effect: float
    changes: int
    seen: int

    @property
    def blind(self) -> str:
        """Why there is no verdict; empty if there is one."""
        if self.seen * 2 >= self.changes:
            return ""
        return (
            f"the bound on log-probabilities is {self.bound:.2g} in the engine's dtype, and {self.seen} of "
            f"{self.changes} changed tokens move them by more than {SEPARATED:g} times that: what helps: float32"
        )


class Model:
    """The weights that an engine serves, at an address such as ``hf:DIRECTORY``. ``power``: what it can show, measured
    on prompts of ``length`` tokens. Raises BackendUnavailable where it cannot be opened, has no weights of its own, or
    has fewer tokens than the engine."""

    power: Power

    def __init__(self, address: str, facts: Description, length: int) -> None:
        self.address = address
        self.dtype = facts.dtype if facts.dtype is not None and facts.dtype in STORAGE else COARSEST
        self._client = WorkerClient(WorkerSpec(address))
        try:
            self._config = self._chosen(facts)
            self._judged = replace(self._config, dtype=self.dtype)
            self.power = self._power(length, facts.vocabulary)
        except WorkerDied as death:
            self.close()
            raise BackendUnavailable(f"the model {address}: {death}") from death
        except BaseException:
            self.close()
            raise

    def _chosen(self, facts: Description) -> Config:
        decoders = [config for config in self._client.configs.values() if config.profile == "decoder"]
        if not decoders:
            raise BackendUnavailable(f"the model {self.address} is no decoder with weights of its own")
        if decoders[0].vocabulary < facts.vocabulary:
            raise BackendUnavailable(
                f"the model {self.address} is not the one that is served: it has {decoders[0].vocabulary} tokens, the "
                f"engine {facts.vocabulary}"
            )
        return decoders[0]

    def close(self) -> None:
        self._client.close()

    def rows(self, ids: tuple[int, ...], start: int) -> Rows:
        """Of the tokens after ``ids[start]`` and those behind it. Raises WorkerDied where the forward raises."""
        forward = partial(self._client.own_forward, self._config)
        numbers = given(self._judged, forward, np.array(ids)[None, None], start)
        logits, bound = numbers("value")[0, 0], numbers("bound")[0, 0]
        return Rows(log_softmax(logits), OF_A_LOGIT * bound.max(axis=-1))

    def _power(self, length: int, vocabulary: int) -> Power:
        """Measured with a changed token at several places of prompts of this length."""
        effects, bound = [], 0.0
        for seed in range(PROMPTS):
            prompt = stream(seed, length, vocabulary)
            right = self.rows(prompt, length - 1)
            bound = max(bound, float(right.bound[-1]))
            for number in range(CHANGES):
                at = (length - 1) * number // CHANGES
                changed = (*prompt[:at], (prompt[at] + 1) % vocabulary, *prompt[at + 1 :])
                moved = self.rows(changed, length - 1)
                effects.append(float(np.abs(moved.value[-1] - right.value[-1]).max()))
        seen = [effect for effect in effects if effect >= SEPARATED * bound]
        return Power(bound, min(seen, default=0.0), len(effects), len(seen))


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
