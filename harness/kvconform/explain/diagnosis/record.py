"""What a diagnosis found, as data for the results file. ``text.sentence`` renders it."""

from __future__ import annotations

import msgspec

from kvconform.judging.mismatch import Mismatch


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest condition found that separates the wrong outputs of the probes from the right ones."""

    predicates: list[str]
    """What holds of an output, at most two, such as `with past > 0`; empty: nearly all outputs are wrong."""
    wrong: int
    """How many outputs were wrong."""
    right: int
    """How many outputs were right."""
    wrong_met: int
    """How many of the wrong outputs meet the condition."""
    right_met: int
    """How many of the right outputs meet the condition."""
    first_only: bool = False
    """Whether only the first wrong output of each sequence is counted, since it may cause the later ones."""

    @property
    def exact(self) -> bool:
        return self.wrong_met == self.wrong and not self.right_met


class EditMatch(msgspec.Struct, frozen=True, kw_only=True):
    """An edit of the cache or of the mask with which the reference gives the wrong outputs."""

    words: str
    """What is edited; completes "what the reference gives ..."."""
    mistakes: list[str]
    """Ids of the mistakes that it may stand for; empty where several different mistakes look like it."""
    matched: int
    """How many wrong outputs equal those of the edited reference: all in the probes that the edit changes."""
    wrong: int
    """How many outputs were wrong in all probes."""
    first_only: bool = False
    """Whether only the first wrong output of each sequence is counted."""
    right_too: bool = True
    """Whether the edit leaves the right outputs of these probes right, too."""

    @property
    def share(self) -> float:
        return self.matched / self.wrong


class MapMatch(msgspec.Struct, frozen=True, kw_only=True):
    """A mask edit under which attention sees exactly what the visibility maps show."""

    words: str
    """The edit; completes "attention ..."."""
    mistakes: list[str]
    """Ids of the mistakes that it may stand for; empty where several different mistakes look like it."""
    schedules: list[str]
    """The schedules whose maps differ from what is expected."""


class Leak(msgspec.Struct, frozen=True, kw_only=True):
    """A visibility map in which outputs see tokens of another row or sequence."""

    between: str
    """`rows`; `open sequences`, which see each other's tokens; or `earlier sequences`, seen by later ones."""
    mistakes: list[str]
    """Ids of the mistakes that it may stand for; empty where several different mistakes look like it."""


class PrecisionMatch(msgspec.Struct, frozen=True, kw_only=True):
    """The highest precision, below the claimed one, whose bounds hold all outputs of the shortest wrong probes."""

    dtype: str
    """What inputs, weights and results are rounded to."""
    intermediates: str
    """`single`: scores and weights are kept in float32; `storage`: they are rounded to the dtype, too."""
    kv_bits: int
    """How many bits a number of a quantised cache takes; 0: it is not quantised."""
    cache_dtype: str = ""
    """What keys and values are rounded to on their way into the cache; empty: the same."""
    scheme: str = "integer"
    """How the numbers of a quantised cache are coded: `integer`, `float8_e4m3` or `float8_e5m2`."""


class FirstFailure(msgspec.Struct, frozen=True, kw_only=True):
    """The first probe that went wrong, the simplest probes first."""

    probe: str
    """What the probe does."""
    mismatch: Mismatch
    """The first violation in it."""
    sentence: str
    """The mismatch in words, for people: nothing reads it."""


class Disagreement(msgspec.Struct, frozen=True, kw_only=True):
    """How the own forward of a black box, without a cache, differs from another artefact that is its reference."""

    reference: str
    """The address of the reference."""
    first_token: int
    """Index of the first token, from 0, whose outputs differ by more than the bounds."""
    correlation: float
    """Of the outputs of that token, over the vocabulary and several sequences (no unit): 1 where they are
    proportional."""
    size: float
    """How far the outputs of that token are off at most, as a fraction of the root mean square of those of the
    reference."""
    window: int | None
    """The reference's window, in tokens, if outputs differ from the first token on that cannot see all before it; else
    null."""
    sees_more: bool
    """Whether a visibility map shows that its outputs depend on tokens that those of the reference do not depend on."""
    sees_less: bool
    """Whether a visibility map shows that its outputs do not depend on tokens that those of the reference depend on."""
    variants: list[str]
    """What the reference gives exactly these outputs with, such as `without its window`; several: with each of them."""
    cache_dtype: str = ""
    """The dtype of its cache, if its outputs are within the bounds of the reference with such a cache; else empty."""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which known mistake the wrong outputs of a backend match under one config, and when outputs are wrong."""

    mistake: str = ""
    """Id of the class of mistakes that the evidence names, such as `M1`; empty where it names none, or several."""
    bug: str = ""
    """Link to an upstream bug of that class."""
    reference_wrong: bool = False
    """Whether the outputs of the reference, a black box's own uncached forward, depend on later tokens; then nothing
    else is diagnosed."""
    disagreement: Disagreement | None = None
    """How it differs from its reference without a cache; then nothing else is diagnosed."""
    edit: EditMatch | None = None
    """The best match of an edit of the cache or the mask with the outputs."""
    map: MapMatch | None = None
    """The match of a mask edit with the visibility maps."""
    leak: Leak | None = None
    """Tokens of other rows or sequences that the visibility maps show."""
    generation_only: bool = False
    """Whether only greedy generation was wrong, and all steps were right."""
    condition: Condition | None = None
    """The smallest condition that separates wrong outputs from right ones."""
    precision: PrecisionMatch | None = None
    """The precision that the outputs are within the bounds of, where no mistake is named."""
    heads: list[int] = []
    """Indices of the only query heads that are wrong (attention profile); empty where all are."""
    first: FirstFailure | None = None
    """The first probe that went wrong."""
