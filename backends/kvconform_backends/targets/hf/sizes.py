"""A tiny config of any class of transformers: sizes become small, the structure stays.

A size is recognised by the name of its field and is never enlarged. Lists with an entry for each layer keep one layer
of each kind; fields that refer to layers by number are renumbered. Configs inside a config are treated in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig

SPREAD = 0.2
"""Standard deviation of random weights: with the usual 0.02, attention is nearly uniform, which hides errors."""
SPREADS = ("initializer_range", "init_std", "initializer_factor")
"""Fields that hold it; one that is larger than ``SPREAD`` is a factor."""
WINDOW = 5
"""Shorter than most prompts of the suite."""
POSITIONS = 40
"""Positions of a tiny model, and the capacity of every black box of this kind: programs stay short."""
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
INDEX_HEADS = 16
"""Heads of an indexer that chooses the tokens of sparse attention. A token whose scores are negative in all heads gets
exactly 0: with 4 heads every sixteenth does, and which of equal ones are chosen depends on the shape of the call."""
ROLES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|.*_hash_byte_group_vocab", 97),
    (r"(.*_)?hidden_size(_global)?|d_model|n_embd|dim|embedding_dim|emb_dim|lru_width|embed_dim|ple_embed_dim", WIDTH),
    (r"(in|out)put_embedding_size|embedding_size|word_embed_proj_dim|.*_embed_dim|mm_projector_dim", WIDTH),
    (r"adapter_((in|out)_dim|(in|out)put_size)", WIDTH),
    (r"hidden_size_per_layer_input|.*_rank|d_rel", 16),
    (r"(.*_)?(intermediate_size.*|ffn_dim|ffn_hidden_size|dim_ff|dff|d_inner|feed_forward_size)|n_inner", 48),
    (r"(.*_)?moe_.*intermediate_size|expert_ffn_hidden_size", 24),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (
        r"(.*_)?head_dim|dim_head|d_head|(.*_)?head_size|mamba_d_head|query_pre_attn_scalar|kv_channels|rotary_dim",
        HEAD_DIM,
    ),
    (r"mamba_(n|num)_heads", 8),
    (r"(num|n|.*_num)_(key_value_heads|kv_heads)|kv_n_heads", KV_HEADS),
    (r"index(er)?_n_heads", INDEX_HEADS),
    (r"((.*_)?num_|(.*_)?n_)?(.*_)?heads?(_per_layer)?|num_query_groups", HEADS),
    (r"(num|n|.*_num)_(local_|routed_)?experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|n_group|num_expert_group", 2),
    (r"topk_group|pretraining_tp|.*_bptt|num_codebooks", 1),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|max_(source|target)_positions", POSITIONS),
    (r"model_max_length|rel_extent|position_bias_max_distance", POSITIONS),
    (r"(.*_)?(state_size|d_state|ssm_state_size)", 8),
    (r"(mamba_)?chunk_size|block_size|block_multiple_of|ffn_round_up_to_multiple_of", 8),
    (
        r"sliding_window(_size)?|attention_chunk_size|(attention_)?window_size|local_attention(_window_len)?|keep_window_size",
        WINDOW,
    ),
    (r"index_topk.*", 8),
)
"""Names of size fields (whole names, the first match counts) and their values in a tiny model."""
SPECIAL: Mapping[str, int] = MappingProxyType({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
LAYERS = r"(num_)?(hidden_|encoder_|decoder_)?layers|n_layers?|num_layers_per_stack|num_blocks"
INDICES = r".*(layers|_idxs|_indices|_layer_ids)"
"""Lists of the numbers of layers."""
FIRST = r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers"
"""How many layers at the beginning are of another kind."""
PERIOD, OFFSET = r".*_layer_period", r".*_layer_offset"
FEW, MIXED = 2, 4
"""Layers of a tiny model that are all equal, and the fewest of one with several kinds of layers."""
BY_TYPE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cohere_compass_text": {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
            }
        },
        "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0}},
        "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
        "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
        "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
        "dots3_note_text": {"qk_nope_head_dim": HEAD_DIM, "head_dim": 2 * HEAD_DIM},
        "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
        "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
        "recurrent_gemma": {"num_hidden_layers": 3},
        "xlstm": {"hidden_size": 128, "embedding_dim": 128},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
        "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
        "mamba2": {"num_heads": 8},
        "reformer": {"axial_pos_shape": [5, 8], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
        "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_DIM},
        "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_DIM},
        "qwen4_exp_text": {
            "indexer_n_heads": INDEX_HEADS,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        "xmod": {"default_language": "en_XX"},
    }
)
"""Fields of model types whose sizes depend on one another in a way of their own."""


def tiny(plain: PreTrainedConfig) -> dict[str, Any]:
    """The fields that make a config of this class tiny."""
    given = {name: value for name, value in plain.to_dict().items() if name not in ("id2label", "label2id")}
    nested = {name: value for name in plain.sub_configs if isinstance(value := getattr(plain, name), PreTrainedConfig)}
    sizes = {name: _scaled(name, value) for name, value in given.items() if name not in nested}
    sizes |= _kept_layers(given)
    fields = {name: size for name, size in sizes.items() if size != given.get(name)}
    fields |= {name: {**_own(config), **tiny(config)} for name, config in nested.items()}
    fields |= spread(given)
    fields |= {name: token for name, token in SPECIAL.items() if name in given}
    if {"num_attention_heads", "hidden_size"} <= given.keys():
        unset = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}
        fields |= {name: size for name, size in unset.items() if given.get(name, 0) is None}
    if given.get("kv_lora_rank"):
        fields["num_key_value_heads"] = HEADS
    if given.get("is_decoder") is False and not given.get("is_encoder_decoder"):
        fields["is_decoder"] = True
    return {**fields, **BY_TYPE.get(plain.model_type, {})}


def spread(given: Mapping[str, Any]) -> dict[str, float]:
    """The fields of a config that make random weights large enough."""
    return {name: SPREAD for name in SPREADS if 0 < (given.get(name) or 0) <= SPREAD}


def _own(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config inside another one differs in from the defaults of its class."""
    return {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}


def _scaled(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if re.fullmatch(FIRST, name):
            return min(value, 1)
        if re.fullmatch(PERIOD, name):
            return min(value, MIXED)
        if re.fullmatch(OFFSET, name):
            return min(value, MIXED // 2)
        return min([value, *(size for pattern, size in ROLES if re.fullmatch(pattern, name))][:2])
    if isinstance(value, list) and value and not re.fullmatch(INDICES, name):
        return [_scaled(name, entry) for entry in value]
    return value


def _kept_layers(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of fewer layers, with each kind among them."""
    counts = {name: value for name, value in given.items() if re.fullmatch(LAYERS, name) and isinstance(value, int)}
    old = max(counts.values(), default=0)
    lists = {name: value for name, value in given.items() if isinstance(value, list) and len(value) == old}
    numbers = {name: value for name, value in given.items() if re.fullmatch(INDICES, name) and _ascending(value, old)}
    lists = {name: value for name, value in lists.items() if name not in numbers}
    single = {int(layer): fields for layer, fields in (given.get("per_layer_config") or {}).items()}
    kinds = [
        repr([[value[i] for value in lists.values()], [i in value for value in numbers.values()], single.get(i)])
        for i in range(old)
    ]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    mixed = len(first) > 1 or any(re.fullmatch(PERIOD, name) for name in given) or given.get("num_kv_shared_layers")
    count = min(max(MIXED, len(first)) if mixed else FEW, max(old, 1))
    chosen = [first[i % len(first)] if len(first) > 1 else i for i in range(count)] if old else []
    fields: dict[str, Any] = {name: min(value, count) for name, value in counts.items()}
    fields |= {name: [_scaled(name, value[i]) for i in chosen] for name, value in lists.items()}
    fields |= {name: [new for new, i in enumerate(chosen) if i in value] for name, value in numbers.items()}
    if single:
        fields["per_layer_config"] = {
            f"{new:02}": {
                name: HEADS if name == "num_key_value_heads" and "kv_lora_rank" in given else _scaled(name, value)
                for name, value in single[i].items()
            }
            for new, i in enumerate(chosen)
            if i in single
        }
    if given.get("num_kv_shared_layers"):
        fields["num_kv_shared_layers"] = count // 2
    return fields


def _ascending(value: Any, end: int) -> bool:
    return (
        isinstance(value, list)
        and all(type(entry) is int and 0 <= entry < end for entry in value)
        and all(one < other for one, other in pairwise(value))
    )
