"""Guarantees beyond the bound, from the weakest to the strongest: measured for each backend, required of none."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis.strategies import SearchStrategy

from kvconform_specs import situations as reach
from kvconform_specs.any_history import any_history
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Level, Relation
from kvconform_specs.clauses.batch import rows_alone
from kvconform_specs.clauses.equivalence import chunks
from kvconform_specs.config import Config
from kvconform_specs.strategies import straight


def _twice(config: Config, claims: Claims) -> SearchStrategy[Case]:
    return straight(config, claims).map(lambda program: Case((program, program)))


def _guarantee(
    name: str,
    text: str,
    why: tuple[str, ...],
    strategy: Callable[[Config, Claims], SearchStrategy[Case]],
    relation: Relation,
    profiles: tuple[str, ...] = ("attention", "decoder"),
    needs: tuple[str, ...] = (),
) -> Clause:
    return Clause(
        name,
        text,
        why,
        strategy,
        (relation,),
        Level.SHOULD,
        profiles,
        needs,
        share=0.5,
        variants=2,
        situations=(reach.DECODE,),
    )


CLAUSES = (
    _guarantee(
        "determinism.same-token",
        "The greedy token is the definition's, wherever its lead over every other one exceeds the bounds.",
        ("https://github.com/meta-pytorch/gpt-fast/issues/233",),
        any_history,
        Relation.SAME_TOKEN,
        profiles=("decoder",),
    ),
    _guarantee(
        "determinism.repeatable",
        "Running the same program again gives the same bits.",
        ("https://github.com/flashinfer-ai/flashinfer/pull/1675",),
        _twice,
        Relation.BITWISE,
    ),
    _guarantee(
        "determinism.batch-invariant",
        "A row's outputs in a batch are those of the row alone, bit for bit.",
        (
            "https://github.com/flashinfer-ai/flashinfer/issues/4647",
            "https://github.com/deepseek-ai/FlashMLA/issues/212",
        ),
        rows_alone,
        Relation.BITWISE,
        needs=("two rows",),
    ),
    _guarantee(
        "determinism.chunk-invariant",
        "The same tokens give the same bits however they are split into chunks.",
        ("https://github.com/lightseekorg/tokenspeed/issues/904",),
        chunks,
        Relation.BITWISE,
        needs=("lossless cache",),
    ),
)
