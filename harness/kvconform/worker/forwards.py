"""The forwards without a cache of a worker's black box, and of what it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.errors import BackendUnavailable, Raised, WorkerDied
from kvconform.worker.pairing import paired
from kvconform.worker.protocol import Header
from kvconform.worker.spec import WorkerSpec
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.reference.oracle import ReferenceForward
from kvconform_specs.reference.own_forward import length_changes, shares_rounding


class Forwards:
    """What a worker's client adds for a black box. The reference has a process of its own, in which no cached step ever
    runs: of the same target, or of another artefact with the same weights (``pairing``)."""

    spec: WorkerSpec
    claims: Claims
    target: dict[str, Any] | None
    environment: dict[str, str]
    _measured: bool
    _reference: Forwards | None = None
    _pairs: dict[Config, Config] = {}  # noqa: RUF012 - replaced, never changed

    def build(self, config: Config) -> str | None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def _ask(self, message: Header, timeout: float, blob: bytes = b"") -> tuple[Header, bytes]:
        raise NotImplementedError

    def __init__(self, spec: WorkerSpec) -> None:
        raise NotImplementedError

    @property
    def configs(self) -> dict[str, Config]:
        """A black box's own configs, by name; empty for a backend that takes those of the suite."""
        named = {} if self.target is None else self.target["configs"]
        return {name: Config.from_json(config) for name, config in named.items()}

    @property
    def reference_forward(self) -> Callable[[Config], ReferenceForward] | None:
        """What a black box is judged by, for each of its configs; None where that is the definition."""
        return None if self.target is None else lambda config: partial(self._reference_forward, config)

    @property
    def reference_address(self) -> str:
        """The address of the artefact that a black box is judged by; empty where that is its own forward."""
        return "" if self.target is None else str(self.target["reference"])

    def _pair(self, address: str) -> None:
        """Opens the artefact that is the reference. Raises BackendUnavailable if it cannot be one."""
        assert self.target is not None
        try:
            reference = self._reference = type(self)(replace(self.spec, address=address))
        except BackendUnavailable as error:
            raise type(error)(f"the reference {address}: {error.sentence}", error.remedy) from error
        if reference.target is None:
            raise BackendUnavailable(f"the reference {address} has no weights of its own")
        reference._measured = True
        if "source" in reference.environment:
            self.environment["source of the reference"] = reference.environment["source"]
        pairs = paired(self.configs, reference.configs, address)
        self._pairs = dict(pairs.values())
        self.target["configs"] = {name: config.to_json() for name, (config, _theirs) in pairs.items()}
        dtypes = dict.fromkeys((*self.claims.dtypes, *(config.dtype for config in self._pairs)))
        self.claims = replace(self.claims, dtypes=tuple(dtypes))

    def config_of_reference(self, config: Config) -> Config:
        """The config under which the reference runs where the target runs under ``config``."""
        return self._pairs.get(config, config)

    def _reference_forward(
        self,
        config: Config,
        inputs: NDArray[Any],
        storage: float,
        accumulation: float,
        seed: int,
        context: int = 0,
        variant: str = "",
    ) -> NDArray[Any]:
        """The forward that a black box is judged by (``oracle.ReferenceForward``), or a variant of it. Raises
        WorkerDied where it raises or dies."""
        if self._reference is None:
            self._reference = type(self)(self.spec)
            self._reference._measured = True
        theirs = self.config_of_reference(config)
        return self._reference.own_forward(theirs, inputs, storage, accumulation, seed, context, variant)

    def reference_variants(self, config: Config) -> list[str]:
        """The variants that the reference offers (``backend.BlackBox.variants``), in words."""
        if self._reference is None:
            return []
        theirs = self.config_of_reference(config)
        self._reference.build(theirs)
        header, _blob = self._reference._ask({"op": "variants", "config": theirs.to_json()}, self.spec.step_timeout)
        return list(header.get("variants", ()))

    def variant_forward(self, config: Config, variant: str) -> ReferenceForward:
        """A variant of the reference."""
        return partial(self._reference_forward, config, variant=variant)

    def own_forward(
        self,
        config: Config,
        inputs: NDArray[Any],
        storage: float = 0.0,
        accumulation: float = 0.0,
        seed: int = 0,
        context: int = 0,
        variant: str = "",
    ) -> NDArray[Any]:
        """A black box's own forward without a cache, in this process. Raises WorkerDied where it raises or dies."""
        reason = self.build(config)
        if reason is not None:
            raise BackendUnavailable(reason)
        message = {
            "op": "reference_forward",
            "config": config.to_json(),
            "shape": list(inputs.shape),
            "dtype": inputs.dtype.str,
            "storage": storage,
            "accumulation": accumulation,
            "seed": seed,
            "context": context,
            "variant": variant,
        }
        try:
            header, blob = self._ask(message, self.spec.step_timeout, np.ascontiguousarray(inputs).tobytes())
        except WorkerDied as death:
            raise type(death)("reference", ended=death.ended) from None
        if "error" in header:
            raise WorkerDied("reference", Raised(*header["error"]))
        return np.frombuffer(blob, header["dtype"]).reshape(header["shape"])

    def _measure(self, config: Config) -> None:
        """How the forwards round, and where the reference changes with the length, as claims. What is wrong with a
        forward is found by a clause."""
        with suppress(WorkerDied, BackendUnavailable):
            forwards = [self._reference_forward, *([self.own_forward] if self.reference_address else [])]
            if any(shares_rounding(forward, config) for forward in forwards):
                self.claims = replace(self.claims, rounding="shared")
            changes = length_changes(self._reference_forward, config)
            self.claims = replace(self.claims, changes_at=changes)

    def _close_reference(self) -> None:
        if self._reference is not None:
            self._reference.close()
