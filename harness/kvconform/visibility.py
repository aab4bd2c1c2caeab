"""Visibility maps: which tokens each output depends on, recovered from outside by changing one token at a time."""

from __future__ import annotations

import msgspec

from kvconform.subject import Subject
from kvconform_specs.config import Config


class Map(msgspec.Struct, frozen=True, kw_only=True):
    """What each of ``n`` tokens' outputs sees of ``n`` tokens under one schedule.

    schedule: ``full`` (the subject's own cache-less forward), ``prefill`` (one append), ``chunked``, ``decode``.
    sizes: the counts of the appends. wanted: a string for each output, a character for each token: ``x`` must be seen,
    ``.`` must not, ``?`` not resolvable: the bounds do not allow to say. seen: ``x`` moved, ``.`` did not.
    stopped: the words of an exception that ended the schedule, whose outputs are then missing in ``seen``.
    """

    schedule: str
    sizes: list[int]
    wanted: list[str]
    seen: list[str]
    stopped: str = ""


def maps(subject: Subject, config: Config) -> list[Map]:
    """The maps of a subject under one config, one for each schedule. Raises Death."""
    raise NotImplementedError
