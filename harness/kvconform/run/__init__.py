"""Runs the suite on a backend or a target."""
