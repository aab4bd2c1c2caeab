"""Adapters to implementations, one file each. A framework is imported inside them, never here."""
