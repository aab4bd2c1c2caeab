"""The spec as documentation: one page, or one clause."""
