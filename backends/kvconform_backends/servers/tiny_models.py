"""Tiny random models on which serving engines are judged: a HF directory and a GGUF file with the same weights.

Nothing is downloaded, and the weights follow from the seed. Each token id is one character, so that text and token ids
map to one another for an engine that takes text. Id 0 is the end of a text: its row of the output matrix is 0, and one
of the many others is always likelier, so that no answer ends early.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvconform.errors import Unavailable

Array = np.ndarray[Any, np.dtype[np.float32]]
END = 0
"""The id that ends a text; never the likeliest one."""
FIRST = 0x4E00
"""The character of id 0. It begins a block of more than 20 000 letters, each of which is one token."""


@dataclass(frozen=True)
class Tiny:
    """A Llama, or with a window a Mistral. The head dimension is one that vLLM has on a CPU."""

    vocabulary: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 256
    context: int = 4096
    window: int | None = None
    base: float = 10_000.0
    epsilon: float = 1e-5
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


MODELS = {
    "llama": Tiny(),
    "llama-mha": Tiny(kv_heads=4, seed=1),
    "llama-mqa": Tiny(kv_heads=1, seed=2),
    "mistral-window": Tiny(window=24, seed=3),
}
"""By name. Engines read the window of a Mistral from a HF directory; a GGUF file of this architecture has none."""


def text(ids: tuple[int, ...]) -> str:
    """The text that the tokenizer maps to these ids, and no others."""
    return "".join(chr(FIRST + i) for i in ids)


def weights(model: Tiny) -> dict[str, Array]:
    """By the names of transformers, float32, (out, in). Each matrix keeps the scale of its input."""
    rng = np.random.default_rng(model.seed)

    def matrix(rows: int, columns: int) -> Array:
        drawn: Array = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        return drawn.astype(np.float32)

    m, kv = model, model.kv_heads * model.head_dim
    found = {"model.embed_tokens.weight": matrix(m.vocabulary, m.width) * np.float32(np.sqrt(m.width))}
    for layer in range(m.layers):
        shapes = {
            "self_attn.q_proj": (m.width, m.width),
            "self_attn.k_proj": (kv, m.width),
            "self_attn.v_proj": (kv, m.width),
            "self_attn.o_proj": (m.width, m.width),
            "mlp.gate_proj": (m.inner, m.width),
            "mlp.up_proj": (m.inner, m.width),
            "mlp.down_proj": (m.width, m.inner),
        }
        found |= {f"model.layers.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = np.ones(m.width, np.float32)
    found["model.norm.weight"] = np.ones(m.width, np.float32)
    found["lm_head.weight"] = 2 * matrix(m.vocabulary, m.width)
    found["lm_head.weight"][END] = 0
    return found


def write_hf(model: Tiny, folder: Path, dtype: str = "float32") -> Path:
    """A directory that transformers loads, in float32; its matrices hold numbers of ``dtype``. Raises Unavailable if
    safetensors is not installed."""
    try:
        from safetensors.numpy import save_file
    except ImportError as missing:
        raise Unavailable("a model directory needs 'safetensors'", "pip install safetensors") from missing

    folder.mkdir(parents=True, exist_ok=True)
    held = {name: w.astype(dtype).astype(np.float32) if w.ndim == 2 else w for name, w in weights(model).items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", _config(model)), *_tokenizer(model).items()):
        (folder / name).write_text(json.dumps(content))
    return folder


def _config(model: Tiny) -> dict[str, Any]:
    kind = "llama" if model.window is None else "mistral"
    return {
        "architectures": [f"{kind.title()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.epsilon,
        "rope_theta": model.base,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END,
        "torch_dtype": "float32",
        **({} if model.window is None else {"sliding_window": model.window}),
    }


def _tokenizer(model: Tiny) -> dict[str, dict[str, Any]]:
    """Byte pairs without merges: each character is a token."""
    vocabulary = {chr(FIRST + i): i for i in range(model.vocabulary)}
    end = chr(FIRST + END)
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": END,
                    "content": end,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ],
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
        },
    }


def write_gguf(model: Tiny, path: Path, dtype: str = "float32") -> Path:
    """A GGUF file that llama.cpp loads. dtype of the matrices: float32 or float16.

    Raises Unavailable if gguf is not installed, and ValueError for a window.
    """
    if model.window is not None:
        raise ValueError("a GGUF file of the llama architecture has no window; write a HF directory")
    try:
        import gguf
    except ImportError as missing:
        raise Unavailable("a GGUF file needs 'gguf'", "pip install gguf") from missing

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.inner)
    writer.add_block_count(model.layers)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.base)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_vocab_size(model.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "float32" else gguf.LlamaFileType.MOSTLY_F16)
    letters = [_byte_level(chr(FIRST + i)) for i in range(model.vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters)
    writer.add_token_merges([f"{letters[1]} {letters[1]}"])  # OpenVINO wants one; no token is spelt so
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if i == END else normal for i in range(model.vocabulary)])
    writer.add_eos_token_id(END)
    writer.add_bos_token_id(END)
    writer.add_add_bos_token(False)
    for name, array in _gguf_tensors(model):
        writer.add_tensor(name, array if array.ndim == 1 else array.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_level(letter: str) -> str:
    """The spelling of a letter in a byte-level vocabulary: each byte of its UTF-8 is one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte if byte in printable else 256 + others.index(byte)) for byte in letter.encode())


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_tensors(model: Tiny) -> Iterator[tuple[str, Array]]:
    """The same weights under llama.cpp's names; it rotates neighbouring channels, transformers the two halves."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, array in weights(model).items():
        stem = name.removesuffix(".weight")
        if stem in outer:
            yield f"{outer[stem]}.weight", array
            continue
        _, _, layer, part = stem.split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = array.reshape(-1, 2, model.head_dim // 2, model.width)
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        yield f"blk.{layer}.{GGUF_NAMES[part]}.weight", array
