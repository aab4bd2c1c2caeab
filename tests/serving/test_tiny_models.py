"""The tiny models load where engines load them, and their text and token ids are the same thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from kvconform_backends.servers.tiny_models import END, MODELS, text, weights, write_gguf, write_hf


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_hf(model, root / name) for name, model in MODELS.items()}


def test_transformers_loads_each_model_with_its_weights(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for key, value in weights(MODELS[name]).items():
            assert np.array_equal(loaded.state_dict()[key].numpy(), value), key
        assert getattr(loaded.config, "sliding_window", None) == MODELS[name].window


def test_each_token_is_one_character_in_both_directions(folders: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    ids = tuple(range(MODELS["llama"].vocabulary))
    assert tuple(tokenizer.encode(text(ids), add_special_tokens=False)) == ids
    assert tokenizer.decode(ids[1:]) == text(ids[1:])


def test_the_end_of_a_text_is_never_the_likeliest_token(folders: dict[str, Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
    ids = torch.randint(MODELS["llama"].vocabulary, (16, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not (model(ids).logits.argmax(-1) == END).any()


def test_a_window_is_refused_in_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no window"):
        write_gguf(MODELS["mistral-window"], tmp_path / "model.gguf")
