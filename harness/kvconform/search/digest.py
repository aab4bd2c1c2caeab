"""A digest of the programs that a cell plans: equal digests mean equal inputs.

It covers every case that the clause's strategy draws for the cell, and the variants of the seeds. It depends on the
clause, the config, the claims, the seed, the effort and Hypothesis' version; not on what the backend does with the
programs, where a search stops, or how fast the machine is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from kvconform_specs.clause import Case


def digest(cases: Sequence[Case], variants: Sequence[int]) -> str:
    """16 hexadecimal digits."""
    found = hashlib.sha256(msgspec.json.encode(list(variants)))
    for case in cases:
        found.update(msgspec.json.encode(case.to_json(), order="sorted"))
    return found.hexdigest()[:16]
