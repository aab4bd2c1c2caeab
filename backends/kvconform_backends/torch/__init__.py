"""Backends on PyTorch."""
