"""The files of a set of vectors: its manifest, and what a runner says about its answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from kvconform.files import read_versioned, write_versioned
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError

SCHEMA = "kvconform-vectors/1"
ANSWERS_SCHEMA = "kvconform-answers/1"
MANIFEST, ANSWERS = "manifest.json", "answers.json"
Tensors = dict[str, NDArray[Any]]


class VectorStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a program."""

    call: dict[str, Any]
    """What is called: `op`, `seq`, and the fields of that operation that do not have their default."""
    tensors: dict[str, str] = {}
    """By role (`query`, `key`, `value`, `token ids`, `mask`; `expected`, `bound`), the name of the tensor in the
    vector's file."""


class Vector(msgspec.Struct, frozen=True, kw_only=True):
    """Programs that are run one after another, each from an empty cache, and judged together."""

    name: str
    """Name of the vector; its tensors are in `<name>.safetensors`, and so are the answers to it."""
    clause: str
    """Name of the clause that it tests."""
    config: str
    """Name of the config."""
    needs: list[str]
    """The features that a runner must have for it."""
    flags: list[str]
    """What is special about it, in words: an append of the first program or of another one has it."""
    programs: list[list[VectorStep]]
    """The steps of each program, in order."""
    sha256: str
    """Hexadecimal digest of the vector's file."""


class VectorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and semantics of a layer or a decoder."""

    config: dict[str, Any]
    """The fields of the config."""
    weights: str = ""
    """Name of the file with the decoder's weights; empty for an attention layer."""
    sha256: str = ""
    """Hexadecimal digest of the file with the weights."""


class VectorClause(msgspec.Struct, frozen=True, kw_only=True):
    """A clause that has vectors."""

    text: str
    """The normative sentence."""
    why: list[str]
    """Links to the bugs that it stops."""
    relations: list[str]
    """The relations that answers are judged by."""
    not_judged: list[str]
    """The relations of the clause that outputs do not show."""


class Manifest(msgspec.Struct, kw_only=True):
    """What a set of vectors holds."""

    schema: str = SCHEMA
    """The name and version of this schema."""
    suite: str
    """The version of the clauses."""
    digest: str
    """Hexadecimal digest of the vectors; answers repeat it."""
    seed: int
    """The seed that programs were drawn with."""
    cases: int
    """How many cases were asked for of each cell."""
    dtypes: list[str]
    """The dtypes of the configs."""
    asked: dict[str, list[str]]
    """The prefixes of clauses and configs that were selected; empty lists for the core set."""
    versions: dict[str, str]
    """The versions of what the programs depend on."""
    features: dict[str, str]
    """The features that vectors need, and what each means."""
    clauses: dict[str, VectorClause]
    """The clauses that have vectors, by name."""
    left_out: dict[str, str]
    """The clauses that have none, and why."""
    configs: dict[str, VectorConfig]
    """The configs, by name."""
    vectors: list[Vector]
    """The vectors, in the order in which they are run."""

    def write(self, folder: Path) -> None:
        write_versioned(folder / MANIFEST, self)

    @property
    def skippable(self) -> set[str]:
        """What answers may declare as unsupported."""
        profiles = {str(one.config["profile"]) for one in self.configs.values()}
        return {*self.features, *self.configs, *profiles}


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A step that a runner could not do."""

    program: int
    """Index of the program in the vector, from 0."""
    step: int
    """Index of the step in the program, from 0."""
    message: str
    """What went wrong, in one sentence."""


class Answers(msgspec.Struct, kw_only=True):
    """What a runner says about its answers."""

    schema: str = ANSWERS_SCHEMA
    """The name and version of this schema."""
    runner: str
    """Name of the runner, and of what it ran; results are named after it."""
    digest: str
    """The digest in the manifest of the set that was answered."""
    unsupported: dict[str, str] = {}
    """The features, configs and profiles that are not supported, each with the reason. Vectors that need one of them
    are skipped; every other vector needs an answer."""
    failures: dict[str, Failure] = {}
    """By the name of the vector, the step that could not be done; its file holds the answers of the steps before."""

    def write(self, folder: Path) -> None:
        write_versioned(folder / ANSWERS, self)


def read(folder: Path) -> Manifest:
    """The manifest of a set. Raises SpecError with one sentence where the folder holds none."""
    return read_versioned(folder / MANIFEST, Manifest, SCHEMA, "set of vectors")


def read_answers(folder: Path) -> Answers:
    """Raises SpecError with one sentence where the folder holds no answers."""
    return read_versioned(folder / ANSWERS, Answers, ANSWERS_SCHEMA, "answers")


def case_of(manifest: Manifest, vector: Vector) -> Case:
    """The programs of a vector. Raises SpecError where they are not legal."""
    config = manifest.configs[vector.config].config
    programs = [{"config": config, "steps": [step.call for step in program]} for program in vector.programs]
    return Case.from_json(programs, vector.name)


def config_of(manifest: Manifest, vector: Vector) -> Config:
    return Config.from_json(manifest.configs[vector.config].config, vector.config)


# --- tensors ---
def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def packed(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of a safetensors file: the same tensors give the same bytes."""
    return safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())})


def unpacked(path: Path, digest: str = "") -> Tensors:
    """The tensors in a file. Raises SpecError where it cannot be read, or has another digest."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SpecError(str(path), f"cannot be read: {error.strerror or error}") from error
    if digest and sha256(data) != digest:
        raise SpecError(str(path), "is not the file that the manifest describes: its digest differs")
    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SpecError(str(path), f"is no safetensors file that numpy can read: {error}") from error


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of(vectors: Sequence[Vector], configs: Mapping[str, VectorConfig]) -> str:
    """16 hexadecimal digits."""
    return sha256(msgspec.json.encode([list(vectors), dict(configs)], order="sorted"))[:16]
