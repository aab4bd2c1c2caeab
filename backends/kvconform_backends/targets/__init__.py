"""What a person has, as black boxes: modules in files, ONNX decoders, models of transformers."""
