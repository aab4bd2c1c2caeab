"""Attention operators and caches of other projects, each in one file and in an environment of its own."""
