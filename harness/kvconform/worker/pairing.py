"""A target and another artefact with the same weights, whose forward without a cache is the reference.

The two are roundings of one function. Outputs are compared within the bound of a black box
(``bounds.black_box_bound``), which has a share for either side, in the dtype of the two that rounds more: the reference
is perturbed by that dtype's rounding of every weight and product. This covers a conversion of the weights, which rounds
each once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kvconform.errors import BackendUnavailable
from kvconform_specs.config import Config
from kvconform_specs.reference.bounds import STORAGE


def paired(
    own: Mapping[str, Config], reference: Mapping[str, Config], address: str
) -> dict[str, tuple[Config, Config]]:
    """For each config of a target, by name: the one that it is judged under, and the reference's.

    It is judged in the dtype that rounds more, up to the smaller capacity, on tokens that both know, and with the
    reference's window, so that programs reach beyond it. Raises BackendUnavailable if the two cannot have the same
    weights.
    """
    found = {}
    for name, config in own.items():
        same = [theirs for theirs in reference.values() if theirs.profile == config.profile]
        if not same:
            kinds = ", ".join(sorted({theirs.profile for theirs in reference.values()}))
            raise BackendUnavailable(
                f"the reference {address} is not the same model: its profile is {kinds}, the target's {config.profile}"
            )
        theirs = same[0]
        if theirs.outputs != config.outputs:
            raise BackendUnavailable(
                f"the reference {address} is not the same model: it gives {theirs.outputs} numbers for each token, the "
                f"target {config.outputs}"
            )
        if config.profile == "hidden" and theirs.width != config.width:
            raise BackendUnavailable(
                f"the reference {address} is not the same model: it takes states of width {theirs.width}, the target "
                f"of {config.width}"
            )
        windowed = theirs if theirs.window is not None else config
        found[name] = (
            replace(
                config,
                dtype=max((config.dtype, theirs.dtype), key=STORAGE.__getitem__),
                capacity=min(config.capacity, theirs.capacity),
                window=windowed.window,
                window_every=windowed.window_every,
                reserved=tuple(sorted({*config.reserved, *theirs.reserved})),
            ),
            theirs,
        )
    return found
