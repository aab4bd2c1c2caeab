"""Diagnosis: what a broken subject behaves like, and under which smallest condition. Detection never depends on it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvconform.subject import Subject
from kvconform.visibility import Map
from kvconform_specs.clause import Case
from kvconform_specs.config import Config


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What a subject that broke clauses under one config behaves like.

    named: the id of the class of mistakes (``M1``), empty where none stands out; fault: the planted fault that it
    behaves like; bug: its real-world twin, a link; exactly: whether its outputs are that fault's, within the bounds.
    signature: first bad step, position, row, head or logit, and the smallest condition that separates bad outputs from
    good ones, in words. sentence: all of it in one sentence, with what to do about it.
    """

    named: str = ""
    fault: str = ""
    bug: str = ""
    exactly: bool = False
    signature: str = ""
    sentence: str = ""


def diagnose(subject: Subject, config: Config, cases: Sequence[Case], maps: Sequence[Map]) -> Diagnosis | None:
    """What the subject behaves like, from probes of its own; ``cases`` are the small counterexamples that were found.
    None where no probe shows anything. Raises Death."""
    raise NotImplementedError
