"""Serving engines on the command line: ``run -b ENGINE``, ``check URL``, and the replay of their counterexamples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from kvconform.cli.options import print_json, say
from kvconform.cli.progress import Progress
from kvconform.errors import BadArgument, UnknownClause
from kvconform.explain import repro
from kvconform.files import write_atomically
from kvconform.judging.mismatch import Mismatch
from kvconform.judging.render import render
from kvconform.results.results import Results
from kvconform.run import check as checks
from kvconform.search.effort import Effort
from kvconform.serving import counterexample
from kvconform.serving import script as scripts
from kvconform.serving.process import opened
from kvconform.serving.registry import BY_CLASS, addressed, check_host, is_url, of_directory, referenced, split
from kvconform.serving.replay import replayed
from kvconform.serving.run import run_engine
from kvconform.serving.session import Limits
from kvconform_specs.serving.clauses import BY_NAME

Requests = Annotated[
    int, typer.Option("--max-requests", min=1, help="Of a serving engine: the most requests that are sent to it.")
]
Seconds = Annotated[
    float, typer.Option("--max-seconds", min=1, help="Of a serving engine: after so many seconds nothing new is sent.")
]
Concurrent = Annotated[
    int, typer.Option("--concurrent", min=1, help="Of a serving engine: the most requests at the same time.")
]
AllowRemote = Annotated[
    bool, typer.Option("--allow-remote", help="Allow a URL that leads to another machine; its owner should know.")
]
ModelDirectory = Annotated[
    str,
    typer.Option(
        "--model",
        help="Of a serving engine: the transformers directory that it serves; answers are compared with it as well.",
    ),
]
EngineName = Annotated[
    str, typer.Option("--engine", help="What serves at a URL, if it does not tell: vllm, llama.cpp, mlx-lm, openai...")
]


FAMILY = counterexample.SCHEMA.partition("/")[0]


def judge(
    target: str,
    options: dict[str, Any],
    effort: Effort,
    seed: int,
    out: Path,
    bounds: Limits,
    *,
    clauses: Sequence[str] = (),
    model: str = "",
    allow_remote: bool = False,
    quiet: bool = False,
) -> Results:
    """Judges an engine and prints what it found. ``model``: the weights that it serves, as a directory of transformers
    or the address of a target."""
    if is_url(target):
        check_host(target, allow_remote)
    if model:
        options = {**options, "reference": weights(model)}
    address, name = addressed(target, options), name_of(target)
    with Progress(name, out, quiet=quiet) as progress:
        results = run_engine(name, address, effort, seed, out, bounds, clauses, progress.tell, progress.begin)
    if not quiet:
        for line in lines(results, out):
            say(line)
    return results


def weights(model: str) -> str:
    """The address of the weights: of a directory, that of transformers. Raises BadArgument for what is neither."""
    if Path(model).is_dir():
        return of_directory(Path(model))
    if ":" not in model:
        words = f"--model: no directory {model}; want one of transformers, or the address of a target"
        raise BadArgument("model", model, sentence=words)
    return model


def replay(file: Path, backend: str, script: Path | None, allow_remote: bool, as_json: bool) -> int:
    """Runs a counterexample of an engine again; 1 if it still fails."""
    found = counterexample.read(file)
    if found.clause not in BY_NAME:
        raise UnknownClause("clause", found.clause, BY_NAME, f"{file}: no clause named {found.clause!r}")
    address = backend or found.engine
    if is_url(address):
        check_host(address, allow_remote)
    mismatch = replayed(found, address, Limits())
    sentence = f"holds now; the file says: {found.sentence}" if mismatch is None else render(mismatch)
    lines = [f"{found.clause} on {split(address)[0]}: {sentence}"]
    if script is not None and mismatch is not None:
        lines.append(f"  script: {_written(script, found, mismatch, address)}")
    if as_json:
        print_json({"clause": found.clause, "backend": address, "broken": mismatch is not None, "sentence": sentence})
    else:
        for line in lines:
            say(line)
    return int(mismatch is not None)


def _written(script: Path, found: counterexample.ServingCounterexample, mismatch: Mismatch, address: str) -> str:
    address, model = referenced(address)
    engine = opened(address)
    try:
        made = scripts.script(found, mismatch, engine, model or referenced(found.engine)[1] or engine.weights)
        write_atomically(script, made.encode())
        return repro.tried(script, sys.executable)  # while a server that was started for it is there
    except NotImplementedError as error:
        return f"none: {error}"
    finally:
        engine.close()


def name_of(target: str) -> str:
    """A short name for an engine's results: host and port of a URL, else the last word of its address."""
    target = split(target)[0]
    if is_url(target):
        parts = urlsplit(target)
        return f"{parts.hostname}-{parts.port or parts.scheme}"
    return target.removeprefix(BY_CLASS).rpartition(":")[2] or target


def lines(results: Results, out: Path) -> Sequence[str]:
    """The end of the report on an engine: the failure to read first, the verdict, and what stands beside it."""
    found = [*checks.foremost(results), f"{results.backend}: {results.summary}"]
    if results.verdicts and results.served is not None:
        served = results.served
        found.append(
            f"  {checks.counted(results.counts)}; {served.requests} requests in {results.seconds:.0f} s, "
            f"{served.hits} answers from the cache, {served.preemptions} preemptions; {out / results.backend}.json"
        )
        found += checks.first_tokens(served)
        for guarantee in results.guarantees.values():
            held = guarantee.level or "none"
            refuted = f"; refuted: {guarantee.refuted}: {guarantee.sentence}" if guarantee.refuted else ""
            found.append(f"  guarantee: {held}{refuted}")
        found += checks.undecided(results)
    return found
