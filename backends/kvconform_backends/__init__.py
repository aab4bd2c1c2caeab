"""Adapters to implementations. Frameworks are imported inside the adapters, never here."""
