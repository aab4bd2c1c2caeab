"""Names that modules with a KV cache give to parameters, methods, fields and sizes, the likeliest first."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOKENS = frozenset(_words("input_ids ids idx in_idx tokens token_ids input_tokens indices"))
"""First parameters that are token ids; others are also tried as hidden states."""
SELF_ATTENTION = (("query", "key", "value"), ("q", "k", "v"), ("queries", "keys", "values"))
"""Parameters that all take the same hidden states in self-attention."""
PASTS = frozenset(
    _words("""
    past past_kv past_kvs past_key_values past_key_value past_kv_cache past_cache past_states layer_past layer_pasts
    kv kvs kv_cache kv_caches cache caches cached_kv cache_kv layer_cache prev_kv prev state key_value_cache pasts
    presents memory_kv kv_past incremental_state inference_params cache_params kv_state past_state kv_memory
""")
)
"""Parameters that take a past."""
PAIRS = (
    ("past_k", "past_v"),
    ("past_key", "past_value"),
    ("past_keys", "past_values"),
    ("k_cache", "v_cache"),
    ("cache_k", "cache_v"),
    ("cached_k", "cached_v"),
    ("key_cache", "value_cache"),
    ("k_past", "v_past"),
    ("prev_k", "prev_v"),
)
"""Pairs of parameters that together take a past."""
FLAGS = frozenset(
    _words("""
    use_cache use_kv_cache use_kv use_past return_present return_presents return_past return_kv return_cache
    return_kv_cache return_past_kv cache_kv update_cache cached kv_cache cache
""")
)
"""Switches; those also in ``PASTS`` are switches if their default or annotation is a bool."""
SETTINGS = {
    "return_dict": "True",
    "return_tuple": "True",
    "output_attentions": "False",
    "output_hidden_states": "False",
    "return_attention": "False",
    "need_weights": "False",
    "is_causal": "True",
    "causal": "True",
    "training": "False",
    "train": "False",
    "deterministic": "True",
    "labels": "None",
    "targets": "None",
}
"""Parameters with one value in every call, given only where they have no default."""
MASKS = frozenset(_words("attention_mask mask attn_mask causal_mask attn_bias src_mask tgt_mask"))
"""Parameters that take a mask."""
ADAPTERS = frozenset(
    _words("""
    adapter adapters adapter_id adapter_ids adapter_index adapter_indices adapter_idx lora lora_id lora_ids lora_index
    lora_indices lora_idx lora_int_id lora_mapping task task_id task_ids expert_adapter domain_id
""")
)
"""Parameters that take the number of an adapter, one for all rows or one for each."""
STATES = frozenset(
    _words("""
    encoder_hidden_states encoder_states encoder_output encoder_outputs encoder_out enc_out enc_output enc_outputs
    encoder_embeds memory context contexts cross_states cross_attention_states conditioning cond image_embeds
    image_features image_states vision_features vision_states audio_features
""")
)
"""Parameters that take the states of an encoder or an image, ``(b, s, width)``."""
STATE_WIDTHS = _words("""
    encoder_width encoder_dim encoder_hidden_size d_encoder cross_attention_dim cross_dim context_dim memory_dim kv_dim
    image_dim vision_dim d_memory d_context
""")
SET_ADAPTER = _words("""
    set_adapter set_active_adapter set_active_adapters use_adapter switch_adapter select_adapter activate_adapter
    set_lora set_active_lora set_lora_id
""")
"""Methods that set the adapter of the calls that follow."""
ACTIVE = _words("active_adapter active_adapters active_lora current_adapter adapter_id lora_id adapter")
"""Attributes that hold the number of the adapter of the calls that follow."""
ADAPTER_NAMES = _words("adapters adapter_names peft_config loras lora_names")
"""Attributes that list the adapters by name."""
OFFSETS = frozenset(
    _words("""
    start_pos pos start start_position offset position past_length past_len cur_pos current_pos cache_len
    cache_length seq_offset position_offset pos_offset step start_idx
""")
)
"""Positions that are usually the index of the first new token."""
POSITIONS = frozenset(_words("position_ids positions pos_ids cache_position cache_positions input_pos"))
"""Positions that are usually a tensor with one entry per new token."""
RESETS = _words("""
    reset_kv_cache reset_cache reset_kv_caches reset_caches clear_kv_cache clear_cache clear_caches empty_cache
    flush_cache reset_past reset_state reset clear setup_caches setup_cache init_kv_cache init_cache init_caches
    allocate_cache allocate_kv_cache enable_cache set_kv_cache setup_kv_cache setup_kv_caches enable_kv_cache
    start_sequence new_sequence
""")
"""Methods that start a sequence in a module that owns its cache."""
MAKERS = _words("""
    make_cache make_kv_cache init_cache init_kv_cache init_caches new_cache create_cache empty_cache get_cache
    build_cache allocate_cache make_caches new_kv_cache create_kv_cache initial_cache init_state initial_state
    make_empty_cache empty_past init_past make_past
""")
"""Methods, or functions beside the target, that create an empty past."""
KEEPS = _words("""
    truncate truncate_to truncate_cache crop crop_cache crop_to trim_to cut cut_to shrink shrink_to keep keep_first
    rewind_to rollback_to roll_back_to set_length set_seq_length
""")
"""Methods that usually keep the first tokens; the argument is how many."""
REMOVES = _words("rollback roll_back rollback_cache rewind trim trim_cache pop undo drop_last remove_last evict unwind")
"""Methods that usually remove the last tokens; the argument is how many."""
REORDERS = _words("""
    reorder reorder_cache reorder_past reorder_rows _reorder_cache select_rows batch_select_indices index_select_rows
    permute_rows gather_rows reorder_incremental_state
""")
"""Methods that usually put rows in another order; the argument is their numbers."""
FORKS = _words("fork clone copy clone_cache copy_cache fork_cache duplicate snapshot")
"""Methods of a past that usually give a second one with the same tokens."""
OPERATIONS = (
    *KEEPS,
    *REMOVES,
    *REORDERS,
    *_words("fork clone_cache copy_cache fork_cache batch_repeat_interleave reset_rows"),
)
"""Methods of a module or a past that change what is cached, beside those that start a sequence."""
LENGTHS = frozenset(
    _words("""
    lengths seq_lens seq_lengths sequence_lengths cache_lengths cache_lens cache_seqlens past_lengths kv_lens
    cu_seqlens block_table block_tables slot_mapping beam_idx
""")
)
"""Parameters that tell rows apart: lengths, places, rows."""
OUTPUTS = _words("logits last_hidden_state hidden_states output out y x attn_output hidden")
"""Fields of a returned dict or object that hold the output."""
PRESENTS = _words("""
    past_key_values present_key_values present_key_value past_key_value past_kv present presents present_kv past
    cache kv_cache kv new_cache layer_past state caches
""")
"""Fields of a returned dict or object that hold the present."""
# sizes, read from constructor arguments, attributes and config objects
WIDTHS = _words("""
    d_model dim d_in embed_dim emb_dim hidden_size n_embd n_embed width model_dim hidden_dim d_embed embedding_dim
    dim_model in_features d C E
""")
CAPACITIES = _words("""
    context_length sequence_len sequence_length max_seq_len max_seq_length block_size max_len max_length n_positions
    max_position_embeddings n_ctx ctx_len context_len max_context max_context_length max_positions max_tokens
    cache_len max_cache_len seq_len seq_length capacity
""")
VOCABULARIES = _words("vocab_size n_vocab vocabulary vocabulary_size num_tokens n_tokens vocab")
HEADS = _words("n_heads num_heads n_head nheads num_attention_heads heads n_q_heads h H")
KV_HEADS = _words("n_kv_heads num_kv_heads num_key_value_heads n_kv_head kv_heads n_kv_groups num_kv_groups")
HEAD_DIMS = _words("head_dim d_head head_size d_k dim_head")
LAYERS = _words("n_layers num_layers n_layer num_hidden_layers depth layers L n_blocks")
WINDOWS = _words("window window_size sliding_window attention_window local_window")
