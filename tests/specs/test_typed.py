"""Values of another type than a field has are refused with one sentence that says where."""

from __future__ import annotations

from typing import Any

import pytest

from kvconform_specs.config import Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Program

WHOLE = CONFIGS["attention-gqa"].to_json()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_it_was_written(name: str) -> None:
    assert Config.from_json(CONFIGS[name].to_json()) == CONFIGS[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": "4"}, "config.heads: want an integer, got '4'"),
        ({"heads": True}, "config.heads: want an integer, got True"),
        ({"softcap": "x"}, "config.softcap: want a number or null, got 'x'"),
        ({"kv_source": 3}, "config.kv_source: want a list of an integer, got 3"),
        ({"kv_source": [0, None]}, r"config.kv_source: want a list of an integer, got \(0, None\)"),
        ({"dtype": {}}, "config.dtype: want a string, got {}"),
        ({"rotary": 1}, "config.rotary: want an object, got int"),
        ({"rotary": {"kind": "linear"}}, "config.rotary.factor: is missing"),
        ({"rotary": {"kind": "linear", "factor": [], "original": 8}}, r"config.rotary.factor: want a number, got \(\)"),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=f"^{words}$"):
        Config.from_json({**WHOLE, **change})


@pytest.mark.parametrize("missing", ["profile", "heads", "kv_heads", "head_dim"])
def test_a_config_without_a_size_is_refused(missing: str) -> None:
    with pytest.raises(SpecError, match=f"^config.{missing}: is missing$"):
        Config.from_json({name: value for name, value in WHOLE.items() if name != missing})


@pytest.mark.parametrize("steps", [1, None, {}, "append"])
def test_steps_that_are_no_list_are_refused(steps: Any) -> None:
    with pytest.raises(SpecError, match=f"program.steps: want a list, got {type(steps).__name__}"):
        Program.from_json({"config": WHOLE, "steps": steps})
