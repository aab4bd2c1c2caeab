"""Backends on ONNX Runtime."""
