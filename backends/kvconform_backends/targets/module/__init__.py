"""Targets ``py:``: modules and functions."""
