"""Exact counts of what a step does, compared with a baseline."""
