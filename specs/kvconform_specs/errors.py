"""The base class of this project's errors, and the error of invalid input to the spec."""

from __future__ import annotations


class KvconformError(Exception):
    """The base class of every error that kvconform raises on purpose; its text is one sentence."""


class SpecError(KvconformError, ValueError):
    """Invalid input: where, what was given and what is known.

    ``at`` is the place in dotted form, such as ``steps[2].op``.
    """

    def __init__(self, at: str, message: str) -> None:
        super().__init__(f"{at}: {message}" if at else message)
        self.at = at
