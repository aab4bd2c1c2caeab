"""Explains a failure: what the outputs see, which mistake it resembles, and a script that reproduces it."""
