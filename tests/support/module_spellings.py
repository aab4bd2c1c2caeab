"""One small decoder with a cache, as different people write it: each class is correct, and called in another way.

Addressed as ``tests/support/module_spellings.py:Name``. They need torch and do not use this package.
"""

# mypy: ignore-errors
from __future__ import annotations

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

WIDTH, HEADS, VOCABULARY, LAYERS = 16, 2, 29, 2


class Core(nn.Module):
    """The arithmetic that all of them share: embeddings, attention layers with residuals, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        for layer in self.qkv:
            nn.init.normal_(layer.weight, std=0.4)

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv[layer](x).chunk(3, -1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        new, total = query.shape[2], key.shape[2]
        seen = torch.ones(new, total, dtype=torch.bool).tril(total - new) if mask is None else mask
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def run(self, ids: Tensor, pasts: list | None) -> tuple[Tensor, list]:
        """Logits, and a (key, value) pair for each layer."""
        x, presents = self.embed(ids), []
        for layer in range(LAYERS):
            query, key, value = self.heads(layer, x)
            if pasts and pasts[layer] is not None:
                key, value = (torch.cat(pair, 2) for pair in zip(pasts[layer], (key, value), strict=True))
            presents.append((key, value))
            x = x + self.attend(query, key, value)
        return self.head(x), presents


# --- the past is passed and returned ---
class PositionalPast(Core):
    def forward(self, ids, past=None, /):
        logits, presents = self.run(ids, past)
        return logits, tuple(presents)


class ReturnDict(Core):
    def forward(self, input_ids, past_key_values=None, use_cache=False, return_dict=True):
        logits, presents = self.run(input_ids, past_key_values)
        presents = tuple(presents) if use_cache else None
        return SimpleNamespace(logits=logits, past_key_values=presents) if return_dict else (logits, presents)


class RequiredReturnDict(Core):
    def forward(self, input_ids, past_key_values, use_cache, return_dict):
        logits, presents = self.run(input_ids, past_key_values)
        presents = presents if use_cache else None
        return {"logits": logits, "past_key_values": presents} if return_dict else (logits, presents)


class ListOfDicts(Core):
    def forward(self, tokens, caches=None):
        pasts = None if caches is None else [(one["k"], one["v"]) for one in caches]
        logits, presents = self.run(tokens, pasts)
        return logits, [{"k": key, "v": value} for key, value in presents]


class DictByLayer(Core):
    def forward(self, tokens, kv_cache=None):
        logits, presents = self.run(tokens, None if not kv_cache else list(kv_cache.values()))
        return logits, dict(enumerate(presents))


class OneTensor(Core):
    """``(layers, 2, b, h, s, d)``."""

    def forward(self, idx, kv_cache=None):
        logits, presents = self.run(idx, None if kv_cache is None else [tuple(one) for one in kv_cache])
        return logits, torch.stack([torch.stack(pair) for pair in presents])


class EmptyTensor(Core):
    """The same, where an empty past is a tensor without tokens."""

    def init_cache(self, batch_size):
        return torch.zeros(LAYERS, 2, batch_size, HEADS, 0, WIDTH // HEADS)

    def forward(self, idx, kv_cache):
        logits, presents = self.run(idx, [tuple(one) for one in kv_cache])
        return logits, torch.stack([torch.stack(pair) for pair in presents])


class Pair(NamedTuple):
    key: Tensor
    value: Tensor


class NamedPairs(Core):
    def forward(self, ids, layer_past: list[Pair] | None = None):
        logits, presents = self.run(ids, layer_past)
        return logits, [Pair(*pair) for pair in presents]


class KeysTransposed(Core):
    """Keys are kept as ``(b, h, d, s)``."""

    def forward(self, ids, past=None):
        logits, presents = self.run(ids, None if past is None else [(key.mT, value) for key, value in past])
        return logits, [(key.mT.contiguous(), value) for key, value in presents]


class SeqFirst(Core):
    """Ids ``(t, b)``, logits ``(t, b, v)``."""

    def forward(self, ids, past=None):
        logits, presents = self.run(ids.transpose(0, 1), past)
        return logits.transpose(0, 1), presents


class LastLogits(Core):
    def forward(self, ids, past=None):
        logits, presents = self.run(ids, past)
        return logits[:, -1], presents


class WholeSequence(Core):
    """Is given all ids, and returns the logits of those that the past does not hold."""

    def forward(self, ids, past=None):
        held = 0 if past is None else past[0][0].shape[2]
        if ids.shape[1] <= held:
            raise ValueError(f"want more than the {held} ids that are cached, got {ids.shape[1]}")
        logits, presents = self.run(ids[:, held:], past)
        return logits, presents


class WholeSequenceLast(WholeSequence):
    """The same, and the logits of the last one only."""

    def forward(self, ids, past=None):
        logits, presents = super().forward(ids, past)
        return logits[:, -1:], presents


# --- masks and positions ---
class GrowingMask(Core):
    """Needs a mask of the padding over cached and new tokens."""

    def forward(self, input_ids, attention_mask, past_key_values=None):
        held = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if attention_mask.shape != (input_ids.shape[0], held + input_ids.shape[1]):
            raise ValueError(f"attention_mask: want a mask over all tokens, got {tuple(attention_mask.shape)}")
        logits, presents = self.run(input_ids, past_key_values)
        return logits, presents


class Placed(Core):
    def __init__(self, capacity: int = 33) -> None:
        super().__init__()
        self.places, self.max_seq_len = nn.Embedding(capacity, WIDTH), capacity

    def placed(self, ids, positions, pasts):
        x, presents = self.embed(ids) + self.places(positions), []
        for layer in range(LAYERS):
            query, key, value = self.heads(layer, x)
            if pasts:
                key, value = (torch.cat(pair, 2) for pair in zip(pasts[layer], (key, value), strict=True))
            presents.append((key, value))
            x = x + self.attend(query, key, value)
        return self.head(x), presents


class PositionIds(Placed):
    def forward(self, input_ids, position_ids, past_key_values=None):
        return self.placed(input_ids, position_ids, past_key_values)


class OwnPositions(Placed):
    """The positions follow from the past."""

    def forward(self, ids, past=None):
        held = 0 if past is None else past[0][0].shape[2]
        return self.placed(ids, torch.arange(held, held + ids.shape[1]), past)


class Six(OwnPositions):
    def __init__(self) -> None:
        super().__init__(6)


class Ten(OwnPositions):
    def __init__(self) -> None:
        super().__init__(10)


class Seventeen(OwnPositions):
    def __init__(self) -> None:
        super().__init__(17)


# --- limits ---
class OneRow(Core):
    def forward(self, ids, past=None):
        if ids.shape[0] != 1:
            raise ValueError("only batch size 1 is supported")
        return self.run(ids, past)


class OneRowWithPast(Core):
    """Refuses several tokens in several rows beside a past, like some fused operators."""

    def forward(self, ids, past=None):
        if past is not None and ids.shape[0] > 1 and ids.shape[1] > 1:
            raise NotImplementedError("batched chunks beside a past are not supported")
        return self.run(ids, past)


class ChunkOfOne(Core):
    """A prompt of any length, then token by token."""

    def forward(self, ids, past=None):
        if past is not None:
            assert ids.shape[1] == 1, "with a past, give one token at a time"
        return self.run(ids, past)


class ChunkOfSix(Core):
    def forward(self, ids, past=None, use_cache=False):
        if use_cache and ids.shape[1] > 6:
            raise ValueError("use chunked prefill with a chunk size of at most 6")
        return self.run(ids, past)


# --- the past is an object that is changed in place ---
class ListInPlace(Core):
    """``cache`` is a list that calls fill."""

    def forward(self, ids, cache=None):
        logits, presents = self.run(ids, cache)
        if cache is not None:
            cache[:] = presents
        return logits


class Cache:
    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.pairs:
            key, value = (torch.cat(pair, 2) for pair in zip(self.pairs[layer], (key, value), strict=True))
        self.pairs[layer] = key, value
        return key, value

    def get_seq_length(self) -> int:
        return self.pairs[0][0].shape[2] if self.pairs else 0


class CacheWithUpdate(Core):
    def forward(self, ids, cache: Cache | None = None):
        x = self.embed(ids)
        for layer in range(LAYERS):
            query, key, value = self.heads(layer, x)
            if cache is not None:
                key, value = cache.update(layer, key, value)
            x = x + self.attend(query, key, value)
        return self.head(x)


class CroppableCache(Cache):
    def crop(self, max_length: int) -> None:
        """Keeps the first tokens."""
        self.pairs = {n: (key[:, :, :max_length], value[:, :, :max_length]) for n, (key, value) in self.pairs.items()}


class WithCrop(CacheWithUpdate):
    def forward(self, ids, cache: CroppableCache | None = None):
        return super().forward(ids, cache)


class RollbackCache(Cache):
    def rollback(self, n: int) -> None:
        """Removes the last tokens."""
        if n > self.get_seq_length():
            raise ValueError(f"cannot remove {n} tokens of {self.get_seq_length()}")
        kept = self.get_seq_length() - n
        self.pairs = {layer: (key[:, :, :kept], value[:, :, :kept]) for layer, (key, value) in self.pairs.items()}


class WithRollback(CacheWithUpdate):
    def forward(self, ids, cache: RollbackCache | None = None):
        return super().forward(ids, cache)


# --- the module owns the cache ---
class Buffers(Core):
    """Keys and values in buffers; ``start_pos`` says where the new tokens go."""

    def __init__(self, max_batch_size: int = 4, max_seq_len: int = 21) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        shape = (LAYERS, 2, max_batch_size, HEADS, max_seq_len, WIDTH // HEADS)
        self.register_buffer("cache", torch.zeros(shape), persistent=False)

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        rows, new = tokens.shape
        total = start_pos + new
        if total > self.max_seq_len:
            raise ValueError(f"{total} tokens are more than max_seq_len {self.max_seq_len}")
        x = self.embed(tokens)
        for layer in range(LAYERS):
            query, key, value = self.heads(layer, x)
            held = self.cache[layer, :, :rows]
            held[0, :, :, start_pos:total], held[1, :, :, start_pos:total] = key, value
            x = x + self.attend(query, held[0, :, :, :total], held[1, :, :, :total])
        return self.head(x)


class CachePosition(Buffers):
    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        return super().forward(input_ids, int(cache_position[0]))


class Owned(Core):
    def __init__(self) -> None:
        super().__init__()
        self.reset_cache()

    def reset_cache(self) -> None:
        self.cache = None

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        if not use_cache:
            return self.run(ids, None)[0]
        logits, self.cache = self.run(ids, self.cache)
        return logits


class WithLock(Owned):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        with self.lock:
            return super().forward(ids, use_cache)


class WithNonLeaf(Owned):
    """Cannot be copied: it keeps a tensor that has a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = self.head.weight * 2

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        return super().forward(ids, use_cache)


class PastAndCounter(Placed):
    """The caller keeps the past, and the module the position, which ``reset`` sets back."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0

    def reset(self) -> None:
        self.position = 0

    def forward(self, ids, past=None, use_cache=False):
        start = self.position if use_cache else 0
        logits, presents = self.placed(ids, torch.arange(start, start + ids.shape[1]), past)
        if use_cache:
            self.position += ids.shape[1]
        return logits, presents


# --- rows of different lengths ---
class Ragged(Core):
    """``lengths``: how many of the new columns hold tokens, for each row."""

    def forward(self, ids, cache=None, lengths=None):
        rows, new = ids.shape
        counts = torch.full((rows,), new) if lengths is None else torch.as_tensor(lengths)
        column = torch.arange(new) < counts[:, None]
        valid = column if cache is None else torch.cat([cache["valid"], column], 1)
        total = valid.shape[1]
        seen = (torch.ones(new, total, dtype=torch.bool).tril(total - new) & valid[:, None])[:, None]
        seen = seen | torch.eye(new, total, dtype=torch.bool).roll(total - new, 1)
        x, pairs = self.embed(ids), []
        for layer in range(LAYERS):
            query, key, value = self.heads(layer, x)
            if cache is not None:
                key, value = (torch.cat(pair, 2) for pair in zip(cache["kv"][layer], (key, value), strict=True))
            pairs.append((key, value))
            x = x + self.attend(query, key, value, seen)
        return self.head(x), {"kv": pairs, "valid": valid}


# --- no module ---
@dataclass
class Output:
    logits: Tensor
    cache: list


class Engine:
    """An object that is no module."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.core = Core()

    def __call__(self, tokens, cache=None):
        return Output(*self.core.run(tokens, cache))


def closure():
    """A function over a state that position 0 empties."""
    torch.manual_seed(0)
    core, held = Core(), {}

    def forward(tokens, start_pos):
        logits, held["past"] = core.run(tokens, held["past"] if start_pos else None)
        return logits

    return forward


class Lambdas(nn.Module):
    """Its parts are lambdas over a module that is no attribute."""

    def __init__(self) -> None:
        super().__init__()
        core = Core()
        self.parts = [core.run]
        self.embed = core.embed

    def forward(self, ids, past=None):
        return (lambda found: (found[0], tuple(found[1])))(self.parts[0](ids, past))
