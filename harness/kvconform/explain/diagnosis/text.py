"""Diagnoses in words."""

from __future__ import annotations

from collections.abc import Iterator

from kvconform.explain.diagnosis.mistakes import MISTAKES
from kvconform.explain.diagnosis.record import Condition, Diagnosis, Disagreement, EditMatch, PrecisionMatch
from kvconform.explain.visibility.measure import listed

LEAKS = {
    "rows": "rows see tokens of other rows",
    "open sequences": "open sequences see each other's tokens",
    "earlier sequences": "a sequence sees tokens of an earlier one",
}
ALIKE = 0.99
"""Outputs that correlate by more come from the same weights: quantised to four bits, these give less."""
REFERENCE_WRONG = (
    "the reference itself is wrong: the target's uncached forward gives tokens other outputs when more tokens follow "
    "them, so that its cached steps cannot be judged by it"
)


def sentence(found: Diagnosis, bug: str = "") -> str:
    """The mistake with its upstream bug, the evidence, the condition and the remedy; or that no mistake is named.
    ``bug``: what stands for the link to the bug; default: the link itself."""
    if found.reference_wrong:
        return REFERENCE_WRONG
    if found.disagreement is not None:
        return ". ".join(disagreement(found.disagreement))
    details = "; ".join(_details(found))
    if not found.mistake:
        return f"matches no known mistake: {details}"
    known = MISTAKES[found.mistake]
    return f'matches "{known.words}" ({found.mistake}, {bug or found.bug}): {details}. {known.remedy}'


def _details(found: Diagnosis) -> Iterator[str]:
    if found.map is not None:
        yield f"the visibility maps ({', '.join(found.map.schedules)}) show attention {found.map.words}"
    if found.edit is not None:
        yield edit(found.edit)
    if found.leak is not None:
        yield LEAKS[found.leak.between]
    if found.generation_only:
        yield "only greedy generation is wrong, its steps are right"
    if found.precision is not None:
        yield f"all outputs of the shortest wrong probes are {precision(found.precision)}"
    if found.condition is not None:
        yield condition(found.condition)
    if found.heads:
        yield f"only in head{'s' if len(found.heads) > 1 else ''} {listed(found.heads)}"
    if found.first is not None and (not found.mistake or found.condition is None):
        yield f"first wrong probe ({found.first.probe}): {found.first.sentence}"


def disagreement(found: Disagreement) -> Iterator[str]:
    """What the own forward computes in place of the reference, as far as it is known."""
    start = f"from token {found.first_token} on" if found.first_token else "at the first token already"
    yield (
        f"disagrees with the reference {start}, without a cache: this is no mistake of the cache, but another function "
        f"than that of {found.reference}"
    )
    if found.window:
        yield f"In the reference that token is the first that does not see all before it: the window is {found.window}"
    if found.sees_more:
        yield "Its outputs depend on tokens that those of the reference do not: a window is wider, or lost"
    if found.sees_less:
        yield "Its outputs do not depend on tokens that those of the reference depend on"
    if found.variants:
        yield f"Its outputs are what the reference gives {', and also '.join(found.variants)}"
    elif found.cache_dtype:
        yield (
            f"Its cache is {found.cache_dtype}, and its outputs are within the bounds of the reference with such a "
            f"cache: --claim cache_dtype={found.cache_dtype} accepts that"
        )
    elif not found.first_token and found.correlation > ALIKE:
        yield (
            f"It is off by at most {100 * found.size:.2g} % of the size of the outputs: the weights are the same, and "
            "a constant, an activation or an epsilon is another, or something is rounded more"
        )
    elif not found.first_token:
        yield (
            f"Over the vocabulary, the two correlate by {found.correlation:.2f}. Other weights do this, quantised ones "
            "included; so do another map from query heads to keys, other absolute positions, or a lost soft cap of "
            "logits"
        )
    elif not (found.window or found.sees_more or found.sees_less):
        yield (
            "The tokens before agree, so that the weights are the same, and its outputs depend on the right tokens: it "
            "is in the numbers of attention, such as the scale or soft cap of scores, rotary factors, or the dtype of "
            "keys and values"
        )


def edit(found: EditMatch) -> str:
    """``every wrong output is what the reference gives without the newest cached token``."""
    first = "first " * found.first_only
    if found.matched == found.wrong:
        return f"every {first}wrong output is what the reference gives {found.words}"
    which = f"{found.matched} of {found.wrong} {first}wrong outputs"
    return f"{which} are what the reference gives {found.words}, all that this changes"


def precision(found: PrecisionMatch) -> str:
    """``within the bounds of bfloat16 and an 8-bit cache``."""
    parts = [found.dtype, *(["intermediates of that dtype"] if found.intermediates == "storage" else [])]
    if found.cache_dtype:
        parts.append(f"a {found.cache_dtype} cache")
    if found.kv_bits and found.scheme != "integer":
        parts.append(f"a {found.scheme} cache")
    elif found.kv_bits:
        parts.append(f"a{'n' if found.kv_bits == 8 else ''} {found.kv_bits}-bit cache")
    return f"within the bounds of {' and '.join(parts)}"


def condition(found: Condition) -> str:
    """``only with q > 1 and past > 0``."""
    if not found.predicates:
        total = found.wrong + found.right
        return "wrong in every output" if not found.right else f"wrong in {found.wrong} of {total} outputs"
    predicates = found.predicates
    if all(one.startswith("with ") for one in predicates):
        predicates = [predicates[0], *(one.removeprefix("with ") for one in predicates[1:])]
    words = " and ".join(predicates)
    if not found.exact:
        met = f"{found.wrong_met} of {found.wrong} wrong outputs and {found.right_met} of {found.right} right ones"
        return f"mostly {words} ({met})"
    return f"only {words}" + ", and in later outputs of the same sequence" * found.first_only
