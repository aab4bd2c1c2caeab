"""The spec as documentation: one page, and one clause at a time."""
