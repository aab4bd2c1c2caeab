"""Adapters to serving engines of others, and the tiny models that they are started with."""
