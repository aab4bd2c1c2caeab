"""Adapters to serving engines, and a toy engine with planted faults."""
