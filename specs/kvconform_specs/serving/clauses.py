"""What a request returns does not depend on what the engine has cached, nor on what it does beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from kvconform_specs.clause import Level
from kvconform_specs.serving import strategies as draw
from kvconform_specs.serving.strategies import Make, Sizes

GITHUB = "https://github.com/"
CHAPTER, CONFIG = "serving", "serving"
"""The chapter, and the name of the one config that an engine is judged under."""


class Served(Enum):
    """The closed list of what a clause about serving can require of a program's answers. With every relation, a request
    that is served alone must be served."""

    COLD = "tokens and log-probabilities are those of the request alone, without the prefix cache, within the bound"
    BITWISE = "tokens and log-probabilities are those of the same request alone, without the prefix cache, bit for bit"
    REPEATED = "the same request without the prefix cache gives the same log-probabilities again, bit for bit"
    RESCORED = (
        "the log-probability that decode reports for a token is what prefill gives for it when the text up to it is a "
        "prompt"
    )
    PROMPT = "the log-probabilities of the prompt's own tokens are those without the prefix cache, within the bound"
    COUNTS = (
        "an answer reports no more cached tokens than its prompt shares with what the engine has seen under the same "
        "salt and adapter, and the right numbers of prompt tokens and generated tokens"
    )
    REFUSED = "a request beyond the context is refused"
    BESIDE = "a request that is served alone is served beside others"
    MODEL = (
        "tokens and log-probabilities, those of a scored prompt included, are what the same weights give without an "
        "engine, within the bound"
    )


Possible = Callable[[Sizes], bool]


def always(sizes: Sizes) -> bool:
    return True


def fillable(sizes: Sizes) -> bool:
    return sizes.fillers is not None


def crowded(sizes: Sizes) -> bool:
    return sizes.together > 1


@dataclass(frozen=True)
class ServingClause:
    """One clause about serving.

    name: stable, ``serving.words``. text: the normative sentence. why: links to real bugs that it would have caught.
    strategy: the programs. relations: what must hold. needs, needs_any: abilities of the engine; without them the
    clause is *unsupported*. possible: whether programs for an engine of these sizes can try it; ``otherwise`` says why
    not. evidence: what the engine must have reported while the programs ran, ``hit`` or ``preemption``; otherwise the
    clause is *not exercised*. situations: what the programs of each cell are about, each with its condition.
    """

    name: str
    text: str
    why: tuple[str, ...]
    strategy: Make
    relations: tuple[Served, ...] = (Served.COLD,)
    level: Level = Level.MUST
    core: bool = False
    needs: tuple[str, ...] = ()
    needs_any: tuple[str, ...] = ()
    possible: Possible = always
    otherwise: str = ""
    evidence: tuple[str, ...] = ("hit",)
    situations: tuple[tuple[str, Possible], ...] = ()

    @property
    def chapter(self) -> str:
        return CHAPTER

    @property
    def by_model(self) -> bool:
        """Whether answers are compared with the weights that the engine serves."""
        return Served.MODEL in self.relations


def every(*words: str) -> tuple[tuple[str, Possible], ...]:
    return tuple((one, always) for one in words)


CLAUSES = (
    ServingClause(
        name="serving.rescore",
        text="The log-probability that decode reports for a token is what prefill reports for it when the text is "
        "scored again.",
        why=(GITHUB + "vllm-project/vllm/pull/36580", GITHUB + "GeeeekExplorer/nano-vllm/issues/212"),
        strategy=draw.turns,
        relations=(Served.RESCORED,),
        core=True,
        evidence=(),
        situations=every("an answer that fills its block", "an answer inside a block"),
    ),
    ServingClause(
        name="serving.prefix-hit",
        text="A request whose prefix is cached returns what it returns without the cache: repeated, longer or shorter.",
        why=(GITHUB + "tenstorrent/vllm/issues/415", GITHUB + "vllm-project/vllm/issues/7845"),
        strategy=draw.repeats,
        core=True,
        situations=every("a repeated prompt", "a longer prompt", "a shorter prompt"),
    ),
    ServingClause(
        name="serving.block-boundary",
        text="So it does where the common prefix ends at the end of a block, a token before it or a token behind it.",
        why=(GITHUB + "sgl-project/sglang/issues/22819", GITHUB + "vllm-project/vllm/pull/7380"),
        strategy=draw.boundaries,
        core=True,
        situations=every(*(f"a prefix that ends {place} a block's end" for place in ("at", "behind", "before"))),
    ),
    ServingClause(
        name="serving.divergence",
        text="A block is reused for the same tokens, in the same order, after the same prefix, and for nothing else.",
        why=(GITHUB + "openvinotoolkit/openvino.genai/issues/3722", GITHUB + "vllm-project/aibrix/pull/2330"),
        strategy=draw.divergences,
        core=True,
        situations=every(*draw.DIVERGENCES),
    ),
    ServingClause(
        name="serving.second-turn",
        text="A conversation that feeds the engine's own answer back returns what its whole text returns without the "
        "cache.",
        why=(GITHUB + "jjang-ai/vmlx/issues/198", GITHUB + "sgl-project/sglang/pull/16521"),
        strategy=draw.turns,
        core=True,
        situations=every("an answer that fills its block", "an answer inside a block"),
    ),
    ServingClause(
        name="serving.order",
        text="A request returns the same whatever was asked before it, in whatever order.",
        why=(GITHUB + "vllm-project/vllm/issues/54490", GITHUB + "ovg-project/kvcached/issues/446"),
        strategy=draw.orders,
    ),
    ServingClause(
        name="serving.neighbours",
        text="A request returns the same whatever is computed beside it, with common prefixes and without.",
        why=(GITHUB + "ggml-org/llama.cpp/issues/27994", GITHUB + "ggml-org/llama.cpp/issues/4113"),
        strategy=draw.groups,
        needs=("concurrent",),
        possible=crowded,
        otherwise="one request at a time is all that the limits allow",
        situations=every("equal prefixes beside one another", "different prefixes beside one another"),
    ),
    ServingClause(
        name="serving.abort",
        text="A client that leaves changes no answer, neither beside it nor later.",
        why=(GITHUB + "sgl-project/sglang/pull/28374", GITHUB + "sgl-project/sglang/issues/38319"),
        strategy=draw.aborts,
        needs=("abort", "concurrent"),
        possible=crowded,
        otherwise="one request at a time is all that the limits allow",
        situations=every("a client that leaves alone", "a client that leaves beside another"),
    ),
    ServingClause(
        name="serving.eviction",
        text="After its blocks were evicted, or the cache was reset, a request returns what it returned before.",
        why=(GITHUB + "sgl-project/sglang/issues/23392", GITHUB + "NVIDIA/TensorRT-LLM/issues/8813"),
        strategy=draw.evictions,
        possible=lambda sizes: fillable(sizes) or "reset" in sizes.abilities,
        otherwise="the size of the cache is not known, or it is larger than a program fills, and there is no reset",
        situations=((draw.FULL, fillable), (draw.EMPTIED, lambda sizes: "reset" in sizes.abilities)),
    ),
    ServingClause(
        name="serving.preemption",
        text="A request that was preempted and computed again returns what it returns alone.",
        why=(GITHUB + "vllm-project/vllm/issues/16832", GITHUB + "vllm-project/vllm-ascend/pull/14180"),
        strategy=draw.pressures,
        needs=("preemptions", "concurrent"),
        possible=lambda sizes: fillable(sizes) and crowded(sizes),
        otherwise="the size of the cache is not known, or it is larger than a program fills",
        evidence=("preemption",),
    ),
    ServingClause(
        name="serving.partition",
        text="A salt and an adapter partition the cache: no block is read under another salt or adapter.",
        why=(GITHUB + "vllm-project/vllm/issues/44701", GITHUB + "vllm-project/vllm/pull/8240"),
        strategy=draw.partitions,
        relations=(Served.COUNTS, Served.COLD),
        needs_any=("salt", "adapter"),
        situations=(
            (draw.SALTED, lambda sizes: "salt" in sizes.abilities),
            (draw.ADAPTED, lambda sizes: sizes.adapters > 0),
            (draw.ALIKE, lambda sizes: sizes.adapters > 0 and "salt" in sizes.abilities),
        ),
    ),
    ServingClause(
        name="serving.forks",
        text="Each of several completions of one prompt is what the prompt returns alone, and so is what continues "
        "one.",
        why=(GITHUB + "ggml-org/llama.cpp/issues/3802",),
        strategy=draw.forks,
        needs=("n",),
        evidence=(),
    ),
    ServingClause(
        name="serving.prompt-logprobs",
        text="The log-probabilities of a prompt's own tokens are the same whether they are cached or not.",
        why=(GITHUB + "vllm-project/vllm/issues/42019", GITHUB + "vllm-project/vllm/issues/3251"),
        strategy=draw.scorings,
        relations=(Served.PROMPT,),
        needs=("score",),
        evidence=(),
    ),
    ServingClause(
        name="serving.accounting",
        text="An answer reports no more cached tokens than its prompt shares with earlier ones, and counts its prompt "
        "and its generated tokens rightly.",
        why=(GITHUB + "vllm-project/vllm/pull/34616", GITHUB + "vllm-project/vllm/pull/17305"),
        strategy=draw.mixtures,
        relations=(Served.COUNTS,),
    ),
    ServingClause(
        name="serving.errors",
        text="A request beyond the context is refused and leaves no trace, and what is served alone is served beside "
        "others.",
        why=(GITHUB + "ggml-org/llama.cpp/issues/23652", GITHUB + "ggml-org/llama.cpp/pull/9525"),
        strategy=draw.trials,
        relations=(Served.REFUSED, Served.BESIDE, Served.COLD),
        situations=((draw.REFUSED, always), (draw.BESIDE, crowded), (draw.CROWD, crowded)),
    ),
    ServingClause(
        name="serving.model",
        text="A request returns what the same weights give without an engine, whether its prefix is cached or not.",
        why=(GITHUB + "vllm-project/vllm/issues/49795", GITHUB + "vllm-project/vllm/issues/18352"),
        strategy=draw.scored_repeats,
        relations=(Served.MODEL,),
        evidence=(),
        situations=every("a repeated prompt", "a longer prompt", "a shorter prompt"),
    ),
    ServingClause(
        name="serving.repeatable",
        text="The same request without the cache gives the same log-probabilities again, bit for bit.",
        why=(GITHUB + "vllm-project/vllm/issues/5543",),
        strategy=draw.repeats,
        relations=(Served.REPEATED,),
        level=Level.SHOULD,
        evidence=(),
    ),
    ServingClause(
        name="serving.batch-invariant",
        text="A request gives the same log-probabilities beside others as alone, bit for bit.",
        why=(GITHUB + "ggml-org/llama.cpp/issues/4902",),
        strategy=draw.neighbours_without_cache,
        relations=(Served.BITWISE,),
        level=Level.SHOULD,
        needs=("concurrent",),
        possible=crowded,
        otherwise="one request at a time is all that the limits allow",
        evidence=(),
    ),
    ServingClause(
        name="serving.bitwise-hit",
        text="A request whose prefix is cached gives the log-probabilities that it gives without the cache, bit for "
        "bit.",
        why=(GITHUB + "vllm-project/vllm/issues/40896",),
        strategy=draw.repeats,
        relations=(Served.BITWISE,),
        level=Level.SHOULD,
    ),
)
BY_NAME = {clause.name: clause for clause in CLAUSES}
