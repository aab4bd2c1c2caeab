"""What to do about each class of mistakes: one sentence each, by the ids of the fault catalogue (``fingerprints``)."""

from __future__ import annotations

ADVICE: dict[str, str] = {
    # masks
    "M1": "With q_len 1 pass no mask, or align the mask to the bottom right: query i sees keys up to past + i.",
    "M2": "Build the mask for every step with q_len > 1, (q_len, past + q_len) in shape, also where a cache is passed.",
    "M3": "Let query i see the keys j <= past + i, itself included; check that past is a count and no index.",
    "M4": "Join all masks by a logical and on every path: causality, window, padding, lengths and the caller's.",
    "M5": "Build the mask from this step's past length, read from the token axis of the cache.",
    "M6": "Mask the slots of the buffer at and beyond the current length, or cut the buffer to it before attention.",
    "M7": "Keep a length for each row, and use it for its writes, its mask and its positions.",
    "M8": "Give zeros where a query sees nothing: test for an empty row before dividing.",
    "M9": "Cut off or clear dead slots instead of weighing them with zero, for zero times NaN is NaN.",
    "M10": "Combine masks as booleans and apply them once; subtract the maximum of the visible scores before exp.",
    "M11": "Apply scale, softcap, bias, mask, sink and softmax once each, in this order, in prefill and decode alike.",
    # positions
    "P1": "Number new tokens from the length that is cached: past, past + 1, and so on.",
    "P2": "Advance the offset once a step, after queries and keys have been given their positions.",
    "P3": "Count the positions of a row by its own tokens, without its padding.",
    "P4": "Compute angles, cosines and sines in float32, and round only the rotated queries and keys.",
    "P5": "Rotate a key once, before it is cached, with the base and scaling that later queries use.",
    "P6": "Pair and scale the rotated dimensions as the weights were trained: halves or neighbours, over all of them.",
    "P7": "Compute the bias from absolute positions, past + i - j, over all cached keys.",
    # the cache
    "C1": "Check where each step writes: every new key and value at past + i, in its own buffer, and handed back.",
    "C2": "Compare past + q_len with the capacity before writing: exactly full is legal, one more must be refused.",
    "C3": "Keep the length as a number of its own; do not infer it from shapes, zeros or the size of the buffer.",
    "C4": "Do not write into inputs or into a handle that the caller still holds: copy, or say that it is consumed.",
    "C5": "Return the whole present, past and new tokens, and bind its memory as the call expects it.",
    "C6": "On reset and for a new sequence, clear length, positions and buffers in every layer.",
    "C7": "Give each sequence and each layer memory of its own; keep no cache in a global, a default or a class.",
    "C8": "Let truncate(n) keep exactly the first n tokens, in data, length and positions, for n from 0 to the length.",
    "C9": "Refuse a truncation that needs tokens which were evicted, or keep enough of them to go back to.",
    "C10": "On reorder, index keys and values of every layer, and the lengths, by the same rows.",
    "C11": "Copy the storage on a fork, or copy before the first write; repeat rows one by one, as repeat_interleave.",
    "C12": "Check the whole call before anything is written, so that a refused one changes nothing.",
    "C13": "Update a cache that several layers share once a step.",
    # windows
    "W1": "A window of W holds the token itself and W - 1 before it: j > i - W.",
    "W2": "Pass the window on every path: prompt, chunk and decode step.",
    "W3": "Evict when the window holds W tokens and one more comes, not before; read a wrapped ring in logical order.",
    "W4": "For a chunk, attend to the old window and the chunk first, and evict afterwards.",
    "W5": "Measure the window between absolute positions, not between slots or rows of the chunk.",
    "W6": "Keep length, mask and positions apart for layers with and without a window.",
    # heads, axes, memory
    "H1": "Query head i reads KV head i // (heads / kv_heads): repeat each KV head, do not tile them.",
    "H2": "Check the axes where sizes happen to be equal: (batch, heads, tokens, head dim), transposed once.",
    "H3": "Respect strides, or make inputs contiguous first; do not sum padded lanes.",
    "H4": "Check the index arithmetic at the end of a row, and its width in bits: row * stride + slot.",
    # pages
    "G1": "Round lengths to pages by (n + page - 1) // page, and check n = page - 1, page and page + 1.",
    "G2": "Read and write each token through the block table: table[position // page], position % page.",
    "G3": "Count the owners of a page; copy keys and values before writing to a shared one, free it with the last.",
    # quantised caches
    "Q1": "Store a scale for each token and head, for keys and values apart, and multiply by it when reading.",
    "Q2": "Quantise a token once, when it leaves the residual window, in prefill and decode alike.",
    # the loop around the cache
    "L1": "Feed the prompt once, then each picked token once: pick it from the newest logits, keep it, feed it back.",
    # captured, compiled, tiled
    "X1": "Make length, mask and cache memory inputs of the captured step, and capture anew when a buffer moves.",
    "X2": "Mark batch, q_len and past as dynamic; derive no number from the example inputs.",
    "X3": "Rescale earlier sums when a tile raises the maximum, and mask inside tiles, also inside the last one.",
    "X4": "Fix the order of sums whatever the batch is, or claim no invariance.",
}
