"""Export ``decoder.onnx``, a small decoder that returns its keys and values and takes them as inputs:

    python examples/export_decoder.py decoder.onnx
    kvconform check decoder.onnx

With ``--broken``, the causal mask is aligned to the top-left corner, so a step on a cache sees only the oldest tokens.
``is_causal=True`` has this effect when there is a past.
"""

import argparse
import logging
import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim

LAYERS, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 2, 3, 8, 61, 64
WIDTH = HEADS * HEAD_DIM
Past = list[tuple[Tensor, Tensor]]  # keys and values (b, h, s, d) of each layer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2)), (key, value)


class Decoder(nn.Module):
    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.broken = broken
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, past_key_values: Past) -> tuple[Tensor, Past]:
        t, past = input_ids.shape[1], past_key_values[0][0].shape[2]
        at = torch.arange(t) + past
        query = torch.arange(t) if self.broken else at
        mask = torch.arange(past + t) <= query[:, None]  # (t, s)
        x, present = self.tokens(input_ids) + self.positions(at), []
        for layer, held in zip(self.layers, past_key_values, strict=True):
            mixed, kept = layer(x, held, mask)
            x = x + mixed
            present.append(kept)
        return self.head(x), present


def export(path: str, broken: bool) -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # warnings of the exporter about deprecated classes and unused names
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs a line for each missing torchvision operator
    # sizes of the example: none is 1, which the exporter would treat as constant, and no two are equal
    held = [tuple(torch.zeros(2, HEADS, 5, HEAD_DIM) for _ in "kv") for _ in range(LAYERS)]
    batch, new, past = Dim("batch"), Dim("new"), Dim("past")
    names = [f"{{}}.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    torch.onnx.export(
        Decoder(broken).eval(),
        (torch.zeros(2, 4, dtype=torch.long), held),
        path,
        dynamo=True,
        dynamic_shapes=({0: batch, 1: new}, [({0: batch, 2: past},) * 2] * LAYERS),
        input_names=["input_ids", *(name.format("past_key_values") for name in names)],
        output_names=["logits", *(name.format("present") for name in names)],
        opset_version=23,
        external_data=False,
        verbose=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="decoder.onnx", help="the file to write")
    parser.add_argument("--broken", action="store_true", help="align the mask to the wrong corner")
    asked = parser.parse_args()
    export(asked.file, asked.broken)
    print(f"wrote {asked.file}")
