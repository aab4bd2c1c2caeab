"""The base class of adapters to serving engines. It needs only the standard library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvconform_specs.serving.requests import Request

CacheOff = Literal["request", "salt", "second engine", "none"]
"""How an answer without the prefix cache is had: by a parameter of the request; by a salt that no request had before,
which trusts the key of the cache; from a second engine that has no prefix cache; not at all."""


@dataclass(frozen=True, slots=True)
class Description:
    """What an adapter knows of its engine, for the report and for the choice of requests.

    vocabulary: ids are 0 to vocabulary - 1. context: the most tokens of prompt and answer together.
    block: tokens in a block of the prefix cache, None if the engine does not tell.
    alternatives: how many log-probabilities a generated token comes with; 1 is that of the chosen token only.
    reports_hits: whether an answer says how many tokens came from the cache.
    abilities: among ``n``, ``abort``, ``salt``, ``adapter``, ``score``, ``reset``, ``preemptions``, ``concurrent``.
    dtype: of the computation or of the cache, whichever is coarser, as the engine or its user says it; None if unknown.
    refuses_longer: whether the engine has said that it takes no more than ``context``; otherwise that is assumed.
    cache_tokens: how many tokens the prefix cache and all running requests hold together, None if the engine does not
    tell. adapters: their names (ability ``adapter``). assumed: what the adapter has assumed, one sentence each.
    """

    engine: str
    version: str
    model: str
    vocabulary: int
    context: int
    block: int | None = None
    cache_off: CacheOff = "none"
    reports_hits: bool = False
    alternatives: int = 1
    abilities: frozenset[str] = frozenset()
    dtype: str | None = None
    refuses_longer: bool = True
    cache_tokens: int | None = None
    adapters: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated token ids, and for each of them the log-probabilities by token id that the engine returned."""

    ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request.

    cached: prompt tokens that were read from the prefix cache, None if the engine does not tell.
    prompt_logprobs: for each prompt token after the first, the log-probabilities by token id; empty if not asked for.
    prompt_tokens, completion_tokens: as the engine counted them, None if it does not tell.
    seconds_to_first: until the first token arrived, by the caller's clock; None if it was not streamed.
    error: what the engine said when it refused the request; ``completions`` is then empty.
    """

    completions: tuple[Completion, ...] = ()
    cached: int | None = None
    prompt_logprobs: tuple[Mapping[int, float], ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds_to_first: float | None = None
    error: str | None = None


class Engine(ABC):
    """One running serving engine. An adapter maps requests to it, and adds nothing of its own."""

    weights: str = ""
    """The address of the weights that it serves, such as ``hf:DIRECTORY``, where the adapter knows; a second
    reference."""

    @abstractmethod
    def describe(self) -> Description:
        """What is known of the engine; asked once, before the first request."""

    @abstractmethod
    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Sends the requests at the same time and returns their answers in the same order.

        A request that the engine refuses gives an answer with ``error``. Raises ``ConnectionError`` if the engine
        cannot be reached any more.
        """

    def reset(self) -> None:
        """Empties the prefix cache (ability ``reset``)."""
        raise NotImplementedError(f"{type(self).__name__} has no reset")

    def preemptions(self) -> int:
        """How many requests the engine has preempted so far (ability ``preemptions``)."""
        raise NotImplementedError(f"{type(self).__name__} counts no preemptions")

    def source(self) -> str:
        """Python source of ``send(requests)``, for a script that reproduces a failure: of a server, with nothing but
        the standard library.

        ``send`` takes a list of dicts with the fields of ``Request``, sends them at the same time, and returns as many
        dicts in their order: ``completions``, a list of dicts with ``ids`` and ``logprobs`` (a dict by token id for
        each); ``cached``; ``prompt_logprobs``; ``prompt_tokens``, ``completion_tokens`` and ``error``, each None where
        there is none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no source for scripts")

    def reset_source(self) -> str:
        """Python source of ``reset()``, with the ability ``reset``."""
        raise NotImplementedError(f"{type(self).__name__} has no source for scripts")

    def close(self) -> None:  # noqa: B027 (nothing to end by default)
        """Ends what this adapter has started; nothing happens to a server that was there before."""
