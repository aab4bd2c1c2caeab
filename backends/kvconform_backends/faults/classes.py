"""Classes of real KV-cache bugs. Each has a planted fault, or a reason why none can be planted."""

from __future__ import annotations

CLASSES: dict[str, str] = {
    # masks
    "M1": "causal-top-left: the causal diagonal starts at the top left, as if nothing were cached",
    "M2": "causal-skipped: no causal mask, or a square one, when a cache is used",
    "M3": "causal-off-by-one: a token sees the next one, or does not see itself",
    "M4": "mask-lost: one of causality, padding, window, length and the caller's mask is dropped on a code path",
    "M5": "mask-coordinates: the mask is cut or built with the numbers of another step, axis or row",
    "M6": "tail-attended: unused slots of the buffer take part in the softmax",
    "M7": "one-length-for-all: the first or longest row's length is used for every row",
    "M8": "empty-row: a query that sees nothing gives NaN or a mean instead of zeros",
    "M9": "poison-through-mask: the contents of a masked slot reach the output as zero times NaN",
    "M10": "mask-arithmetic: additive masks overflow, cancel or become NaN when combined",
    "M11": "score-pipeline: scale, softcap, bias, mask and sink are applied in the wrong order",
    # positions
    "P1": "position-restart: positions of new tokens start at zero or another wrong value on a code path",
    "P2": "position-over-advance: the offset is advanced twice, or before it is used",
    "P3": "position-per-row: the padding of a row shifts its own positions or another row's",
    "P4": "rope-precision: angles or their tables are computed in 16 bits",
    "P5": "rope-and-cached-keys: the base changes, or cached keys are rotated again or not at all",
    "P6": "rope-convention: wrong pairs of dimensions are rotated, or by wrong angles",
    "P7": "bias-and-cache: a distance bias is built from the new tokens only",
    # the cache
    "C1": "write: an entry is missing, misplaced, swapped between keys and values, or never written back",
    "C2": "capacity: a full cache clamps, wraps or overwrites, or refuses one token early",
    "C3": "length-inferred: the length is inferred from shapes, zeros or the capacity",
    "C4": "caller-mutation: a step modifies its inputs or the handle it was given",
    "C5": "past-and-present-memory: correct only if past and present share memory, or only if they do not",
    "C6": "stale-session: a reset or new sequence sees data of the previous one",
    "C7": "shared-state: sequences, layers or instances write to the same memory",
    "C8": "rollback-edges: truncating to zero, to the full length or beyond is wrong",
    "C9": "rollback-after-eviction: truncating to evicted or quantised tokens is wrong or silently ignored",
    "C10": "reorder: rows are not moved, not in every layer, or in keys but not in values",
    "C11": "fork: copies share storage, or rows are repeated in the wrong order",
    "C12": "atomicity: a call that raised an exception has changed the state",
    "C13": "shared-layers: a cache shared by several layers or by cross-attention is cut, moved or filled twice",
    # windows
    "W1": "window-off-by-one: the window is one token too long or too short",
    "W2": "window-dropped: the window is ignored on a code path",
    "W3": "ring-boundary: eviction happens one step early or late when the window is exactly full",
    "W4": "ring-multi-token: a chunk overwrites tokens that its first queries still need",
    "W5": "window-anchor: the window is counted in the chunk or in slots instead of positions",
    "W6": "hybrid-metadata: layers without a window use a length or mask of layers with one, or the reverse",
    "W7": "window-never-evicts: a layer with a window keeps every token",
    # heads, axes, memory
    "H1": "grouping: query heads read the wrong KV head",
    "H2": "axes: heads and tokens, or batch and tokens, are swapped",
    "H3": "strides: non-contiguous inputs are read as if contiguous",
    "H4": "cross-row-index: an index reaches into another row",
    # pages
    "G1": "block-boundary: a length at or off a page boundary is rounded wrongly",
    "G2": "paged-addressing: the block table, or a chunk's place in it, is ignored",
    "G3": "page-lifetime: a page is freed or overwritten while another sequence needs it",
    # quantised caches
    "Q1": "scale: scales are lost, swapped, inverted or shared",
    "Q2": "residual: tokens are quantised too early, too late or twice",
    # generation loop
    "L1": "generation-loop: a token is dropped, fed or returned twice, or chosen from the wrong logits",
    # captured, compiled, tiled
    "X1": "capture: a captured step is replayed with an old length, mask or memory",
    "X2": "specialisation: a traced size becomes a constant",
    "X3": "tile: the scores of several tiles are masked or merged wrongly",
    "X4": "batch-variance: the order of a sum depends on the rest of the batch",
}
"""Name and description, by id."""

NOT_EXPRESSIBLE: dict[str, str] = {}
"""By id, why this protocol cannot express a fault of the class."""
