"""Targets ``onnx:``: exported decoders."""
