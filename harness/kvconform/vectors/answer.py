"""Answers a set of vectors with a backend, as any other runner would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvconform.errors import BadArgument, WorkerDied
from kvconform.files import write_atomically
from kvconform.vectors import record
from kvconform.vectors.features import unsupported
from kvconform.vectors.record import Answers, Failure, Manifest, Tensors, Vector
from kvconform.worker.client import WorkerClient
from kvconform.worker.execute import Trace
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.program import Program, Reject


def answered(
    folder: Path, client: WorkerClient, name: str, out: Path, tell: Callable[[Vector], None] = lambda _: None
) -> Answers:
    """Runs a set on a backend and writes its answers. Raises BadArgument where the backend cannot be judged by it."""
    manifest = record.read(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadArgument(
            "ANSWERS", str(out), (), f"{out} exists and is not empty: answers are written to a new folder"
        )
    told = Answers(runner=name, digest=manifest.digest, unsupported=lacking(manifest, client))
    for vector in manifest.vectors:
        if skipped(manifest, vector, told):
            continue
        tensors: Tensors = {}
        programs = record.case_of(manifest, vector).programs
        for number, trace in enumerate(run(manifest, vector, client, told)):
            tensors |= answers(programs[number], trace, number)
        write_atomically(record.file_of(out, vector.name), record.packed(tensors))
        tell(vector)
    told.write(out)
    return told


def lacking(manifest: Manifest, client: WorkerClient) -> dict[str, str]:
    """What the backend does not support. Raises BadArgument where the set holds no numbers that it can be judged by."""
    refuse(client.claims)
    found = unsupported(client.claims)
    for name, one in manifest.configs.items():
        reason = refused(client, Config.from_json(one.config))
        found |= {} if reason is None else {name: reason}
    return found


def refuse(claims: Claims) -> None:
    """Raises BadArgument where expected values of a set are not those of a backend with these claims."""
    if claims.reference == "self":
        raise BadArgument("backend", "", (), "a black box has weights of its own: use kvconform check")
    if claims.kv_bits or claims.cache_dtype:
        kept = f"{claims.kv_bits} bits" if claims.kv_bits else claims.cache_dtype
        raise BadArgument("backend", "", (), f"the set is for caches in the config's dtype; this one keeps {kept}")


def refused(client: WorkerClient, config: Config) -> str | None:
    """Why the backend does not support a config, or None."""
    if config.profile not in client.claims.profiles:
        return f"the {config.profile} profile is not claimed"
    if config.dtype not in client.claims.dtypes:
        return f"{config.dtype} is not claimed"
    try:
        return client.build(config)
    except WorkerDied:
        return None  # each vector fails then, with the reason


def skipped(manifest: Manifest, vector: Vector, told: Answers) -> bool:
    profile = str(manifest.configs[vector.config].config["profile"])
    return not told.unsupported.keys().isdisjoint((profile, vector.config, *vector.needs))


def run(manifest: Manifest, vector: Vector, client: WorkerClient, told: Answers) -> list[Trace]:
    """The traces of a vector's programs, up to the first step that fails, which is noted among the failures."""
    traces: list[Trace] = []
    for number, program in enumerate(record.case_of(manifest, vector).programs):
        try:
            (trace,) = client.run(program, (0,)).apart()
        except WorkerDied as death:
            told.failures[vector.name] = Failure(program=number, step=max(death.step, 0), message=str(death))
            return traces
        traces.append(trace)
        last = trace[-1] if trace else None
        if last is not None and last.error is not None:
            told.failures[vector.name] = Failure(program=number, step=len(trace) - 1, message=str(last.error))
            return traces
    return traces


def answers(program: Program, trace: Trace, number: int) -> Tensors:
    """The tensors of one program's answers."""
    found: Tensors = {}
    for index, (step, done) in enumerate(zip(program.steps, trace, strict=False)):
        if isinstance(step, Reject):
            found[f"{number}.{index}"] = np.array([done.refused is not None], np.uint8)
        elif done.output is not None:
            found[f"{number}.{index}"] = done.output[0]
    return found
