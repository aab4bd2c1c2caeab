"""Exports the decoders of a set of vectors for ``decoder.mjs``: one ONNX file for each config that can be exported.

kvconform vectors write vectors
python export_decoders.py vectors decoders
"""

import json
import sys
from pathlib import Path

from safetensors.numpy import load_file

from kvconform_backends.onnx.graphs import decoder_model
from kvconform_backends.rotary import lacking
from kvconform_specs.config import Config

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
for name, entry in json.loads((folder / "manifest.json").read_text())["configs"].items():
    config = Config.from_json(entry["config"])
    if config.profile == "decoder" and config.dtype == "float32" and lacking(config) is None:
        (out / f"{name}.onnx").write_bytes(decoder_model(config, load_file(folder / entry["weights"]), cached=True))
        print(f"wrote {out / name}.onnx")
