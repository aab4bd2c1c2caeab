"""Questions on which implementations of KV-cache attention differ, and how the suite settles each of them.

Either a clause states the answer, or a claim lets the backend choose it and a clause checks the claim, or no program
raises the question, and the answer says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ambiguity:
    """One question. ``settled``: the answer, as one normative sentence.

    by: what enforces it: names of clauses, ``claims.<field>``, ``ability.<name>``, ``config.<field>``,
    ``backend.<method>`` of the protocol, ``program.<step>``. default: the answer for a backend that makes no such
    claim; empty if the answer does not depend on a claim.
    """

    id: str
    question: str
    settled: str
    by: tuple[str, ...]
    default: str = ""


AMBIGUITIES: tuple[Ambiguity, ...] = (
    Ambiguity(
        id="A1",
        question="What is the output of a query that may attend to no key: zeros, NaN or the mean of the values?",
        settled="It is exactly 0; masks are boolean, so that no large negative number stands for minus infinity.",
        by=("numerics.empty-row",),
        default="Without the ability mask there is no such query: each token sees at least itself.",
    ),
    Ambiguity(
        id="A2",
        question="When there are more keys than queries, is the causal triangle anchored at the first or the last key?",
        settled="At neither: causality is by position, and a key is visible only if its position is at most the "
        "query's.",
        by=("causality.future-blind", "causality.past-seen", "causality.visibility", "definition.attention"),
    ),
    Ambiguity(
        id="A3",
        question="What is the output of queries before the first token, where there are more query columns than "
        "tokens?",
        settled="There are no such queries: every query belongs to a token that its step appends, and the output of a "
        "column without a token is not judged.",
        by=("batch.ragged", "backend.step"),
    ),
    Ambiguity(
        id="A4",
        question="May slots that are masked or were never written hold NaN or infinities?",
        settled="Finite numbers in slots that hold no token never have an effect; NaN and infinities have none if that "
        "is claimed.",
        by=("contents.dead-slots", "contents.poison-safe", "claims.unused_slots"),
        default="finite: only finite numbers must have no effect.",
    ),
    Ambiguity(
        id="A5",
        question="Does a window of W count the token itself?",
        settled="Yes: a token sees itself and the W - 1 tokens before it; W is at least 1, and None is no window.",
        by=("window.width", "config.window"),
    ),
    Ambiguity(
        id="A6",
        question="How far does a window reach to the right where attention is not causal?",
        settled="All attention here is causal, so that a window has no right side; attention that is not causal is not "
        "in the table of configs.",
        by=("config.window", "definition.attention"),
    ),
    Ambiguity(
        id="A7",
        question="Are window and causality counted within the call, by physical slot or by position in the sequence?",
        settled="By absolute logical position, however the tokens were appended and wherever they are stored.",
        by=("window.step-by-step", "window.long-chunk", "window.hybrid"),
    ),
    Ambiguity(
        id="A8",
        question="Does True in a mask keep or hide a key, and may a mask be shorter than the keys?",
        settled="The caller's mask is boolean, (b, s) over the logical positions of cached and new tokens, never "
        "shorter; True attends, for every query of the step.",
        by=("numerics.caller-mask", "backend.step", "ability.mask"),
        default="Without the ability mask no mask is given.",
    ),
    Ambiguity(
        id="A9",
        question="Which mask takes precedence if causality, a window and a caller's mask are all given?",
        settled="None of them: a key is visible only if all of them allow it.",
        by=("numerics.caller-mask", "numerics.empty-row", "definition.attention"),
    ),
    Ambiguity(
        id="A10",
        question="In which order are scale, softcap, bias and mask applied to the scores?",
        settled="Scale, softcap, bias, mask, then the sink is added to the denominator, then softmax.",
        by=("definition.softcap", "definition.bias", "definition.sink"),
    ),
    Ambiguity(
        id="A11",
        question="What is the default scale where the head dim is padded or the scale is split between operands?",
        settled="1 / sqrt(d) with the head dim of the config, unpadded, applied once; how it is split is free within "
        "the bound.",
        by=("definition.scale", "numerics.head-dim", "config.scale"),
    ),
    Ambiguity(
        id="A12",
        question="In which precision are scores and softmax computed?",
        settled="Sums accumulate in float32 for every dtype; scores and weights are kept in float32 or rounded to the "
        "dtype as claimed, and the bound is derived for that claim.",
        by=("claims.intermediates", "definition.attention", "definition.decoder"),
        default="single: scores and weights in float32.",
    ),
    Ambiguity(
        id="A13",
        question="Which position does the first real token of a row with left padding have?",
        settled="0: padding has no position, and a token's position is its index among the row's tokens.",
        by=("batch.left-padding", "claims.padding"),
        default="right: columns without a token come last.",
    ),
    Ambiguity(
        id="A14",
        question="Do columns of padding have positions, and may their contents have an effect?",
        settled="Their contents are arbitrary, and no output of a token and no later step depends on them.",
        by=("batch.padding", "batch.left-padding"),
        default="Without the ability ragged no padding is given.",
    ),
    Ambiguity(
        id="A15",
        question="What determines the length: cache slots, position ids or the attention mask, and which one takes "
        "precedence?",
        settled="The harness gives only the counts of new tokens; slots, position ids and masks made from them stay "
        "inside the backend.",
        by=("backend.step", "shape.length", "definition.positions"),
    ),
    Ambiguity(
        id="A16",
        question="What does a read of the cache give: all tokens, the new ones, a whole buffer or the window?",
        settled="A read gives the newest tokens of each row in logical order: all of them, or, if retention is claimed "
        "as window, at least those that a later query may see; slots without a token are not part of it.",
        by=("contents.present", "contents.round-trip", "claims.retention", "backend.contents"),
        default="all: a read gives every token of the row.",
    ),
    Ambiguity(
        id="A17",
        question="Is a sequence length that is given to a kernel that before the append, after it, or the latter minus "
        "one?",
        settled="The harness gives the number of new tokens for each row, and the backend turns it into its kernel's "
        "convention.",
        by=("backend.step", "batch.ragged", "shape.length"),
    ),
    Ambiguity(
        id="A18",
        question="Are keys cached before or after rotary positions are applied?",
        settled="Either: what a decoder caches is not prescribed; it must not change, bit for bit, and outputs must "
        "follow the definition.",
        by=("contents.past-unchanged", "definition.positions"),
    ),
    Ambiguity(
        id="A19",
        question="Which elements does rope pair, with which base, and how precise are its tables?",
        settled="It rotates the pair (x_i, x_(i + d/2)) by position * 10000^(-2 i / d), over the whole head dim, "
        "without scaling; its tables have at least float32 precision, since no bound allows for less.",
        by=("definition.positions", "config.positions"),
    ),
    Ambiguity(
        id="A20",
        question="Are KV heads repeated one by one or tiled as a block to match the query heads?",
        settled="One by one: query head i uses KV head i // (h / g), and g divides h.",
        by=("definition.grouping", "config.kv_heads"),
    ),
    Ambiguity(
        id="A21",
        question="Which layout do inputs have, and may they be strided views?",
        settled="The axes are (b, h, t, d) and (b, g, t, d), with any strides; other layouts stay inside the backend.",
        by=("layout.strides", "layout.equal-sizes", "backend.step"),
    ),
    Ambiguity(
        id="A22",
        question="Does a step change the cache that it is given, and may present and past share memory?",
        settled="Only the cache that a step returns is used afterwards, unless immutable is claimed: then the given "
        "one must not change; if in_place is claimed, sharing memory changes no output.",
        by=("ability.immutable", "contents.old-handle", "ability.in_place", "capture.aliasing"),
        default="Without the abilities immutable and in_place a cache is not used again after a step.",
    ),
    Ambiguity(
        id="A23",
        question="Does a forward that does not use the cache still append to a past that is given?",
        settled="It is not given a past: uncached_forward takes whole sequences and no cache, and changes none.",
        by=("backend.uncached_forward", "equivalence.full-stable"),
    ),
    Ambiguity(
        id="A24",
        question="What does one token more than the capacity do: raise, clamp, wrap around or write elsewhere?",
        settled="If overflow is claimed as refused, the append raises and changes nothing; a ring buffer that evicts "
        "what the window hides still takes no more than the capacity.",
        by=("claims.overflow", "capacity.overflow", "capacity.full"),
        default="undefined: the suite never appends beyond the capacity.",
    ),
    Ambiguity(
        id="A25",
        question="Does cropping a cache name the tokens to keep, those to remove or a range?",
        settled="truncate takes the length to keep, 0 <= length <= the length of the shortest row, and refuses any "
        "other.",
        by=("backend.truncate", "lifecycle.truncate", "lifecycle.truncate-range"),
    ),
    Ambiguity(
        id="A26",
        question="How far back can a cache with a window, or a quantised one, be rolled back?",
        settled="Completely or not at all: a backend that claims truncate takes any length from 0 on, also after "
        "tokens left the window.",
        by=("ability.truncate", "lifecycle.truncate"),
        default="Without the ability truncate nothing is rolled back.",
    ),
    Ambiguity(
        id="A27",
        question="Does reorder gather or scatter rows, and may a row be taken twice?",
        settled="It gathers: row i becomes the old row rows[i], in every layer, keys and values; duplicates are legal "
        "and independent afterwards.",
        by=("backend.reorder", "lifecycle.reorder"),
    ),
    Ambiguity(
        id="A28",
        question="What does a read of a quantised cache give, and from which token on is it quantised?",
        settled="A read gives dequantised numbers, each within half a step of what was appended; the newest tokens, as "
        "many as the claim residual says, are exact.",
        by=("claims.kv_bits", "claims.residual", "quantised.prefill", "quantised.decode", "quantised.residual"),
        default="kv_bits 0: keys and values are stored in the config's dtype.",
    ),
    Ambiguity(
        id="A29",
        question="Do scales of quantisation multiply or divide, and do keys and values share them?",
        settled="The stored integer times the scale is the number; there is one scale for each token and KV head, "
        "separate for keys and values.",
        by=("quantised.scales", "claims.kv_bits"),
        default="kv_bits 0: nothing is quantised.",
    ),
    Ambiguity(
        id="A30",
        question="Do layers that borrow another's keys and values, or cross-attention, append, crop and mask?",
        settled="A layer that reads another one's keys and values appends nothing and holds none; it masks them with "
        "its own window. There is no cross-attention: keys and values are made from the same tokens as the queries.",
        by=("definition.decoder", "config.kv_source"),
    ),
    Ambiguity(
        id="A31",
        question="Is an attention sink scaled and capped like a score, and what is its effect on an empty row?",
        settled="It is part of the softmax's denominator without scale or softcap, and has no value; a query that sees "
        "no key gives 0 also with a sink.",
        by=("definition.sink", "numerics.empty-row", "config.sink"),
    ),
    Ambiguity(
        id="A32",
        question="Are inputs of length zero legal: no past, no new token, no row?",
        settled="An empty past is legal, and so are rows of a ragged step that get no token; a step without any new "
        "token and a batch without a row are never used.",
        by=("shape.first-step", "batch.ragged", "program.append"),
    ),
    Ambiguity(
        id="A33",
        question="Are outputs equal bit for bit from run to run, and whatever else is in the batch?",
        settled="Outputs are within the bound in any case; agreement to the bit beyond that is measured and reported, "
        "and not required.",
        by=(
            "determinism.repeatable",
            "determinism.batch-invariant",
            "determinism.chunk-invariant",
            "determinism.same-token",
        ),
    ),
    Ambiguity(
        id="A34",
        question="What does a cache hold after a call that raised?",
        settled="What it held before, in every layer: a refused call changes nothing.",
        by=("errors.unchanged", "capacity.overflow", "lifecycle.truncate-range", "program.reject"),
        default="A call that need not be refused by any claim is never made.",
    ),
    Ambiguity(
        id="A35",
        question="Who owns the cache: the caller, the module or an engine?",
        settled="The harness holds a handle for each sequence; a module that owns its only cache claims max_sequences "
        "= 1, and a sequence that was reset, or opened after another was closed, is like a new one.",
        by=("backend.start", "claims.max_sequences", "lifecycle.reset", "lifecycle.independent"),
        default="Any number of sequences may be open at once.",
    ),
    Ambiguity(
        id="A36",
        question="Which combinations of arguments are illegal, and what do they do?",
        settled="The harness makes no call that its program language forbids, and passes a keyword only if its ability "
        "is claimed; a call that is malformed on purpose must raise.",
        by=("backend.step", "program.reject", "errors.malformed", "ability.refusal"),
        default="Without the ability refusal no malformed call is made.",
    ),
    Ambiguity(
        id="A37",
        question="Who owns the memory of inputs and outputs during a call and after it?",
        settled="The caller: a call only reads its inputs and writes nothing around them, the caller may overwrite "
        "them as soon as the call has returned, and no later call changes an output.",
        by=("memory.inputs-unchanged", "memory.inputs-reused", "memory.outputs-kept", "claims.inputs"),
        default="copied: a step keeps no view of its inputs.",
    ),
    Ambiguity(
        id="A38",
        question="How far may NaN in the tokens of a row reach?",
        settled="To later outputs of the same row and sequence; to no other row or sequence. Once these tokens are "
        "truncated, reset or closed away they have no effect if unused slots may hold anything. Whether NaN that has "
        "left a window still has an effect on its own row is not asked.",
        by=("batch.nan-isolated", "contents.nan-removed", "claims.unused_slots"),
        default="finite: after NaN tokens were removed, nothing is asked of their slots.",
    ),
    Ambiguity(
        id="A39",
        question="May a given scale be 0 or negative, and is a scale of 0 one that is not given?",
        settled="It may be any number; 0 is a scale like any other, with which all scores are equal before bias and "
        "softcap. Scores are masked after they are scaled.",
        by=("definition.scale", "definition.attention", "config.scale"),
    ),
)
"""In the order of their numbers, which never change."""
