"""What is computed is what attention and the decoder are defined to be, also where every path is wrong alike."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation, ordinary
from kvconform_specs.config import Config
from kvconform_specs.program import Program
from kvconform_specs.strategies import Draw, any_history, appends, at_once, batches, seeds, straight


def _growing(config: Config, claims: Claims) -> SearchStrategy[Case]:
    return straight(config, claims, most=3).map(lambda program: Case((program,)))


@st.composite
def _decoding(draw: Draw, config: Config, claims: Claims) -> Case:
    """A prompt, decode steps, then a chunk: positions go on from the cache in three ways, near and far."""
    prompt = draw(st.integers(1, 8) | st.just(config.capacity - 9))
    new, chunk = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    sizes = (*at_once(prompt, claims), *(1,) * new, *at_once(chunk, claims))
    return Case((Program(config, appends("a", sizes, draw(batches(claims)), draw(seeds))),))


CLAUSES = (
    Clause(
        name="definition.attention",
        text="Attention over any program is softmax(scale q k + mask) v in exact arithmetic, within the derived bound.",
        why=(
            "https://github.com/onnx/onnx/pull/8068",
            "https://github.com/microsoft/onnxruntime/pull/25927",
            "https://github.com/pytorch/pytorch/issues/112577",
        ),
        strategy=any_history,
        relations=(Relation.PARITY,),
        profiles=("attention",),
        core=True,
    ),
    Clause(
        name="definition.decoder",
        text="The logits of any program are those of the decoder's definition, within the measured bound.",
        why=(
            "https://github.com/meta-pytorch/gpt-fast/issues/233",
            "https://github.com/huggingface/transformers/issues/34232",
        ),
        strategy=any_history,
        relations=(Relation.PARITY,),
        profiles=("decoder",),
        core=True,
    ),
    Clause(
        name="definition.grouping",
        text="Query head i reads KV head i // (h / g): KV heads are repeated one by one, not tiled as a block.",
        why=("https://github.com/onnx/onnx/pull/7274", "https://github.com/ekzhang/jax-js/pull/180"),
        strategy=_growing,
        relations=(Relation.PARITY,),
        share=0.5,
        applies=lambda config: ordinary(config) and 1 < config.kv_heads < config.heads,
    ),
    Clause(
        name="definition.scale",
        text="Scores are multiplied by the scale that is given, by 1 / sqrt(d) of the true head dim where none is, "
        "once.",
        why=("https://github.com/onnx/onnx/issues/7865",),
        strategy=_growing,
        relations=(Relation.PARITY,),
        share=0.5,
    ),
    Clause(
        name="definition.softcap",
        text="Softcap bends the scaled scores, before bias and mask: a masked key keeps no weight.",
        why=("https://github.com/onnx/onnx/issues/7865", "https://github.com/microsoft/onnxruntime/pull/28370"),
        strategy=_growing,
        relations=(Relation.PARITY,),
        share=0.5,
        applies=lambda config: config.softcap is not None,
    ),
    Clause(
        name="definition.bias",
        text="A bias follows the logical positions of query and key, also those of a cached key, and is added after "
        "the softcap and before the mask.",
        why=(
            "https://github.com/keras-team/keras-hub/pull/2977",
            "https://github.com/onnx/onnx/pull/7867",
            "https://github.com/microsoft/onnxruntime/pull/28379",
        ),
        strategy=_decoding,
        relations=(Relation.PARITY,),
        applies=lambda config: config.positions == "alibi",
    ),
    Clause(
        name="definition.sink",
        text="A sink is a score without a value: it joins the denominator of every query, neither scaled nor capped, "
        "and is no token.",
        why=(
            "https://github.com/openvinotoolkit/openvino/pull/36016",
            "https://github.com/NVIDIA/TensorRT-LLM/pull/2983",
        ),
        strategy=_growing,
        relations=(Relation.PARITY,),
        share=0.5,
        applies=lambda config: config.sink is not None,
    ),
    Clause(
        name="definition.positions",
        text="Positions are logical: a token's is its index in its row, however many tokens are cached, whatever the "
        "chunk. Rope turns the pair (x_i, x_(i + d/2)).",
        why=(
            "https://github.com/pytorch/executorch/pull/2010",
            "https://github.com/skyzh/tiny-llm/pull/46",
            "https://github.com/vllm-project/vllm-ascend/pull/12780",
        ),
        strategy=_decoding,
        relations=(Relation.PARITY,),
        profiles=("decoder",),
        applies=lambda config: config.positions in ("learned", "rope"),
    ),
)
