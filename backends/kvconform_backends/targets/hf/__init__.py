"""Targets ``hf:``: models of transformers."""
