"""A toy serving engine in one file: paged blocks with a prefix cache, chunked prefill, continuous batching, preemption,
eviction, salts, adapters, forks and aborts, in numpy. It is the engine that every clause about serving must pass.

The key of a full block is a digest of its parent's key, its tokens, the salt and the adapter. A block with no reader is
free, keeps its contents, and is found by its key until it is given to someone else, the one freed first before others.
A block holds keys and values of each layer, and for each token the log-probabilities of the next one.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.serving.engine import Answer, Completion, Description, Engine
from kvconform_specs.serving.requests import Request

Array = NDArray[np.float32]
Key = bytes
VOCABULARY, WIDTH, LAYERS, HEADS = 48, 16, 2, 2
ADAPTERS = ("first", "second")
ROOT: Key = b"root"

SOURCE = """
from dataclasses import asdict

from kvconform_specs.serving.requests import Request
from {module} import {name}

engine = {name}()


def send(requests):
    found = engine.answer([Request(**{{**one, "prompt": tuple(one["prompt"])}}) for one in requests])
    return [asdict(answer) for answer in found]
"""


def open_toy(target: str, options: Mapping[str, Any]) -> Engine:
    """The engine ``toy-engine``; options are its sizes (``block``, ``blocks``, ``context``, ``budget``...)."""
    sized: type[ToyEngine] = type("ToyEngine", (ToyEngine,), dict(options))
    return sized()


class Model:
    """A decoder of two layers with random weights and learned positions, in float32."""

    def __init__(self, context: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def weights(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-2] ** 0.5)

        self.embedding = rng.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
        self.positions = rng.standard_normal((context, WIDTH), dtype=np.float32)
        self.qkv = weights(LAYERS, 3, WIDTH, WIDTH) * 2  # so that each token of the past matters
        self.out = weights(LAYERS, WIDTH, WIDTH) * 2
        self.up, self.down = weights(LAYERS, WIDTH, 2 * WIDTH), weights(LAYERS, 2 * WIDTH, WIDTH)
        self.head = weights(WIDTH, VOCABULARY) * 2
        self.adapters = {name: weights(LAYERS, WIDTH, WIDTH) for name in ADAPTERS}  # added to the projection of values


def normed(x: Array) -> Array:
    """``(t, WIDTH)``, each row with mean square 1."""
    return np.asarray(x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(1e-6)))


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


class Completing:
    """A completion that is being computed. ``tokens``: prompt and generated ones; ``computed``: how many of them have
    keys and values; ``cached``: how many were read from the cache at first; ``table``: its blocks; ``keys``: those of
    its full blocks."""

    def __init__(self, request: Request, place: int) -> None:
        self.request, self.place = request, place
        self.tokens = list(request.prompt)
        self.computed = 0
        self.cached: int | None = None
        self.table: list[int] = []
        self.keys: list[Key] = []
        self.rows: list[Array] = []  # log-probabilities of each generated token's place, (VOCABULARY,)
        self.prompt_rows: list[Array] = []  # of the tokens after each prompt token
        self.forked = False

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self.tokens[len(self.request.prompt) :])

    @property
    def wanted(self) -> int:
        """How many tokens to generate before it ends."""
        abort = self.request.abort_after
        return self.request.tokens if abort is None else min(abort, self.request.tokens)


class ToyEngine(Engine):
    """The engine. Class attributes are its sizes, in tokens and blocks."""

    block = 8
    blocks = 24
    context = 96
    budget = 12  # tokens that one forward step takes, of all sequences together
    running_limit = 8
    alternatives = 8

    def __init__(self) -> None:
        self.model = Model(self.context)
        shape = (self.blocks, self.block)
        self.stored: Array = np.zeros((*shape, LAYERS, 2, WIDTH), np.float32)  # keys and values
        self.rows: Array = np.zeros((*shape, VOCABULARY), np.float32)
        self.readers = [0] * self.blocks
        self.key_of: dict[int, Key] = {}
        self.by_key: dict[Key, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.blocks))
        self.preempted = 0

    def describe(self) -> Description:
        return Description(
            engine="toy",
            version="1",
            model=f"random decoder of {LAYERS} layers",
            vocabulary=VOCABULARY,
            context=self.context,
            block=self.block,
            cache_off="request",
            reports_hits=True,
            alternatives=self.alternatives,
            abilities=frozenset({"n", "abort", "salt", "adapter", "score", "reset", "preemptions", "concurrent"}),
            dtype="float32",
            cache_tokens=self.blocks * self.block,
            adapters=ADAPTERS,
        )

    def preemptions(self) -> int:
        return self.preempted

    def source(self) -> str:
        """It has no server: the file imports it."""
        module, name = type(self).__module__, type(self).__qualname__
        return SOURCE.format(module=module, name=name)

    def reset_source(self) -> str:
        return "reset = engine.reset"

    def reset(self) -> None:
        self.key_of.clear()
        self.by_key.clear()

    # --- scheduling ---
    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        refused = [self.refusal(request) for request in requests]
        waiting = deque(Completing(r, i) for i, r in enumerate(requests) if refused[i] is None)
        running: list[Completing] = []
        done: list[list[Completing]] = [[] for _ in requests]
        while waiting or running:
            while waiting and len(running) < self.running_limit:
                sequence = waiting.popleft()
                self.start(sequence)
                running.append(sequence)
            room = self.budget
            for sequence in tuple(running):
                count = min(len(sequence.tokens) - sequence.computed, room)
                if sequence not in running or count == 0:
                    continue
                if not self.extend(sequence, count, running, waiting):
                    continue
                room -= count
                self.compute(sequence, count)
                if sequence.computed == len(sequence.tokens):
                    self.fork(sequence, running, waiting)
                    for one in [one for one in running if one.computed == len(one.tokens)]:
                        self.emit(one)
                        if len(one.rows) >= one.wanted:
                            running.remove(one)
                            self.finish(one)
                            done[one.place].append(one)
        return self.answered(requests, refused, done)

    def refusal(self, request: Request) -> str | None:
        """Why a request is refused, before anything is done for it."""
        if len(request.prompt) + request.tokens > self.context:
            return f"{len(request.prompt)} + {request.tokens} tokens exceed the context of {self.context}"
        if not request.prompt or not all(0 <= token < VOCABULARY for token in request.prompt):
            return f"token ids must be 0 to {VOCABULARY - 1}"
        return None

    def start(self, sequence: Completing) -> None:
        """Takes what the cache has of its tokens; the last one is computed in any case."""
        if sequence.request.cached:
            for block, key in self.matched(sequence):
                self.take(block)
                sequence.table.append(block)
                sequence.keys.append(key)
        sequence.computed = len(sequence.table) * self.block
        if sequence.cached is None:
            sequence.cached = sequence.computed
        if sequence.request.score:
            sequence.prompt_rows[: sequence.computed] = self.known_rows(sequence)

    def known_rows(self, sequence: Completing) -> list[Array]:
        """The log-probabilities that its cached blocks hold."""
        return [row.copy() for block in sequence.table for row in self.rows[block]]

    def matched(self, sequence: Completing) -> list[tuple[int, Key]]:
        """The cached blocks that hold its first tokens, with their keys."""
        found: list[tuple[int, Key]] = []
        parent = ROOT
        for start in range(0, len(sequence.tokens) - self.block, self.block):
            parent = self.key(parent, sequence.tokens[start : start + self.block], sequence.request)
            if parent not in self.by_key:
                break
            found.append((self.by_key[parent], parent))
        return found

    def extend(self, sequence: Completing, count: int, running: list[Completing], waiting: deque[Completing]) -> bool:
        """Gives it the blocks for ``count`` more tokens, if need be those of the sequence that came last; False if it
        was the last itself."""
        while len(sequence.table) * self.block < sequence.computed + count:
            if not self.free:
                last = running.pop()
                self.preempt(last)
                waiting.appendleft(last)
                if last is sequence:
                    return False
                continue
            sequence.table.append(self.allocate())
        return True

    def preempt(self, sequence: Completing) -> None:
        """Its blocks are freed, and its tokens, generated ones included, are computed again later."""
        self.preempted += 1
        self.release(sequence)
        sequence.computed = 0

    def fork(self, sequence: Completing, running: list[Completing], waiting: deque[Completing]) -> None:
        """Once its prompt is computed, the other completions: they share its full blocks, and copy the last one. Where
        there is no block for the copy, they are computed like any request."""
        others = 0 if sequence.forked else sequence.request.n - 1
        sequence.forked = True
        for _ in range(others):
            child = Completing(sequence.request, sequence.place)
            child.forked = True
            if self.free:
                child.cached, child.computed = sequence.cached, sequence.computed
                child.tokens, child.keys = list(sequence.tokens), list(sequence.keys)
                child.table = self.shared_table(sequence)
                child.prompt_rows = list(sequence.prompt_rows)
                running.append(child)
            else:
                waiting.append(child)

    def shared_table(self, sequence: Completing) -> list[int]:
        whole = sequence.computed // self.block
        for block in sequence.table[:whole]:
            self.take(block)
        return sequence.table[:whole] + [self.copied(block) for block in sequence.table[whole:]]

    def finish(self, sequence: Completing) -> None:
        """It has all its tokens, or its client has left."""
        self.release(sequence)

    # --- blocks ---
    def key(self, parent: Key, tokens: Sequence[int], request: Request) -> Key:
        return self.digest(parent, tuple(tokens), request.salt, request.adapter)

    def digest(self, *parts: object) -> Key:
        return hashlib.sha256(repr(parts).encode()).digest()

    def take(self, block: int) -> None:
        """One more reader."""
        self.readers[block] += 1
        self.free.pop(block, None)

    def allocate(self) -> int:
        """The block that has been free for the longest time, emptied."""
        block, _ = self.free.popitem(last=False)
        self.forget(block)
        self.readers[block] = 1
        return block

    def forget(self, block: int) -> None:
        key = self.key_of.pop(block, None)
        if key is not None:
            del self.by_key[key]

    def copied(self, block: int) -> int:
        own = self.allocate()
        self.stored[own], self.rows[own] = self.stored[block], self.rows[block]
        return own

    def release(self, sequence: Completing) -> None:
        """One reader less of each of its blocks, the last block first, so that it is reused first."""
        for block in reversed(sequence.table):
            self.readers[block] -= 1
            if self.readers[block] == 0:
                self.free[block] = None
        sequence.table, sequence.keys = [], []

    def register(self, sequence: Completing) -> None:
        """Makes its full blocks known by their keys, unless equal ones are."""
        while (len(sequence.keys) + 1) * self.block <= sequence.computed:
            start = len(sequence.keys) * self.block
            parent = sequence.keys[-1] if sequence.keys else ROOT
            key = self.key(parent, sequence.tokens[start : start + self.block], sequence.request)
            sequence.keys.append(key)
            self.publish(key, sequence.table[len(sequence.keys) - 1])

    def publish(self, key: Key, block: int) -> None:
        if key not in self.by_key and block not in self.key_of:
            self.by_key[key], self.key_of[block] = block, key

    # --- computing ---
    def compute(self, sequence: Completing, count: int) -> None:
        """Keys, values and log-probabilities of its next ``count`` tokens."""
        past = sequence.computed
        rows = self.forward(sequence, past, count)  # (count, VOCABULARY)
        for position, row in zip(range(past, past + count), rows, strict=True):
            block, slot = sequence.table[position // self.block], position % self.block
            self.rows[block, slot] = row
        if sequence.request.score:
            sequence.prompt_rows[past : past + count] = [row.copy() for row in rows]
        sequence.computed += count
        if sequence.request.cached:
            self.register(sequence)

    def forward(self, sequence: Completing, past: int, count: int) -> Array:
        m = self.model
        positions = self.position_ids(sequence, past, count)
        x = m.embedding[sequence.tokens[past : past + count]] + m.positions[positions]  # (t, WIDTH)
        adapter = m.adapters.get(sequence.request.adapter or "")
        slots = [(sequence.table[i // self.block], i % self.block) for i in range(past + count)]
        blocks, offsets = np.array(slots).T
        visible = self.visible(past, count)  # (t, s)
        for layer in range(LAYERS):
            h = normed(x)
            query, key, value = h @ m.qkv[layer]  # each (t, WIDTH)
            if adapter is not None:
                value = value + h @ adapter[layer]
            self.stored[blocks[past:], offsets[past:], layer, 0] = key
            self.stored[blocks[past:], offsets[past:], layer, 1] = value
            keys, values = self.stored[blocks, offsets, layer].swapaxes(0, 1)  # each (s, WIDTH)
            x = x + self.attend(query, keys, values, visible) @ m.out[layer]
            x = x + np.maximum(normed(x) @ m.up[layer], 0) @ m.down[layer]
        return log_softmax(normed(x) @ m.head)

    def position_ids(self, sequence: Completing, past: int, count: int) -> NDArray[np.intp]:
        return np.arange(past, past + count)

    def visible(self, past: int, count: int) -> NDArray[np.bool_]:
        """``(t, s)``: a token sees itself and those before it."""
        return np.arange(past + count) <= np.arange(past, past + count)[:, None]

    def attend(self, query: Array, keys: Array, values: Array, visible: NDArray[np.bool_]) -> Array:
        """``(t, WIDTH)``: softmax attention of each head."""
        heads = []
        for part in np.split(np.arange(WIDTH), HEADS):
            scores = query[:, part] @ keys[:, part].T * np.float32(len(part) ** -0.5)
            weights = np.exp(log_softmax(np.where(visible, scores, np.float32(-np.inf))))
            heads.append(weights @ values[:, part])
        return np.concatenate(heads, axis=1)

    def emit(self, sequence: Completing) -> None:
        """Chooses the next token from the row of the last computed one."""
        last = len(sequence.tokens) - 1
        row = self.rows[sequence.table[last // self.block], last % self.block].copy()
        sequence.rows.append(row)
        sequence.tokens.append(int(row.argmax()))

    # --- answers ---
    def answered(
        self, requests: Sequence[Request], refused: Sequence[str | None], done: Sequence[Sequence[Completing]]
    ) -> list[Answer]:
        return [
            Answer(error=why) if why is not None else self.one(request, sequences)
            for request, why, sequences in zip(requests, refused, done, strict=True)
        ]

    def one(self, request: Request, sequences: Sequence[Completing]) -> Answer:
        return Answer(
            completions=tuple(self.completion(sequence) for sequence in sequences),
            cached=sequences[0].cached,
            prompt_logprobs=tuple(self.top(row) for row in sequences[0].prompt_rows[: len(request.prompt) - 1]),
            prompt_tokens=len(request.prompt),
            completion_tokens=sum(len(sequence.ids) for sequence in sequences),
        )

    def completion(self, sequence: Completing) -> Completion:
        return Completion(sequence.ids, tuple(map(self.top, sequence.rows)))

    def top(self, row: Array) -> Mapping[int, float]:
        """The largest log-probabilities by token id."""
        return {int(i): float(row[i]) for i in np.argsort(-row, kind="stable")[: self.alternatives]}
