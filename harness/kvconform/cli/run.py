"""``kvconform run``, ``check`` and ``replay``: the commands that judge."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer

from kvconform.api import file_name
from kvconform.cli import serving
from kvconform.cli.options import (
    Backends,
    Device,
    Dtypes,
    EffortName,
    Jobs,
    Json,
    Junit,
    On,
    Out,
    Pythons,
    Quiet,
    Seed,
    StartMethod,
    StepTimeout,
    launches,
    print_json,
    say,
    worst,
)
from kvconform.cli.progress import Progress
from kvconform.errors import BadArgument, UnknownClause
from kvconform.explain import repro
from kvconform.files import family_of, write_atomically
from kvconform.fleet import costs_of, executor
from kvconform.fleet.units import divided
from kvconform.judging.render import render
from kvconform.results.known_failures import EMPTY
from kvconform.results.known_failures import read as read_known_failures
from kvconform.results.results import Results
from kvconform.run import check as checks
from kvconform.run.run import Plan, path_of, plan_for, run_backend
from kvconform.search import counterexample as counterexamples
from kvconform.search.effort import CHECK, DEFAULT_EFFORT, EFFORTS, effort_named
from kvconform.serving.registry import is_engine
from kvconform.serving.session import Limits
from kvconform.worker.client import STEP_TIMEOUT, WorkerClient, WorkerSpec
from kvconform.worker.start import FORK
from kvconform_specs.clause import Case
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.program import Program


def run(
    backend: Backends,
    device: Device = "cpu",
    dtype: Dtypes = ["float32"],  # noqa: B006
    effort: EffortName = DEFAULT_EFFORT,
    seed: Seed = 0,
    out: Out = Path("results"),
    clause: Annotated[
        list[str], typer.Option(help="Only clauses whose name starts with this prefix. May be repeated.")
    ] = [],  # noqa: B006
    config: Annotated[
        list[str], typer.Option(help="Only configs whose name starts with this prefix. May be repeated.")
    ] = [],  # noqa: B006
    python: Pythons = [],  # noqa: B006
    step_timeout: StepTimeout = STEP_TIMEOUT,
    start_method: StartMethod = FORK,
    known_failures: Annotated[Path | None, typer.Option(help="A TOML file of known failures.")] = None,
    shard: Annotated[str, typer.Option(help="Only part i of n of the cells, as i/n: whole configs.")] = "",
    jobs: Jobs = 1,
    junit: Junit = None,
    quiet: Quiet = False,
    on: On = "",
    store: Annotated[
        str, typer.Option(help="A folder or fsspec URL for units of work: what it holds is not judged again.")
    ] = "",
    unit_seconds: Annotated[
        float, typer.Option(min=1, help="With --on: divide configs that took longer in an earlier run into slices.")
    ] = 300,
    runtime_env: Annotated[Path | None, typer.Option(help="With --on: a JSON file, Ray's runtime_env.")] = None,
    max_requests: serving.Requests = Limits.requests,
    max_seconds: serving.Seconds = Limits.seconds,
    concurrent: serving.Concurrent = Limits.together,
    model: serving.ModelDirectory = "",
    as_json: Json = False,
) -> None:
    """Judges backends by every clause. Writes OUT/<backend>.json, and a counterexample for each failure.

    An interrupted run is resumed. With several backends, the most severe exit code counts. A shard writes to
    OUT/shards, for kvconform merge. A shard, or a part that --clause or --config select, does not decide conformance:
    the exit code is 0 if each selected core clause passed and nothing failed.
    """
    known = EMPTY if known_failures is None else read_known_failures(known_failures)
    found = []
    engines = [address for address in backend if is_engine(address)]
    for address in engines:
        name = serving.name_of(address)
        if name in {key[0] for key in known.known}:
            words = f"--known-failures: {name} is a serving engine: kvconform gate compares it with a baseline"
            raise BadArgument("known failures", address, sentence=words)
        limits = Limits(max_requests, max_seconds, concurrent)
        named, quietly = effort_named(effort), quiet or as_json
        judged = serving.judge(address, {}, named, seed, out, limits, clauses=clause, model=model, quiet=quietly)
        found.append(judged)
    if len(engines) == len(backend):
        _end(found, as_json, junit)
    backend = [address for address in backend if address not in engines]
    plan = plan_for(effort, seed, dtype, clause, config, shard, explain=True)
    where = executor(jobs, on, store, runtime_env)
    for name, spec in launches(backend, device, python, step_timeout, start_method).items():
        with Progress(name, out, quiet=quiet or as_json) as progress:
            execute = divided(where, costs_of(path_of(name, plan, out)), unit_seconds) if on else where
            told = progress.tell, known, progress.begin, execute, progress.running
            results = run_backend(name, spec, plan, out, *told)
        found.append(results)
        if quiet and not as_json:
            say(f"{name}: {results.summary}")
        elif not as_json:
            _print_results(results, path_of(name, plan, out))
    _end(found, as_json, junit)


def _end(found: list[Results], as_json: bool, junit: Path | None = None) -> NoReturn:
    if as_json:
        print_json(found)
    if junit is not None:
        from kvconform_reports import junit as junit_reports

        write_atomically(junit, junit_reports.render(found).encode())
    raise typer.Exit(worst([results.exit_code for results in found]))


def check(
    target: Annotated[str, typer.Argument(help=f"What to judge: {checks.FORMS}.")],
    init: Annotated[str, typer.Option(help="Keyword arguments of the class or factory, as JSON.")] = "",
    option: Annotated[list[str], typer.Option(help=checks.OPTION_HELP)] = [],  # noqa: B006
    claim: Annotated[list[str], typer.Option(help=checks.CLAIM_HELP)] = [],  # noqa: B006
    reference: Annotated[str, typer.Option(help=checks.REFERENCE_HELP)] = "",
    device: Device = "cpu",
    effort: Annotated[
        str, typer.Option(help=f"How much to try: {', '.join(EFFORTS)}. Default: less than smoke, in under a minute.")
    ] = "",
    seed: Seed = 0,
    out: Out = Path("results/check"),
    python: Annotated[str, typer.Option(help="The interpreter of the workers.")] = sys.executable,
    step_timeout: StepTimeout = STEP_TIMEOUT,
    start_method: StartMethod = FORK,
    quiet: Quiet = False,
    engine: serving.EngineName = "",
    max_requests: serving.Requests = Limits.requests,
    max_seconds: serving.Seconds = Limits.seconds,
    concurrent: serving.Concurrent = Limits.together,
    model: serving.ModelDirectory = "",
    allow_remote: serving.AllowRemote = False,
    as_json: Json = False,
) -> None:
    """Judges a target without an adapter.

    Detects the calling convention, prints its assumptions, and uses the target's own uncached forward as the reference,
    after testing that forward, or that of another artefact with the same weights (--reference). Prints what is broken,
    which known mistake it behaves like, and which tokens its outputs depend on. Where no way of calling it agrees with
    that forward, it is not judged: the exit code is 3, and the message shows the option to give. Anything else is a
    class with the methods of kvconform.BlackBox (an adapter).

    A serving engine at a URL is judged by its own answers without the prefix cache, and with --model by the weights
    that it serves. An API key is read from the environment, and is written nowhere.
    """
    plan = Plan(effort_named(effort) if effort else CHECK, seed, explain=True)
    found: list[Results] = []
    if is_engine(target):
        given = {**checks.options("", option), **({"engine": engine} if engine else {})}
        limits = Limits(max_requests, max_seconds, concurrent)
        shutil.rmtree(out / "failures" / serving.name_of(target), ignore_errors=True)  # of an earlier check
        quietly = quiet or as_json
        judge_engine = partial(serving.judge, model=model or reference, allow_remote=allow_remote, quiet=quietly)
        _end([judge_engine(target, given, plan.effort, seed, out, limits)], as_json)
    for address in checks.addresses(target, checks.options(init, option, claim), reference):
        name = file_name(address)
        shutil.rmtree(out / "failures" / name, ignore_errors=True)  # of an earlier check
        spec = WorkerSpec(address, device, python, step_timeout, start_method=start_method)
        with Progress(name, out, quiet=quiet or as_json, chapters=True) as progress:
            progress.start(address, start_method, plan.effort.name)
            judge = partial(run_backend, tell=progress.tell, begin=progress.begin, running=progress.running)
            found.append(judge(name, spec, plan, out))
        if quiet and not as_json:
            say(f"{name}: {found[-1].summary}")
        elif not as_json:
            for line in ("", *checks.lines(found[-1], out, progress.told)):
                say(line)
    _end(found, as_json)


def _print_results(results: Results, path: Path) -> None:
    found = (*checks.foremost(results), *checks.diagnosed(results), *results.stale)
    for line in (*found, f"{results.backend}: {results.summary}"):
        say(line)
    if results.verdicts:
        programs = sum(verdict.programs for verdict in results.verdicts)
        say(f"  {checks.counted(results.counts)}; {programs} programs in {results.seconds:.0f} s; {path}")
        for line in checks.remarks(results):
            say(line)


def replay(
    file: Annotated[Path, typer.Argument(help="A counterexample.")],
    backend: Annotated[str, typer.Option("--backend", "-b", help="The backend; default: the one in the file.")] = "",
    device: Annotated[str, typer.Option(help="The device; default: the one in the file.")] = "",
    python: Annotated[str, typer.Option(help="The interpreter of the worker.")] = sys.executable,
    step_timeout: StepTimeout = STEP_TIMEOUT,
    start_method: StartMethod = FORK,
    script: Annotated[
        Path | None, typer.Option(help="Write the failure as a Python file that needs only the target and numpy.")
    ] = None,
    allow_remote: serving.AllowRemote = False,
    as_json: Json = False,
) -> None:
    """Runs a counterexample on a fresh process. The exit code is 1 if it still fails.

    One of a serving engine is run on that engine, with new token ids.
    """
    if family_of(file) == serving.FAMILY:
        raise typer.Exit(serving.replay(file, backend, script, allow_remote, as_json))
    found = counterexamples.read(file)
    if found.clause not in BY_NAME:
        sentence = f"{file}: no clause named {found.clause!r}; known: {', '.join(BY_NAME)}"
        raise UnknownClause("clause", found.clause, BY_NAME, sentence)
    case = Case.from_json(found.case, "case")
    before = [Program.from_json(program, f"before[{i}]") for i, program in enumerate(found.before)]
    address, lines = backend or found.backend, []
    spec = WorkerSpec(address, device or found.device, python, step_timeout, start_method=start_method)
    with WorkerClient(spec) as client:
        tried = counterexamples.replayed(BY_NAME[found.clause], client, before, case)
        if tried is not None:
            sentence = render(tried)
            if script is not None:
                write_atomically(script, repro.script(found, client).encode())
                lines.append(f"  script: {repro.tried(script, python)}")
        else:
            sentence = f"holds now; the file says: {found.sentence}"
            if script is not None:
                lines.append("  no script: there is nothing to reproduce")
    if as_json:
        record = {"clause": found.clause, "backend": address, "broken": tried is not None, "sentence": sentence}
        written = None if script is None or tried is None else str(script)
        print_json({**record, "mismatch": None if tried is None else msgspec.to_builtins(tried), "script": written})
    else:
        for line in (f"{found.clause} on {address}: {sentence}", *lines):
            say(line)
    raise typer.Exit(int(tried is not None))
