"""Faults of serving engines, planted in the toy engine: each is modelled on a real bug."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvconform.mutation.fault import Fault, named, sentence
from kvconform.serving.engine import Answer
from kvconform_backends.faults.planted import GITHUB
from kvconform_backends.servers.toy import ROOT, Array, Completing, Key, ToyEngine
from kvconform_specs.serving.requests import Request

FAULTS: list[Fault] = []


class Planted(ToyEngine):
    """Base class of the faults: a subclass that names the clauses it ``breaks`` is in the catalogue; its docstring is
    the sentence."""

    fault: ClassVar[Fault]

    def __init_subclass__(cls, *, breaks: tuple[str, ...], bug: str, conditional: bool = False) -> None:
        clauses = tuple(f"serving.{name}" for name in breaks)
        address = f"{cls.__module__}:{cls.__name__}"
        cls.fault = Fault(named(cls), address, clauses, GITHUB + bug, sentence(cls), conditional=conditional)
        FAULTS.append(cls.fault)


# --- the key of a block ---
class ParentIgnored(Planted, breaks=("divergence",), bug="vllm-project/aibrix/pull/2330"):
    """A block is found by its own tokens, whatever comes before it."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return super().key(ROOT, tokens, request)


class LastTokenIgnored(Planted, breaks=("divergence",), bug="openvinotoolkit/openvino.genai/issues/3722"):
    """The key of a block leaves its last token out."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return super().key(parent, tokens[:-1], request)


class FirstTokenIgnored(Planted, breaks=("divergence",), bug="openvinotoolkit/openvino.genai/issues/3722"):
    """The key of a block leaves its first token out."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return super().key(parent, tokens[1:], request)


class OrderLost(Planted, breaks=("divergence",), bug="vllm-project/vllm/pull/12621"):
    """The key of a block is the same for its tokens in any order."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return super().key(parent, sorted(tokens), request)


class BlocksInAnyOrder(Planted, breaks=("divergence",), bug="vllm-project/aibrix/pull/2330"):
    """The key of a prefix is the exclusive or of its blocks' digests: the order of the blocks is lost."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        own = super().key(ROOT, tokens, request)
        before = parent if len(parent) == len(own) else bytes(len(own))
        return bytes(a ^ b for a, b in zip(before, own, strict=True))


class EightBitHash(Planted, breaks=("divergence",), bug="vllm-project/vllm/pull/12621", conditional=True):
    """Keys have eight bits, and tokens are not compared: now and then two blocks have one key."""

    def digest(self, *parts: object) -> Key:
        return super().digest(*parts)[:1]


class HalfOfABlock(Planted, breaks=("block-boundary",), bug="sgl-project/sglang/issues/22819"):
    """A block is shared as soon as half of it is written, and its key covers that half."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return super().key(parent, tokens[: self.block // 2], request)

    def register(self, sequence: Completing) -> None:
        super().register(sequence)
        start = len(sequence.keys) * self.block
        if sequence.computed >= start + self.block // 2:
            parent = sequence.keys[-1] if sequence.keys else ROOT
            self.publish(self.key(parent, sequence.tokens[start:], sequence.request), sequence.table[-1])


class SaltIgnored(Planted, breaks=("partition",), bug="llm-d/llm-d-router/pull/1494"):
    """The key of a block leaves the salt out: answers are right, and tell that others asked the same."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return self.digest(parent, tuple(tokens), request.adapter)


class AdapterIgnored(Planted, breaks=("partition",), bug="vllm-project/vllm/pull/8240"):
    """The key of a block leaves the adapter out."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return self.digest(parent, tuple(tokens), request.salt)


class AdapterInLaterBlocks(Planted, breaks=("partition",), bug="xLLM-AI/xllm/pull/2047", conditional=True):
    """The first block's key leaves the adapter out."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return self.digest(parent, tuple(tokens), request.salt, None if parent == ROOT else request.adapter)


class SaltsAndAdaptersAlike(Planted, breaks=("partition",), bug="vllm-project/vllm/issues/44701", conditional=True):
    """The key of a block holds salt and adapter as bare names: one may stand for the other."""

    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return self.digest(parent, tuple(tokens), *filter(None, (request.salt, request.adapter)))


class NotYetComputed(Planted, breaks=("second-turn",), bug="vllm-project/vllm/pull/34616", conditional=True):
    """A block counts as full with its last token generated, before that token has keys and values."""

    def finish(self, sequence: Completing) -> None:
        if sequence.request.cached and len(sequence.table) * self.block >= len(sequence.tokens):
            computed, sequence.computed = sequence.computed, len(sequence.tokens)
            self.register(sequence)
            sequence.computed = computed
        super().finish(sequence)


class AnswerHeldTwice(Planted, breaks=("second-turn",), bug="jjang-ai/vmlx/issues/198"):
    """Once an answer ends, the last slot of each of its blocks holds the keys and values of the slot before."""

    def finish(self, sequence: Completing) -> None:
        for block in sequence.table[len(sequence.request.prompt) // self.block :]:
            if self.readers[block] == 1:
                self.stored[block, -1] = self.stored[block, -2]
        super().finish(sequence)


# --- after a hit ---
class PositionRestarts(Planted, breaks=("prefix-hit",), bug="tenstorrent/vllm/issues/415"):
    """The first tokens after a hit have positions as if nothing were cached."""

    def position_ids(self, sequence: Completing, past: int, count: int) -> NDArray[np.intp]:
        return np.arange(count) if past and past == sequence.cached else super().position_ids(sequence, past, count)


class WholePromptCached(
    Planted, breaks=("block-boundary", "order"), bug="vllm-project/vllm/pull/11186", conditional=True
):
    """Where the whole prompt is cached, its last token is computed once more, at the next position."""

    def matched(self, sequence: Completing) -> list[tuple[int, Key]]:
        found, parent = super().matched(sequence), ROOT
        whole = len(sequence.tokens) // self.block
        if len(sequence.tokens) % self.block or len(found) + 1 != whole:
            return found
        for number in range(whole):
            chunk = sequence.tokens[number * self.block : (number + 1) * self.block]
            parent = self.key(parent, chunk, sequence.request)
        return [*found, (self.by_key[parent], parent)] if parent in self.by_key else found

    def start(self, sequence: Completing) -> None:
        super().start(sequence)
        sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
        if sequence.cached and not sequence.rows:
            sequence.cached = sequence.computed

    def position_ids(self, sequence: Completing, past: int, count: int) -> NDArray[np.intp]:
        positions = super().position_ids(sequence, past, count)
        return positions + (count == 1 and past == sequence.cached and past + 1 == len(sequence.request.prompt))


class StaleLogProbabilities(Planted, breaks=("prompt-logprobs",), bug="vllm-project/vllm/issues/42019"):
    """The log-probabilities of cached prompt tokens are what the buffer held before."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer: list[Array] = []

    def known_rows(self, sequence: Completing) -> list[Array]:
        right = super().known_rows(sequence)
        stale = (self.buffer + right[len(self.buffer) :])[: len(right)]
        self.buffer = right + self.buffer[len(right) :]
        return stale

    def compute(self, sequence: Completing, count: int) -> None:
        super().compute(sequence, count)
        if sequence.request.score:
            self.buffer = list(sequence.prompt_rows)


# --- chunks and decode ---
class ChunkSeesFuture(Planted, breaks=("rescore",), bug="vllm-project/vllm/pull/36580"):
    """A chunk of the prompt that is not the first one sees all of itself."""

    def visible(self, past: int, count: int) -> NDArray[np.bool_]:
        return super().visible(past, count) | bool(past and count > 1)


class DecodeOnePositionLate(Planted, breaks=("rescore",), bug="GeeeekExplorer/nano-vllm/issues/212"):
    """Decode steps use the next position."""

    def position_ids(self, sequence: Completing, past: int, count: int) -> NDArray[np.intp]:
        late = count == 1 and past >= len(sequence.request.prompt)
        return np.minimum(super().position_ids(sequence, past, count) + late, self.context - 1)


# --- blocks and their readers ---
class HitsAreNoReaders(Planted, breaks=("preemption",), bug="NVIDIA/TensorRT-LLM/issues/8813", conditional=True):
    """A hit does not count as a reader: the block is free once its first reader ends."""

    def take(self, block: int) -> None:
        if self.readers[block] == 0:
            super().take(block)

    def release(self, sequence: Completing) -> None:
        for block in sequence.table:
            self.readers[block] = max(self.readers[block], 1)
        super().release(sequence)


class AbortFreesAll(Planted, breaks=("abort",), bug="sgl-project/sglang/issues/38319", conditional=True):
    """A client that leaves frees its blocks, whoever else reads them."""

    def finish(self, sequence: Completing) -> None:
        if sequence.request.abort_after is not None:
            for block in sequence.table:
                self.readers[block] = 0
                self.free[block] = None
                self.free.move_to_end(block, last=False)
            sequence.table = []
        super().finish(sequence)


class AbortedAnswerStays(Planted, breaks=("abort",), bug="sgl-project/sglang/pull/28374"):
    """The blocks of a client that has left are cleared, and stay known by their keys."""

    def finish(self, sequence: Completing) -> None:
        if sequence.request.abort_after is not None:
            for block in sequence.table:
                if self.readers[block] == 1:
                    self.stored[block] = 0
        super().finish(sequence)


class KeyOutlivesBlock(Planted, breaks=("eviction",), bug="sgl-project/sglang/issues/23392", conditional=True):
    """A block that is given to another request keeps its key."""

    def forget(self, block: int) -> None:
        self.key_of.pop(block, None)


class ResetKeepsKeys(Planted, breaks=("eviction",), bug="ggml-org/llama.cpp/issues/27052", conditional=True):
    """A reset clears keys and values, and forgets none of the blocks."""

    def reset(self) -> None:
        self.stored[:] = 0


class PinnedBlockEvicted(Planted, breaks=("preemption",), bug="NVIDIA/TensorRT-LLM/issues/8813", conditional=True):
    """Where no block is free, the first block of the request that came first is taken, though it is read."""

    def extend(self, sequence: Completing, count: int, running: list[Completing], waiting: deque[Completing]) -> bool:
        needed = -(-(sequence.computed + count) // self.block) - len(sequence.table)
        victim = running[0]
        if needed > len(self.free) and victim is not sequence and victim.table:
            block = victim.table[0]
            self.forget(block)
            self.preempted += 1
            self.readers[block] += 1
            sequence.table.append(block)
        return super().extend(sequence, count, running, waiting)


class PreemptedForgetsLast(Planted, breaks=("preemption",), bug="vllm-project/vllm/issues/16832", conditional=True):
    """A preempted request forgets the token that it generated last."""

    def preempt(self, sequence: Completing) -> None:
        if sequence.rows:
            sequence.tokens.pop()
        super().preempt(sequence)


class ForkLosesLastBlock(Planted, breaks=("forks",), bug="ggml-org/llama.cpp/issues/3802", conditional=True):
    """The copy of the last block of a fork is empty."""

    def copied(self, block: int) -> int:
        rows = self.rows[block].copy()
        own = super().copied(block)
        self.stored[own], self.rows[own] = 0, rows
        return own


# --- answers ---
class AnswersSwapped(Planted, breaks=("neighbours",), bug="ggml-org/llama.cpp/issues/27994", conditional=True):
    """Two neighbours with prompts of one length get each other's answers."""

    def answered(
        self, requests: Sequence[Request], refused: Sequence[str | None], done: Sequence[Sequence[Completing]]
    ) -> list[Answer]:
        order = list(done)
        for a in range(len(requests) - 1):
            one, other = requests[a], requests[a + 1]
            alike = (len(one.prompt), one.tokens) == (len(other.prompt), other.tokens)
            if alike and one.prompt != other.prompt and refused[a] is None and refused[a + 1] is None:
                order[a], order[a + 1] = order[a + 1], order[a]
        return super().answered(requests, refused, order)


class CachedTokensRoundedUp(Planted, breaks=("accounting",), bug="vllm-project/vllm/pull/34616"):
    """Of a hit, one block more is reported than was read."""

    def one(self, request: Request, sequences: Sequence[Completing]) -> Answer:
        return changed(super().one(request, sequences), cached=lambda cached: cached and cached + self.block)


class UsageOfOneTokenLess(Planted, breaks=("accounting",), bug="vllm-project/vllm/pull/17305"):
    """The first generated token is not counted."""

    def one(self, request: Request, sequences: Sequence[Completing]) -> Answer:
        return changed(super().one(request, sequences), completion_tokens=lambda count: count - 1)


class RefusedRequestIsKnown(Planted, breaks=("errors",), bug="ggml-org/llama.cpp/pull/9525"):
    """A refused request leaves the keys of its blocks, which were never computed."""

    def refusal(self, request: Request) -> str | None:
        why = super().refusal(request)
        if why is not None:
            parent = ROOT
            for start, block in zip(range(0, len(request.prompt), self.block), tuple(self.free), strict=False):
                parent = self.key(parent, request.prompt[start : start + self.block], request)
                self.forget(block)
                self.publish(parent, block)
        return why


class AllRefusedTogether(Planted, breaks=("errors",), bug="ggml-org/llama.cpp/issues/23652", conditional=True):
    """Where one request is refused, so are those beside it."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        why = next((found for request in requests if (found := self.refusal(request)) is not None), None)
        return super().answer(requests) if why is None else [Answer(error=why) for _ in requests]


class TooManyTogether(Planted, breaks=("errors",), bug="ggml-org/llama.cpp/issues/23652", conditional=True):
    """Requests are refused where all of them together do not fit, though they fit one after another."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        if len(requests) > 3:
            return [Answer(error="context size has been exceeded") for _ in requests]
        return super().answer(requests)


class TooLongIsCut(Planted, breaks=("errors",), bug="ggml-org/llama.cpp/pull/9525"):
    """A request beyond the context is cut, without a word."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return super().answer([shortened(request, self.context) for request in requests])


def changed(answer: Answer, **how: Any) -> Answer:
    """The answer with some fields computed from what they were."""
    return replace(answer, **{name: make(getattr(answer, name)) for name, make in how.items()})


def shortened(request: Request, context: int) -> Request:
    return replace(request, prompt=request.prompt[: context - request.tokens])


# --- what cold and warm answers share ---
class WindowInvented(Planted, breaks=("model",), bug="vllm-project/vllm/issues/49795"):
    """A token sees the 20 tokens up to itself, as if the model had a window."""

    def visible(self, past: int, count: int) -> NDArray[np.bool_]:
        back = np.arange(past, past + count)[:, None] - np.arange(past + count)
        return np.asarray(super().visible(past, count) & (back < 20))


class PositionsScaled(Planted, breaks=("model",), bug="ggml-org/llama.cpp/pull/2772"):
    """Positions are halved: a scaling that the engine reads from the wrong place."""

    def position_ids(self, sequence: Completing, past: int, count: int) -> NDArray[np.intp]:
        return super().position_ids(sequence, past, count) // 2


class ConvertedWeights(Planted, breaks=("model",), bug="ggml-org/llama.cpp/issues/18182"):
    """Weights were rounded to bfloat16 when the model was converted, and the engine reports float32."""

    def __init__(self) -> None:
        super().__init__()
        for name, weight in vars(self.model).items():
            if name != "adapters":
                setattr(self.model, name, (weight.view(np.uint32) & 0xFFFF0000).view(np.float32))
