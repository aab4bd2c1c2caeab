"""Requests to a serving engine, as frozen data: token ids in, and what the server shall do with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One request. Decoding is greedy.

    prompt: token ids, at least one.
    tokens: how many tokens to generate, at least 1; a stop token does not end the answer.
    cached: False asks for an answer that reads nothing from the prefix cache, by whatever means the engine has.
    n: completions of this prompt, all greedy.
    abort_after: the client closes the connection after this many tokens; None: it reads to the end.
    salt, adapter: parts of the key of the prefix cache besides the tokens; None: not sent.
    score: also return the log-probabilities of the prompt's own tokens, where the engine has them.
    """

    prompt: tuple[int, ...]
    tokens: int = 1
    cached: bool = True
    n: int = 1
    abort_after: int | None = None
    salt: str | None = None
    adapter: str | None = None
    score: bool = False
