"""Outputs are those of the definition of attention and of the decoder, also where all paths of a backend agree."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvconform_specs import situations as reach
from kvconform_specs.any_history import any_history
from kvconform_specs.claims import Claims, changes_at
from kvconform_specs.clause import Case, Clause, Relation, ordinary, short
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.strategies import Draw, appends, at_once, batches, seeds, straight


def _growing(config: Config, claims: Claims) -> SearchStrategy[Case]:
    return straight(config, claims, most=3).map(lambda program: Case((program,)))


@st.composite
def _decoding(draw: Draw, config: Config, claims: Claims) -> Case:
    """A prompt, decode steps, then a chunk: positions continue from the cache in three ways, near the start, far, and
    where outputs change with the length."""
    near, far = st.integers(1, 8), st.just(config.capacity - 9)
    prompt = draw(st.one_of(near, far, *(st.just(max(at - 2, 1)) for at in changes_at(config, claims)[:1])))
    new, chunk = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    sizes = (*at_once(prompt, claims), *(1,) * new, *at_once(chunk, claims))
    return Case((clipped(config, appends("a", sizes, draw(batches(claims)), draw(seeds))),))


NEAR_CAPACITY = reach.append("a sequence that ends near the capacity", lambda v: v.longest > v.config.capacity - 9)


CLAUSES = (
    Clause(
        name="definition.attention",
        text="Any program's outputs are softmax(scale q k + mask) v in exact arithmetic, within the derived bound.",
        why=(
            "https://github.com/onnx/onnx/pull/8068",
            "https://github.com/microsoft/onnxruntime/pull/25927",
            "https://github.com/pytorch/pytorch/issues/112577",
        ),
        strategy=any_history,
        relations=(Relation.PARITY,),
        profiles=("attention",),
        applies=short,
        core=True,
        situations=(*reach.BASIC, reach.ROWS, *reach.EDITS, reach.PAST_WINDOW),
    ),
    Clause(
        name="definition.decoder",
        text="The logits of any program are those of the decoder's definition, within the measured bound.",
        why=(
            "https://github.com/meta-pytorch/gpt-fast/issues/233",
            "https://github.com/huggingface/transformers/issues/34232",
            "https://github.com/vllm-project/vllm-ascend/pull/11791",
        ),
        strategy=any_history,
        relations=(Relation.PARITY,),
        profiles=("decoder",),
        core=True,
        situations=(*reach.BASIC, reach.ROWS, *reach.EDITS, reach.PAST_WINDOW, reach.SWITCH),
    ),
    Clause(
        name="definition.grouping",
        text="Query head i uses KV head i // (h / g): each KV head is repeated, and the heads are not tiled as a "
        "block.",
        why=("https://github.com/onnx/onnx/pull/7274", "https://github.com/ekzhang/jax-js/pull/180"),
        strategy=_growing,
        relations=(Relation.PARITY,),
        share=0.5,
        applies=lambda config: ordinary(config) and 1 < config.kv_heads < config.heads,
        situations=reach.BASIC,
    ),
    Clause(
        name="definition.scale",
        text="Scores are multiplied once and before the mask, by the given scale, which may be negative or 0, or by "
        "1 / sqrt(d) of the unpadded head dim if none is given.",
        why=(
            "https://github.com/onnx/onnx/issues/7865",
            "https://github.com/pytorch/pytorch/pull/105202",
            "https://github.com/NVIDIA/cudnn-frontend/pull/804",
        ),
        strategy=_growing,
        relations=(Relation.PARITY,),
        applies=short,
        share=0.5,
        situations=reach.BASIC,
    ),
    Clause(
        name="definition.softcap",
        text="Softcap applies to the scaled scores, before bias and mask: a masked key has weight zero.",
        why=("https://github.com/onnx/onnx/issues/7865", "https://github.com/microsoft/onnxruntime/pull/28370"),
        strategy=_growing,
        relations=(Relation.PARITY,),
        share=0.5,
        applies=lambda config: config.softcap is not None,
        situations=reach.BASIC,
    ),
    Clause(
        name="definition.bias",
        text="A bias depends on the logical positions of query and key, cached keys included, and is added after the "
        "softcap and before the mask.",
        why=(
            "https://github.com/keras-team/keras-hub/pull/2977",
            "https://github.com/onnx/onnx/pull/7867",
            "https://github.com/microsoft/onnxruntime/pull/28379",
        ),
        strategy=_decoding,
        relations=(Relation.PARITY,),
        applies=lambda config: config.positions == "alibi",
        situations=(*reach.BASIC, NEAR_CAPACITY),
    ),
    Clause(
        name="definition.sink",
        text="A sink is a score without a value: it is part of every query's denominator, is neither scaled nor "
        "capped, and is not a token.",
        why=(
            "https://github.com/openvinotoolkit/openvino/pull/36016",
            "https://github.com/NVIDIA/TensorRT-LLM/pull/2983",
        ),
        strategy=_growing,
        relations=(Relation.PARITY,),
        share=0.5,
        applies=lambda config: config.sink is not None,
        situations=reach.BASIC,
    ),
    Clause(
        name="definition.positions",
        text="Positions are logical: a token's position is its index in its row, whatever the number of cached tokens "
        "and the chunk. Rope rotates the pair (x_i, x_(i + d/2)); where its factors depend on the length, that is the "
        "number of tokens up to the end of the step, for all keys.",
        why=(
            "https://github.com/pytorch/executorch/pull/2010",
            "https://github.com/skyzh/tiny-llm/pull/46",
            "https://github.com/vllm-project/vllm-ascend/pull/12780",
            "https://github.com/huggingface/transformers/issues/33129",
            "https://github.com/vllm-project/vllm/issues/27414",
        ),
        strategy=_decoding,
        relations=(Relation.PARITY,),
        profiles=("decoder",),
        applies=lambda config: config.positions in ("learned", "rope"),
        situations=(*reach.BASIC, NEAR_CAPACITY, reach.SWITCH),
    ),
)
