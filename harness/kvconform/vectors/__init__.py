"""Vectors: programs, inputs and expected outputs as files, for implementations that no worker of ours can start."""
