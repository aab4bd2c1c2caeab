"""The reference: float64 definition, bounds and oracle. It has no cache."""
