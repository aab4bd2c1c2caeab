"""Faults in graphs: ``node_by_node.Graph`` with a wrong node, or with wrongly bound presents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvconform_backends.faults.configs import PLACED, SOFTCAPPED
from kvconform_backends.faults.node_by_node import Graph, Nodes, tokens
from kvconform_backends.faults.planted import Planted
from kvconform_backends.numpy.cache import Array, Cache
from kvconform_specs.config import Config

DECODE = "equivalence.decode"
VISIBILITY = "causality.visibility"
NO_SPECIALISATION = "shape.no-specialisation"
GROWTH = "capture.growth"
EMPTY_ROW = "numerics.empty-row"

LAYERS, WINDOWS = ("attention-gqa", "attention-window"), ("attention-window", "decoder-learned")


class Wrong(Planted, Graph):
    """Base class: a wrong graph beside the correct one, which runs on the same inputs to count differences."""

    def __init__(self, config: Config, weights: Mapping[str, Array], device: str = "cpu") -> None:
        super().__init__(config, weights, device)
        self.right = Graph(config, weights, device)

    def run(self, cache: Cache, inputs: tuple[Array, ...], mask: Array | None = None) -> Array:
        copy, self.right.last_only = self.fork(cache), self.last_only
        right = [self.right.run(copy, inputs, mask), *copy.keys, *copy.values]
        output = super().run(cache, inputs, mask)
        wrong = [output, *cache.keys, *cache.values]
        self.faulty += not all(np.array_equal(x, y, equal_nan=True) for x, y in zip(wrong, right, strict=True))
        return output


# --- masks and positions ---
class DiagonalFromZero(Wrong, breaks=("causality.past-seen", DECODE), kind="M1", bug="onnx/onnx/issues/8054"):
    """The graph's causal mask compares with a range that starts at zero instead of the past's length."""

    def rows(self, add: Nodes, t: str) -> str:
        return add("Range", 0, t, 1)


class PastFromBatchAxis(Wrong, breaks=(VISIBILITY, NO_SPECIALISATION), kind="M5", bug="sonos/torch-to-nnef/pull/217"):
    """The graph reads the past's length from the batch axis of its shape."""

    def past(self, add: Nodes) -> str:
        return tokens(add, "past.0.key", axis=0)


class ConstantPast(
    Wrong, breaks=(NO_SPECIALISATION, GROWTH), kind="X2", bug="huggingface/transformers/pull/10651", configs=LAYERS
):
    """The graph was traced with five tokens in the past, and its mask uses that number as a constant."""

    def past(self, add: Nodes) -> str:
        return add("Identity", 5)


class PlacesFromZero(
    Wrong, breaks=("definition.positions", DECODE), kind="P1", bug="sonos/torch-to-nnef/pull/217", configs=PLACED
):
    """The graph has no input for positions and counts those of new tokens from zero; its mask is correct."""

    def places(self, add: Nodes, t: str) -> str:
        return add("Range", 0, t, 1)


class WindowInclusive(
    Wrong, breaks=("window.width", VISIBILITY), kind="W1", bug="microsoft/onnxruntime/pull/25927", configs=WINDOWS
):
    """The graph uses LessOrEqual instead of Less: the window is one token too wide."""

    def shown(self, add: Nodes, layer: int, behind: str) -> str:
        seen, window = add("GreaterOrEqual", behind, 0), self.config.window_of(layer)
        return seen if window is None else add("And", seen, add("LessOrEqual", behind, window))


class CappedWithBias(
    Wrong, breaks=("definition.softcap", "definition.bias"), kind="M11", bug="onnx/onnx/issues/7865", configs=SOFTCAPPED
):
    """The graph adds the bias before softcap."""

    def capped(self, add: Nodes, scores: str) -> str:
        return scores

    def biased(self, add: Nodes, scores: str, behind: str) -> str:
        return super().capped(add, super().biased(add, scores, behind))


class UnguardedSoftmax(
    Wrong, breaks=(EMPTY_ROW,), kind="M8", bug="robertknight/rten/pull/1321", conditional=True, configs=LAYERS
):
    """The graph's softmax has no guard: a query that sees nothing gives NaN."""

    def weighed(self, add: Nodes, scores: str, seen: str) -> str:
        return add("Softmax", add("Where", seen, scores, -np.inf), axis=-1)


class LowestForMinusInfinity(
    Wrong, breaks=(EMPTY_ROW,), kind="M8", bug="microsoft/onnxruntime/pull/28958", conditional=True, configs=LAYERS
):
    """The graph masks with the lowest finite number: a query that sees nothing gives the mean of all values."""

    def weighed(self, add: Nodes, scores: str, seen: str) -> str:
        return add("Softmax", add("Where", seen, scores, float(np.finfo(np.float32).min)), axis=-1)


# --- heads, past and present ---
class HeadsTiled(
    Wrong, breaks=("definition.grouping",), kind="H1", bug="onnx/onnx/pull/7274", configs=(*LAYERS, *PLACED)
):
    """The graph repeats the KV heads with Tile, which interleaves them across query heads."""

    def by_query_head(self, add: Nodes, x: str) -> str:
        return add("Tile", x, [1, self.config.group, 1, 1])


class PresentCrossed(
    Wrong, breaks=(DECODE, "contents.round-trip"), kind=("C1", "C5"), bug="pytorch/TensorRT/pull/4445", configs=LAYERS
):
    """The names of present key and present value, which have equal shapes, are swapped."""

    def call(self, feeds: list[Array]) -> list[Array]:
        output, *present = super().call(feeds)
        return [output, *(x for pair in zip(present[1::2], present[::2], strict=True) for x in pair)]


class PresentOnPast(
    Wrong, breaks=(DECODE, "contents.past-unchanged"), kind="C5", bug="microsoft/onnxruntime/pull/31150", configs=LAYERS
):
    """The present is bound to the memory of the past, as for a fixed-size buffer; this past moves as it grows."""

    def call(self, feeds: list[Array]) -> list[Array]:
        first = len(feeds) - 2 * self.config.layers
        rooms = [self.room_of(past) for past in feeds[first:]]
        on_them = [room[: x.size].reshape(x.shape) for room, x in zip(rooms, feeds[first:], strict=True)]
        return bound(self.session, [*feeds[:first], *on_them], rooms)

    def room_of(self, past: Array) -> Array:
        """Memory for ``capacity`` tokens: that of the past if it is large enough, else a copy."""
        if isinstance(past.base, np.ndarray) and past.base.ndim == 1 and past.flags.c_contiguous:
            return past.base
        made = np.zeros(past.shape[0] * past.shape[1] * past.shape[3] * self.config.capacity, np.float32)
        made[: past.size] = past.ravel()
        return made


class RoomsTakeTurns(
    Wrong,
    breaks=("lifecycle.independent", GROWTH),
    kind=("C5", "C7"),
    bug="microsoft/onnxruntime-genai/pull/1604",
    conditional=True,
    configs=LAYERS,
):
    """The present is bound alternately to two buffers, shared by all sequences of a batch size."""

    turn = 0

    def call(self, feeds: list[Array]) -> list[Array]:
        if not self.cached:
            return super().call(feeds)
        self.turn = 1 - self.turn
        rooms: dict[tuple[int, int, int], Array] = self.__dict__.setdefault("_rooms", {})
        taken = []
        for number, x in enumerate(feeds[-2 * self.config.layers :]):
            fresh = np.zeros(x.shape[0] * x.shape[1] * x.shape[3] * self.config.capacity, np.float32)
            taken.append(rooms.setdefault((len(x), number, self.turn), fresh))
        return bound(self.session, feeds, taken)


def bound(session: Any, feeds: list[Array], rooms: list[Array]) -> list[Array]:
    """The outputs of a graph whose presents are written to the start of ``rooms``, one each."""
    binding, held = session.io_binding(), [np.ascontiguousarray(x) for x in feeds]
    for given, x in zip(session.get_inputs(), held, strict=True):
        binding.bind_input(given.name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    b, g, _, d = feeds[-1].shape
    s = feeds[-len(rooms) - 1].shape[1]  # of what is allowed
    present = [room[: b * g * s * d].reshape(b, g, s, d) for room in rooms]
    output, *names = (x.name for x in session.get_outputs())
    binding.bind_output(output, "cpu")
    for name, x in zip(names, present, strict=True):
        binding.bind_output(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    session.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy().copy(), *present]
