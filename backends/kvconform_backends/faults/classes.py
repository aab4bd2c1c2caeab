"""The classes of mistakes that real KV caches had. Each has a planted fault, or a reason why none can be planted."""

from __future__ import annotations

CLASSES: dict[str, str] = {
    # masks
    "M1": "causal-top-left: the causal diagonal begins at the top left, as if nothing were cached",
    "M2": "causal-skipped: there is no causal mask, or a square one, where there is a cache",
    "M3": "causal-off-by-one: a token sees the next one, or does not see itself",
    "M4": "mask-lost: one of causality, padding, window, length and the caller's mask is dropped on a path",
    "M5": "mask-coordinates: the mask is cut or built from another step's, axis's or row's numbers",
    "M6": "tail-attended: slots of the buffer that hold no token take part in the softmax",
    "M7": "one-length-for-all: the first row's length, or the longest, is used for every row",
    "M8": "empty-row: a query that sees nothing gives NaN or a mean instead of zeros",
    "M9": "poison-through-mask: what lies in a masked slot reaches the output as zero times NaN",
    "M10": "mask-arithmetic: additive masks overflow, cancel or turn into NaN when they meet",
    "M11": "score-pipeline: scale, softcap, bias, mask and sink are applied in another order",
    # positions
    "P1": "position-restart: new tokens are counted from zero, or from a wrong start, on a path",
    "P2": "position-over-advance: the offset is advanced twice, or before it is used",
    "P3": "position-per-row: the padding of a row shifts its positions, or another's",
    "P4": "rope-precision: angles or their tables are computed in 16 bits",
    "P5": "rope-and-cached-keys: the base changes, or cached keys are turned again or not at all",
    "P6": "rope-convention: other pairs of dimensions are turned, or by other angles",
    "P7": "bias-and-cache: a bias by distance is built from the new tokens alone",
    # the cache
    "C1": "write: an entry is missing, misplaced, crossed between keys and values, or never written back",
    "C2": "capacity: a full cache clamps, wraps or overwrites, or refuses one token early",
    "C3": "length-inferred: the length is guessed from shapes, zeros or the capacity",
    "C4": "caller-mutation: a step changes its inputs, or the handle that it was given",
    "C5": "past-and-present-memory: right only where past and present share memory, or only where they do not",
    "C6": "stale-session: a reset or a second sequence finds something of the one before",
    "C7": "shared-state: sequences, layers or instances write to one memory",
    "C8": "rollback-edges: truncating to nothing, to everything or beyond does something else",
    "C9": "rollback-after-eviction: truncating what was evicted or quantised is wrong, or silently nothing",
    "C10": "reorder: rows are not moved, or not in every layer, or in keys and not in values",
    "C11": "fork: copies share storage, or rows are repeated in another order",
    "C12": "atomicity: a call that raised has changed something",
    "C13": "shared-layers: a cache that several layers or a second attention share is cut, moved or filled twice",
    # windows
    "W1": "window-off-by-one: the window holds one token more or less",
    "W2": "window-dropped: the window is ignored on a path",
    "W3": "ring-boundary: eviction comes one step early or late, where the window is just full",
    "W4": "ring-multi-token: a chunk overwrites what its own first tokens must still see",
    "W5": "window-anchor: the window is counted in the chunk or in slots, not in positions",
    "W6": "hybrid-metadata: a length or mask of layers with a window serves those without, or the reverse",
    # heads, axes, memory
    "H1": "grouping: query heads read another KV head than theirs",
    "H2": "axes: heads and tokens, or batch and tokens, change places",
    "H3": "strides: inputs that are not contiguous are read as if they were",
    "H4": "cross-row-index: an index runs over into another row",
    # pages
    "G1": "block-boundary: a length that fills pages exactly, or does not, is rounded wrongly",
    "G2": "paged-addressing: the block table, or a chunk's place in it, is ignored",
    "G3": "page-lifetime: a page is freed or shared while another sequence needs it as it was",
    # quantised caches
    "Q1": "scale: scales are lost, swapped, inverted or shared",
    "Q2": "residual: tokens are quantised too early, too late or twice",
    # the loop around the cache
    "L1": "generation-loop: a token is dropped, fed or returned twice, or picked from another one's logits",
    # captured, compiled, tiled
    "X1": "capture: a captured step is replayed with an old length, mask or memory",
    "X2": "specialisation: a size that was traced is baked in",
    "X3": "tile: scores of several tiles are masked or merged wrongly",
    "X4": "batch-variance: the order of a sum depends on what else is in the batch",
}
"""Name and mistake, by id."""

NOT_EXPRESSIBLE: dict[str, str] = {"C13": "no profile has cross-attention or layers that share keys and values"}
"""Why no fault of a class can be planted in a backend of this protocol, by id."""
