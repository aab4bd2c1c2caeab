"""Black-box targets: modules in files, ONNX decoders, transformers models."""
