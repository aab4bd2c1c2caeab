"""One decoder in many spellings: each is recognised and right, and a mistake in it is still found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess, broken
from places import SUPPORT

from kvconform.errors import BackendUnavailable
from kvconform.worker.registry import load
from kvconform_specs.program import Append, Program, Reset, Truncate

torch = pytest.importorskip("torch", reason="modules are torch's")

from kvconform_backends.targets.module import target as module  # noqa: E402

pytestmark = pytest.mark.xdist_group("modules")

FILE, FAULTY = SUPPORT / "module_spellings.py", SUPPORT / "faulty_spellings.py"
ASKED = (
    "shape.output",
    "shape.length",
    "causality.past-seen",
    "equivalence.decode",
    "equivalence.chunks",
    "equivalence.path",
    "lifecycle.reset",
    "lifecycle.truncate",
    "lifecycle.independent",
    "batch.row-solo",
    "batch.ragged",
    "capacity.overflow",
    "memory.inputs-unchanged",
)
SPELLINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "PositionalPast": ("module(x, past)", {}),
    "ReturnDict": ("module(x, past_key_values=past, use_cache=True)", {}),
    "RequiredReturnDict": ("return_dict=True)", {}),
    "ListOfDicts": ("caches passed and returned as a list of 2", {}),
    "DictByLayer": ("a dict of 0, 1", {}),
    "OneTensor": ("as one array", {}),
    "EmptyTensor": ("as one array", {}),
    "NamedPairs": ("a list of 2 (key, value) pairs", {}),
    "KeysTransposed": ("a list of 2 (key, value) pairs", {}),
    "SeqFirst": ("module(x, past=past)", {}),
    "LastLogits": ("module(x, past=past)", {"returns": "last"}),
    "WholeSequence": ("module(sofar, past=past)", {}),
    "WholeSequenceLast": ("module(sofar, past=past)", {"returns": "last"}),
    "GrowingMask": ("attention_mask=torch.ones(batch, cached + new, dtype=torch.long)", {}),
    "PositionIds": ("position_ids=torch.arange(cached, cached + new)", {"overflow": "refused"}),
    "OwnPositions": ("module(x, past=past)", {"overflow": "refused"}),
    "Six": ("module(x, past=past)", {"overflow": "refused", "max_chunk": None}),
    "Ten": ("module(x, past=past)", {"overflow": "refused"}),
    "Seventeen": ("module(x, past=past)", {"overflow": "refused"}),
    "OneRow": ("module(x, past=past)", {"max_batch": 1}),
    "OneRowWithPast": ("module(x, past=past)", {"max_batch": 1, "max_chunk": None}),
    "ChunkOfOne": ("module(x, past=past)", {"max_batch": None, "max_chunk": None}),
    "ChunkOfSix": ("module(x, past=past, use_cache=True)", {"max_chunk": 6}),
    "ListInPlace": ("modified in place, a list of 2 (key, value) pairs", {}),
    "CacheWithUpdate": ("an object of class Cache,", {}),
    "WithCrop": ("an object of class CroppableCache,", {}),
    "WithRollback": ("an object of class RollbackCache,", {}),
    "Buffers": ("module(x, start_pos=cached)", {"max_batch": 4, "overflow": "refused"}),
    "CachePosition": ("cache_position=torch.arange(cached, cached + new)", {"max_batch": 4}),
    "Owned": ("emptied by module.reset_cache()", {"max_sequences": 1}),
    "WithLock": ("emptied by module.reset_cache()", {}),
    "WithNonLeaf": ("emptied by module.reset_cache()", {}),
    "PastAndCounter": ("module(x, past=past, use_cache=True)", {"max_sequences": 1}),
    "Ragged": ("module(x, cache=past)", {"ragged_appends": "any"}),
    "Engine": ("module(x, cache=past)", {}),
    "closure": ("module(x, start_pos=cached)", {}),
    "Lambdas": ("module(x, past=past)", {}),
}
"""Part of how each is called, and claims."""
CAPACITIES = {"Six": 6, "Ten": 10, "Seventeen": 17, "Buffers": 21, "OwnPositions": 33, "ChunkOfSix": 40}
WRONG: Mapping[str, str] = {
    "CropsOneLayer": "lifecycle.truncate",
    "CropsWrongValues": "lifecycle.truncate",
    "RollsBackNothing": "lifecycle.truncate",
    "PaddingSeen": "batch.ragged",
    "SixDropsOldest": "equivalence.chunks",
    "OneDropsOldest": "equivalence.decode",
    "SeqFirstSharesRow": "batch.row-solo",
    "WholeForgets": "equivalence.decode",
    "SilentOverflow": "capacity.overflow",
}
"""A clause that each breaks."""


def opened(name: str, file: Path = FILE, **options: Any) -> Any:
    return module.open_module(f"{file}:{name}", options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_recognised_and_breaks_no_clause(name: str) -> None:
    words, claims = SPELLINGS[name]
    target = opened(name)
    assert words in target.recognised
    assert {claim: getattr(target.claims, claim) for claim in claims} == claims
    assert broken(target, ASKED, 3) == {}


def test_every_spelling_of_the_file_is_tried() -> None:
    shared = {"Core", "Placed", "Pair", "Cache", "CroppableCache", "RollbackCache", "Output"}
    assert set(re.findall(r"^(?:class|def) (\w+)", FILE.read_text(), re.MULTILINE)) == {*SPELLINGS, *shared}


@pytest.mark.parametrize("name", CAPACITIES)
def test_the_capacity_is_what_a_sequence_takes_and_not_what_one_call_takes(name: str) -> None:
    (config,) = opened(name).configs.values()
    assert config.capacity == CAPACITIES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_still_found(name: str) -> None:
    assert WRONG[name] in broken(opened(name, FAULTY), ASKED, 12)


def test_truncations_and_row_lengths_of_the_target_are_found_and_leave_what_is_not_tried() -> None:
    crop, back, ragged = (opened(name) for name in ("WithCrop", "WithRollback", "Ragged"))
    assert crop.found.convention.truncate == "past.crop(length)"
    assert back.found.convention.truncate == "past.rollback(cached - length)"
    assert ragged.found.convention.ragged == "module(x, cache=past, lengths=torch.tensor(counts, device=x.device))"
    assert crop.not_tried == back.not_tried == ragged.not_tried == ()
    assert crop.claims.can("truncate")
    assert ragged.claims.can("ragged")


def test_a_lossy_cache_has_a_bound_if_it_is_claimed_from_outside() -> None:
    claims = json.dumps({"claims": {"kv_bits": 8}})
    right, wrong = f"py:{FAULTY}:Int8", f"py:{FAULTY}:Int8WrongScale"
    asked = ("equivalence.decode", "equivalence.chunks", "batch.row-solo")
    assert "equivalence.decode" in broken(load(right), asked)
    target = load(f"{right}?{claims}")
    assert broken(target, asked, 9) == {}
    assert target.assumed[-1] == "it is claimed from outside: kv_bits=8"
    assert "equivalence.decode" in broken(load(f"{wrong}?{claims}"), asked, 9)


REFUSED = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

class Offset(Base):  # wants a position that counts from one, in a table of its own
    def forward(self, ids, past=None, ledger=None):
        if past is not None and ledger is None:
            raise KeyError("the ledger of this sequence")
        x = self.embed(ids)
        x = x if past is None else torch.cat([past, x], 1)
        y = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.head(y[:, -ids.shape[1]:]), x

class Odd(Base):
    def forward(self, ids, cache, slot):
        return self.head(self.embed(ids)), cache

class Late(Base):
    def forward(self, ids, past_key_values=None):
        hidden = self.embed(ids)
        if hidden.shape[0] > 0:
            raise RuntimeError("set HOME_OF_TABLES first")
"""


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("Offset", "none after it; the next raised KeyError: 'the ledger of this sequence'", "module(x, past=past)"),
        ("Odd", "whose required parameter 'slot' is unknown", "module(x, cache=past, slot=...)"),
        ("Late", "came furthest raised RuntimeError: set HOME_OF_TABLES", "module(x, past_key_values=past)"),
    ],
)
def test_where_nothing_agreed_the_refusal_asks_for_the_call_with_a_line_that_fits(
    tmp_path: Path, name: str, words: str, line: str
) -> None:
    file = tmp_path / "refused.py"
    file.write_text(REFUSED)
    with pytest.raises(BackendUnavailable) as caught:
        opened(name, file)
    told = str(caught.value)
    assert "not judged" in told
    assert words in told
    found = re.search(r"--option 'convention=(\{.*?\})'", told)
    assert found is not None
    assert json.loads(found[1])["call"] == line
    assert "--claim max_chunk=6" in told


def test_the_line_of_a_refusal_is_enough_once_it_is_completed(tmp_path: Path) -> None:
    file = tmp_path / "refused.py"
    file.write_text(REFUSED)
    target = opened("Offset", file, convention={"call": "module(x, past, {})"})
    assert target.found.convention.present == "out[1]"
    assert broken(target, ("equivalence.decode", "equivalence.chunks", "lifecycle.reset")) == {}


# --- scripts ---
SCRIPTED = (
    "SeqFirst",
    "WholeSequence",
    "WithCrop",
    "WithRollback",
    "Ragged",
    "ChunkOfOne",
    "WithLock",
    "PastAndCounter",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTED)
def test_a_script_makes_the_same_calls(name: str, tmp_path: Path) -> None:
    import numpy as np

    from kvconform.worker.execute import execute, feeds_of

    client = InProcess(opened(name))
    claims, chunk = client.claims, client.claims.max_chunk or 3
    cut = (Truncate("a", 1), Append("a", (1, 1), 4)) * claims.can("truncate")
    uneven = (Append("a", (2, 1), 5),) * claims.can("ragged")
    reset = (Reset("a"), Append("a", (1, 1), 6))
    program = Program(client.config, (Append("a", (chunk,) * 2, 1), Append("a", (1, 1), 2), *cut, *uneven, *reset))
    outputs = execute(client.backend, program, (0,))
    steps = [number for number, step in enumerate(program.steps) if isinstance(step, Append)]
    lines = ["import numpy as np", client.backend.script_setup()]
    for number in steps:
        lines.append(f"xa{number} = np.array({feeds_of(program, (0,))[number][0][0][0].tolist()})")
    lines += [client.backend.script(program, "a")]
    lines += [f"np.save({str(tmp_path / str(number))!r}, ya{number})" for number in steps]
    file = tmp_path / "script.py"
    file.write_text("\n".join(lines))
    command = [sys.executable, str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for number in steps:
        got = np.load(tmp_path / f"{number}.npy")
        step = program.steps[number]
        assert isinstance(step, Append)
        for row, count in enumerate(step.counts):
            want = outputs[0][number].output[row, :count]
            assert np.allclose(got[row, :count], want, atol=1e-5)
