"""Writes a set of vectors: a manifest, and one file of tensors for each vector and for the weights of each config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.errors import BadArgument
from kvconform.files import write_atomically
from kvconform.run.run import Plan, cells
from kvconform.search.cell import Cell
from kvconform.vectors import record
from kvconform.vectors.choose import WIDE, cases
from kvconform.vectors.features import FEATURES, features, judged, left_out
from kvconform.vectors.flags import flags
from kvconform.vectors.record import Manifest, Vector, VectorClause, VectorConfig, VectorStep
from kvconform.worker.execute import INPUTS, feeds_of
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case, Level, short
from kvconform_specs.clauses import ALL
from kvconform_specs.config import Config
from kvconform_specs.configs import share
from kvconform_specs.program import Append, Program, Reject, step_to_json
from kvconform_specs.reference.oracle import Expected, Generation, expect
from kvconform_specs.tensors import malformed, weights

Array = NDArray[Any]
VARIED = ("definition", "window")
"""The chapters about what configs vary."""
CASES = 1
"""How many cases of a cell the core set has, for each of its claims."""


@dataclass
class Tensors:
    """The tensors of one vector's file; equal ones are stored once."""

    stored: dict[str, Array]
    names: dict[tuple[str, tuple[int, ...], bytes], str]

    def add(self, name: str, array: Array) -> str:
        """The name under which it is stored."""
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.names:
            self.names[key], self.stored[name] = name, array
        return self.names[key]


def write(
    folder: Path, plan: Plan, number: int = CASES, tell: Callable[[Vector, int], None] = lambda vector, size: None
) -> Manifest:
    """Writes the set of the cells that a plan selects; without a selection of clauses and configs, the core set.

    tell: is called with each vector and the bytes of its file. Raises BadArgument where the folder holds something, or
    where outputs show nothing of the selected clauses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadArgument("DIR", str(folder), (), f"{folder} exists and is not empty: a set is written to a new folder")
    chosen = [cell for cell in cells(plan) if _selected(cell, plan)]
    if not chosen:
        asked = [clause for clause in ALL if plan.clauses and clause.name.startswith(plan.clauses)]
        reasons = "; ".join(f"{clause.name}: {left_out(clause)}" for clause in asked if left_out(clause))
        raise BadArgument("clause", plan.clauses, (), f"no vectors of the selected clauses: {reasons or 'no cell'}")
    vectors, configs = [], dict[str, VectorConfig]()
    for cell in chosen:
        if cell.config_name not in configs:
            configs[cell.config_name] = _config(folder, cell.config_name, cell.config)
        for count, case in enumerate(cases(cell, number, plan.seed)):
            vector, data = _vector(f"{cell.config_name}/{cell.clause.name}-{count}", cell, case)
            write_atomically(record.file_of(folder, vector.name), data)
            vectors.append(vector)
            tell(vector, len(data))
    names = dict.fromkeys(vector.clause for vector in vectors)
    manifest = Manifest(
        suite=SUITE_VERSION,
        digest=record.digest_of(vectors, configs),
        seed=plan.seed,
        cases=number,
        dtypes=list(plan.dtypes),
        asked={"clauses": list(plan.clauses), "configs": list(plan.configs)},
        versions={"hypothesis": version("hypothesis")},
        features=FEATURES,
        clauses={clause.name: _clause(clause) for clause in ALL if clause.name in names},
        left_out={clause.name: _why_none(clause) for clause in ALL if clause.name not in names},
        configs=configs,
        vectors=vectors,
    )
    manifest.write(folder)
    return manifest


def _selected(cell: Cell, plan: Plan) -> bool:
    """Whether a cell has vectors.

    A set that selects clauses or configs by name holds all of these that it can. The core set has no guarantees and no
    long contexts. Of configs whose share of an effort is small it has the core clauses, and those about what they vary.
    """
    if left_out(cell.clause):
        return False
    if plan.clauses or plan.configs:
        return (cell.clause.level is Level.MUST or bool(plan.clauses)) and (short(cell.config) or bool(plan.configs))
    varied = cell.clause.core or cell.clause.chapter in VARIED
    return cell.clause.level is Level.MUST and short(cell.config) and (share(cell.config_name) == 1 or varied)


def _why_none(clause: Any) -> str:
    if why := left_out(clause):
        return why
    if clause.level is Level.SHOULD:
        return "it is a guarantee, which is not required; --clause selects it"
    return "not selected, or about long contexts alone: --config selects them"


def _clause(clause: Any) -> VectorClause:
    kept = judged(clause)
    others = [relation.name for relation in clause.relations if relation.name not in kept]
    return VectorClause(text=clause.text, why=list(clause.why), relations=kept, not_judged=others)


def _config(folder: Path, name: str, config: Config) -> VectorConfig:
    body = config.to_json()
    if config.profile != "decoder":
        return VectorConfig(config=body)
    data = record.packed(weights(config))
    write_atomically(record.file_of(folder, f"{name}/weights"), data)
    return VectorConfig(config=body, weights=f"{name}/weights.safetensors", sha256=record.sha256(data))


def _vector(name: str, cell: Cell, case: Case) -> tuple[Vector, bytes]:
    tensors = Tensors({}, {})
    needs = set(cell.clause.needs).union(*map(features, case.programs)) & FEATURES.keys()
    programs = [_steps(program, number, tensors) for number, program in enumerate(case.programs)]
    data = record.packed(tensors.stored)
    vector = Vector(
        name=name,
        clause=cell.clause.name,
        config=cell.config_name,
        needs=sorted(needs, key=list(FEATURES).index),
        flags=flags(case, WIDE),
        programs=programs,
        sha256=record.sha256(data),
    )
    return vector, data


def _steps(program: Program, number: int, tensors: Tensors) -> list[VectorStep]:
    feeds, wants, made = feeds_of(program, (0,)), expect(program, (0,)), []
    for index, (step, feed, want) in enumerate(zip(program.steps, feeds, wants, strict=True)):
        roles = {**_inputs(program, step, *feed), **(expected(program.config, want) if want is not None else {})}
        stored = {role: tensors.add(f"{number}.{index}.{role}", x) for role, x in roles.items()}
        made.append(VectorStep(call=step_to_json(step), tensors=stored))
    return made


def _inputs(program: Program, step: Any, given: Sequence[Array], keywords: dict[str, Any]) -> dict[str, Array]:
    """What a step is given, by role."""
    arrays = tuple(x[0] for x in given)
    if isinstance(step, Reject) and isinstance(step.step, Append) and step.wrong:
        arrays = malformed(arrays, step.wrong, program.config)
    roles = dict(zip(INPUTS[program.config.profile], arrays, strict=True)) if arrays else {}
    return roles | ({"mask": keywords["mask"]} if "mask" in keywords else {})


def expected(config: Config, want: Expected) -> dict[str, Array]:
    """Value and bound of a step's output in the shape of an answer; of a generation the tokens."""
    if isinstance(want, Generation):
        return {}
    value, bound = want.value[0], want.bound[0]
    value = np.where(want.real[..., None], value, np.nan)
    return {"expected": headed(config, value), "bound": headed(config, upwards(bound))}


def headed(config: Config, x: Array) -> Array:
    """``(b, t, h * d)`` as ``(b, h, t, d)`` in the attention profile, else ``x``."""
    if config.profile != "attention":
        return np.ascontiguousarray(x)
    b, t, _e = x.shape
    return np.ascontiguousarray(x.reshape(b, t, config.heads, config.head_dim).swapaxes(1, 2))


def upwards(bound: Array) -> Array:
    """A bound in float32 that is at least the bound."""
    single = bound.astype(np.float32)
    return np.where(single < bound, np.nextafter(single, np.float32(np.inf)), single)


def counted(manifest: Manifest) -> Iterator[str]:
    """What a set holds, in lines."""
    by_profile = Counter(str(manifest.configs[one.config].config["profile"]) for one in manifest.vectors)
    of = ", ".join(f"{count} of the {profile} profile" for profile, count in sorted(by_profile.items()))
    yield f"{len(manifest.vectors)} vectors ({of}): {len(manifest.clauses)} clauses, {len(manifest.configs)} configs"
    yield f"clauses without vectors: {len(manifest.left_out)} (manifest.json gives the reasons)"
