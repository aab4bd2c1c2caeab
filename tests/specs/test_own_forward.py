"""What is measured of a black box's own forward before it is the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform_specs.config import Config
from kvconform_specs.reference.own_forward import shares_rounding

CONFIG = Config("hidden", 1, 1, 4, capacity=40, width=4)


def forward(salt: int, share: int) -> Any:
    """A forward whose first output moves by a bit with the last token, in one of ``share`` batches."""

    def own(config: Config, x: NDArray[Any], *noise: float) -> NDArray[Any]:
        outputs = x.copy()
        held = int(np.abs(x[:, :-1]).sum() * 1e4) + salt  # of all tokens but the last
        if share and held % share == 0:
            outputs[:, 0] += np.float32(1e-6) * x[:, -1]
        return outputs

    return own


def test_rounding_that_is_shared_in_half_of_all_calls_is_found_each_time() -> None:
    assert all(shares_rounding(forward(salt, 2), CONFIG) for salt in range(200))


def test_a_forward_whose_outputs_do_not_move_shares_none() -> None:
    assert not shares_rounding(forward(0, 0), CONFIG)


def test_rounding_that_is_shared_in_short_sequences_alone_is_found() -> None:
    """As that of experts that share a product whose sizes follow from the tokens."""

    def short(config: Config, x: NDArray[Any], *noise: float) -> NDArray[Any]:
        return forward(0, 1 if x.shape[0] * x.shape[1] <= 4 else 0)(config, x)

    assert shares_rounding(short, CONFIG)
