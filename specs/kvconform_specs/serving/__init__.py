"""The law for a server: what a request returns depends on its own prompt and parameters alone."""
