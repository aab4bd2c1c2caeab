"""The base of all errors of this project, and the one error of bad input to the spec."""

from __future__ import annotations


class KvconformError(Exception):
    """The base class of every error that kvconform raises on purpose; its text is one sentence."""


class SpecError(KvconformError, ValueError):
    """Says where the input is wrong, what came and what is known.

    ``at`` is the place in dotted form, ``steps[2].op`` for instance.
    """

    def __init__(self, at: str, message: str) -> None:
        super().__init__(f"{at}: {message}" if at else message)
        self.at = at
