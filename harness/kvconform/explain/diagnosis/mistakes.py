"""The mistakes that a diagnosis can name: ids of the fault catalogue, an upstream bug each, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """words: what is wrong, as in the fault catalogue. bug: an upstream bug of this class. remedy: one sentence."""

    words: str
    bug: str
    remedy: str


MISTAKES: dict[str, Mistake] = {
    "M1": Mistake(
        "the causal diagonal starts at the top left, as if nothing were cached",
        "https://github.com/pytorch/pytorch/issues/108108",
        "With q_len 1 pass no mask, or align the mask to the bottom right: query i sees keys up to past + i.",
    ),
    "M2": Mistake(
        "no causal mask, or a square one, when a cache is used",
        "https://github.com/QwenLM/Qwen/issues/979",
        "Build the mask for every step with q_len > 1, (q_len, past + q_len) in shape, also where a cache is passed.",
    ),
    "M3": Mistake(
        "a token sees the next one, or does not see itself",
        "https://github.com/pytorch/executorch/pull/2689",
        "Let query i see the keys j <= past + i, itself included; check that past is a count and no index.",
    ),
    "M4": Mistake(
        "one of causality, padding, window, length and the caller's mask is dropped on a code path",
        "https://github.com/keras-team/keras/issues/23038",
        "Join all masks by a logical and on every path: causality, window, padding, lengths and the caller's.",
    ),
    "M7": Mistake(
        "the first or longest row's length is used for every row",
        "https://github.com/Blaizzy/mlx-vlm/issues/1155",
        "Keep a length for each row, and use it in writes, masks, positions and truncations.",
    ),
    "C1": Mistake(
        "an entry is missing, misplaced, swapped between keys and values, or never written back",
        "https://github.com/huggingface/transformers/pull/30108",
        "Check where each step writes: every new key and value at past + i, in its own buffer, and handed back.",
    ),
    "C4": Mistake(
        "a step modifies its inputs or the handle it was given",
        "https://github.com/microsoft/onnxruntime/issues/26064",
        "Do not write into inputs or into a handle that the caller still holds: copy, or document that it is consumed.",
    ),
    "C6": Mistake(
        "a reset or new sequence sees data of the previous one",
        "https://github.com/Lightning-AI/litgpt/pull/1596",
        "On reset and for a new sequence, clear length, positions and buffers in every layer.",
    ),
    "C7": Mistake(
        "sequences, layers or instances write to the same memory",
        "https://github.com/TrenTorch/TrenTorch/pull/141",
        "Give each sequence and each layer its own memory; keep no cache in a global, a default argument or a class.",
    ),
    "C8": Mistake(
        "truncating to zero, to the full length or beyond is wrong",
        "https://github.com/ml-explore/mlx-lm/pull/1868",
        "Let truncate(n) keep exactly the first n tokens, in data, length and positions, for n from 0 to the length.",
    ),
    "C10": Mistake(
        "rows are not moved, not in every layer, or in keys but not in values",
        "https://github.com/awslabs/sockeye/pull/731",
        "On reorder, index keys and values of every layer, and the lengths, by the same rows.",
    ),
    "C11": Mistake(
        "copies share storage, or rows are repeated in the wrong order",
        "https://github.com/huggingface/transformers/issues/20299",
        "Copy the storage on a fork, or copy before the first write; repeat rows one by one, as repeat_interleave.",
    ),
    "C12": Mistake(
        "a call that raised an exception has changed the state",
        "https://github.com/ggml-org/llama.cpp/pull/9525",
        "Check the whole call before anything is written, so that a refused one changes nothing.",
    ),
    "W1": Mistake(
        "the window is one token too long or too short",
        "https://github.com/microsoft/onnxruntime/pull/25927",
        "A window of W holds the token itself and W - 1 before it: j > i - W.",
    ),
    "W2": Mistake(
        "the window is ignored on a code path",
        "https://github.com/huggingface/transformers/pull/35691",
        "Pass the window on every path: prompt, chunk and decode step.",
    ),
    "W3": Mistake(
        "eviction happens one step early or late when the window is exactly full",
        "https://github.com/huggingface/transformers/issues/37574",
        "Keep W tokens while W or fewer are cached; token W goes to the slot of token 0, and so on.",
    ),
    "W4": Mistake(
        "a chunk overwrites tokens that its first queries still need",
        "https://github.com/Lightning-AI/litgpt/issues/2182",
        "For a chunk, attend to the old window and the chunk first, and evict afterwards.",
    ),
    "W5": Mistake(
        "the window is counted in the chunk or in slots instead of positions",
        "https://github.com/keras-team/keras-hub/pull/1738",
        "Measure the window between absolute positions, not between slots or rows of the chunk.",
    ),
    "H4": Mistake(
        "an index reaches into another row",
        "https://github.com/Dao-AILab/flash-attention/issues/772",
        "Compute each place from its own row and slot, and check it against the ends of the row, not of the buffer.",
    ),
    "P5": Mistake(
        "the base changes, or cached keys are rotated again or not at all",
        "https://github.com/huggingface/transformers/issues/33129",
        "Where rotary factors depend on the length, rotate all cached keys in each step, or compute the cache again.",
    ),
    "L1": Mistake(
        "a token is dropped, fed or returned twice, or chosen from the wrong logits",
        "https://github.com/Lightning-AI/litgpt/issues/2307",
        "Feed the prompt once, then each picked token once: pick it from the newest logits, keep it, feed it back.",
    ),
}
"""By id. The other classes of the catalogue cannot be told from which tokens outputs see."""
