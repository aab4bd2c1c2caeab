"""The command line. It selects, calls and prints; every decision is made elsewhere. Exit codes are in ``--help``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvconform import __version__
from kvconform.api import file_name
from kvconform.bench import record as speed_record
from kvconform.bench.record import Record
from kvconform.cli import bench
from kvconform.cli.options import Backends, Device, Out, Pythons, Seed, errors, launches, screen, usage
from kvconform.cli.schemas import FILES, json_schema
from kvconform.errors import BackendUnavailable
from kvconform.explain import repro
from kvconform.files import family_of, write_atomically
from kvconform.judging.verdict import Verdict
from kvconform.mutation import audit, power
from kvconform.mutation import record as audit_record
from kvconform.mutation.fault import load_faults
from kvconform.results import gate, results
from kvconform.results.known_failures import EMPTY
from kvconform.results.known_failures import read as read_known_failures
from kvconform.results.results import Results
from kvconform.run import check
from kvconform.run.check import diagnosed
from kvconform.run.cross_backend import Pair
from kvconform.run.run import Plan, cells, parse_shard, path_of, run_backend, summary
from kvconform.search import counterexample as counterexamples
from kvconform.search.counterexample import Broken
from kvconform.search.effort import DEFAULT_EFFORT, EFFORTS
from kvconform.spec_docs import clause as explain
from kvconform.spec_docs import page as spec_page
from kvconform.worker.client import STEP_TIMEOUT, WorkerClient, WorkerSpec
from kvconform.worker.registry import installed
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case
from kvconform_specs.clauses import BY_NAME, CHAPTERS
from kvconform_specs.config import DTYPES
from kvconform_specs.configs import CONFIGS, config_named
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Program

# Hypothesis keeps tables of its own in a folder; the user's is no place for them
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "kvconform-hypothesis"))
EXIT_CODES = (
    "Exit codes: 0 conformant; 1 non-conformant, or a stale known failure; 2 usage; 3 infrastructure (backend absent, broken "
    "or unsupported here); 4 regression; 5 only inconclusive, or core clauses without a pass."
)
app = typer.Typer(
    help=f"Conformance of KV-cache attention. A KV cache must be unobservable.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CATALOGUE = "kvconform_backends.faults:FAULTS"
"""The faults that are audited unless others are named."""


def main() -> None:
    """Entry config_named: bad input and missing infrastructure are one sentence, not a traceback."""
    try:
        app()
    except SpecError as error:
        errors.print(f"kvconform: {escape(str(error))}")
        sys.exit(2)
    except BackendUnavailable as error:
        errors.print(f"kvconform: {escape(str(error))}")
        sys.exit(3)


@app.command()
def run(
    backend: Backends,
    device: Device = "cpu",
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16 or float16. Repeatable.")] = ["float32"],  # noqa: B006
    effort: Annotated[str, typer.Option(help=f"How much to try: {', '.join(EFFORTS)}.")] = DEFAULT_EFFORT,
    seed: Seed = 0,
    out: Out = Path("results"),
    clause: Annotated[list[str], typer.Option(help="Only clauses that begin so. Repeatable.")] = [],  # noqa: B006
    config: Annotated[list[str], typer.Option(help="Only configs that begin so. Repeatable.")] = [],  # noqa: B006
    python: Pythons = [],  # noqa: B006
    step_timeout: Annotated[float, typer.Option(help="Seconds without progress that make a timeout.")] = STEP_TIMEOUT,
    known_failures: Annotated[Path | None, typer.Option(help="A TOML file of known failures.")] = None,
    shard: Annotated[str, typer.Option(help="Only part i of n of the cells, as i/n.")] = "",
) -> None:
    """Judges backends by every clause; writes OUT/<backend>.json and a counterexample for each failure.

    A run that was killed goes on where it stopped. With several backends the worst exit code counts. A shard writes to
    OUT/shards, for kvconform merge; it exits with 0 where nothing in it stands against conformance.
    """
    if effort not in EFFORTS:
        raise usage(f"--effort: unknown effort {effort!r}; known: {', '.join(EFFORTS)}")
    known = EMPTY if known_failures is None else read_known_failures(known_failures)
    part = parse_shard(shard) if shard else None
    plan = Plan(EFFORTS[effort], seed, tuple(dtype), tuple(clause), tuple(config), part, explain=True)
    total = sum(1 for _ in cells(plan))
    if total == 0 and any(cells(replace(plan, shard=None))):
        raise usage(f"--shard {shard}: there are fewer cells than shards")
    if total == 0:
        raise usage(f"no cell matches --clause {' '.join(clause) or '*'} and --config {' '.join(config) or '*'}")
    codes = []
    for name, spec in launches(backend, device, python, step_timeout).items():
        with _progress() as progress:
            task = progress.add_task(name, total=None)

            def begin(count: int, progress: Progress = progress, task: TaskID = task) -> None:
                progress.update(task, total=count)

            def tell(verdict: Verdict, progress: Progress = progress, task: TaskID = task, name: str = name) -> None:
                progress.advance(task)
                if verdict.outcome.broken:
                    _print_failure(progress.console, name, verdict, out)

            judged = run_backend(name, spec, plan, out, tell, known, begin)
        for words in diagnosed(judged):
            screen.print(escape(words))
        for words in judged.stale:
            screen.print(escape(words))
        code, sentence = results.exit_code(judged)
        codes.append(code)
        counts = ", ".join(f"{n} {outcome}" for outcome, n in summary(judged).items() if n)
        programs = sum(verdict.programs for verdict in judged.verdicts)
        screen.print(f"{escape(name)}: {escape(sentence)}")
        if judged.verdicts:
            screen.print(f"  {counts}; {programs} programs in {judged.seconds:.0f} s; {path_of(name, plan, out)}")
    raise typer.Exit(_worst(codes))


@app.command(name="check")
def check_command(
    target: Annotated[str, typer.Argument(help=check.FORMS)],
    init: Annotated[str, typer.Option(help="Keyword arguments of the class or factory, as JSON.")] = "",
    option: Annotated[list[str], typer.Option(help="NAME=JSON, such as cache=static. Repeatable.")] = [],  # noqa: B006
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("results/check"),
    python: Annotated[str, typer.Option(help="Interpreter of the workers.")] = sys.executable,
    step_timeout: Annotated[float, typer.Option(help="Seconds without progress that make a timeout.")] = STEP_TIMEOUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Judges what you have: a module, an ONNX decoder, a transformers model, or a backend.

    Says how it was called and what was assumed, what is broken, what it behaves like, and which tokens its outputs see.
    """
    judged = []
    for address in check.addresses(target, check.options(init, option)):
        name = file_name(address)
        shutil.rmtree(out / "failures" / name, ignore_errors=True)  # of an earlier check
        plan = Plan(check.BUDGET, seed, explain=True)
        with _progress(quiet=as_json) as progress:
            task = progress.add_task(name, total=None)
            judged.append(
                run_backend(
                    name,
                    WorkerSpec(address, device, python, step_timeout),
                    plan,
                    out,
                    tell=lambda verdict, progress=progress, task=task: progress.advance(task),  # type: ignore[misc]
                    begin=lambda count, progress=progress, task=task: progress.update(task, total=count),  # type: ignore[misc]
                )
            )
        if not as_json:
            for words in check.lines(judged[-1], out):
                screen.print(escape(words))
    if as_json:
        print(json.dumps([msgspec.to_builtins(one) for one in judged], indent=1))
    raise typer.Exit(_worst([results.exit_code(one)[0] for one in judged]))


def _worst(codes: list[int]) -> int:
    """Broken before everything, then regressions, missing infrastructure, undecided."""
    return next((code for code in (1, 4, 3, 5) if code in codes), 0)


def _progress(quiet: bool = False) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        disable=quiet or not screen.is_terminal,
    )


def _print_failure(console: Console, name: str, verdict: Verdict, out: Path) -> None:
    line = f"{verdict.clause} on {name} [{verdict.config}]: {verdict.sentence}"
    console.print(escape(line))
    if verdict.counterexample:
        console.print(f"  replay: kvconform replay {out / 'failures' / name / verdict.counterexample}")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A counterexample.")],
    backend: Annotated[str, typer.Option("--backend", "-b", help="Another backend than the file names.")] = "",
    device: Annotated[str, typer.Option(help="Another device than the file names.")] = "",
    python: Annotated[str, typer.Option(help="Interpreter of the worker.")] = sys.executable,
    step_timeout: Annotated[float, typer.Option(help="Seconds without progress that make a timeout.")] = STEP_TIMEOUT,
    script: Annotated[
        Path | None, typer.Option(help="Writes the failure as a Python file that needs the target and numpy only.")
    ] = None,
) -> None:
    """Runs a counterexample on a fresh process and says what is wrong; exit code 1 if it still is."""
    found = counterexamples.read(file)
    if found.clause not in BY_NAME:
        raise usage(f"{file}: no clause named {found.clause!r}; known: {', '.join(BY_NAME)}")
    case = Case.from_json(found.case, "case")
    before = [Program.from_json(program, f"before[{i}]") for i, program in enumerate(found.before)]
    address = backend or found.backend
    with WorkerClient(WorkerSpec(address, device or found.device, python, step_timeout)) as client:
        tried = counterexamples.replayed(BY_NAME[found.clause], client, before, case)
        place = f"{found.clause} on {address}"
        if isinstance(tried, Broken):
            screen.print(escape(f"{place}: {counterexamples.sentence(tried, before)}"))
            if script is not None:
                write_atomically(script, repro.script(found, client).encode())
                screen.print(escape(f"  script: {repro.tried(script, python)}"))
            raise typer.Exit(1)
    screen.print(escape(f"{place}: holds now; the file says: {found.sentence}"))
    if script is not None:
        screen.print("  no script: there is nothing to reproduce")


@app.command(name="gate")
def gate_command(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results files to be judged.")],
    baseline: Annotated[Path, typer.Option(help="Results file, or folder of them, to compare with.")],
) -> None:
    """Compares results with a baseline: 1 on a new failure, 4 when a pass, a clause or a claim was lost."""
    codes = []
    for file in files:
        now = results.read(file)
        was = results.read(baseline / file.name if baseline.is_dir() else baseline)
        differences = gate.compare(now, was)
        for difference in differences:
            mark = {gate.OK: "note", gate.NEW_FAILURE: "new failure", gate.REGRESSION: "regression"}[difference.code]
            screen.print(escape(f"{mark}: {now.backend}: {difference.words}"))
        codes.append(gate.exit_code(differences))
        screen.print(escape(f"{now.backend}: {_GATED[codes[-1]]}"))
    raise typer.Exit(_worst(codes))


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results of all shards of one backend.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The results file to write.")],
) -> None:
    """Puts the results of a run's shards together; says what they amount to, with the exit code of the whole run."""
    whole = results.merged([results.read(file) for file in files])
    whole.write(out)
    for words in whole.stale:
        screen.print(escape(words))
    code, sentence = results.exit_code(whole)
    screen.print(escape(f"{whole.backend}: {sentence}"))
    raise typer.Exit(code)


_GATED = {gate.OK: "no regression", gate.NEW_FAILURE: "new failures", gate.REGRESSION: "regressed"}


@app.command(name="audit")
def audit_command(
    names: Annotated[list[str], typer.Argument(help="Only faults, or clauses, that begin so; all if left out.")] = [],  # noqa: B006
    faults: Annotated[str, typer.Option(help="The list of faults: module:LIST or path/file.py:LIST.")] = CATALOGUE,
    effort: Annotated[list[str], typer.Option(help=f"{', '.join(EFFORTS)}. Repeatable.")] = ["smoke"],  # noqa: B006
    seed: Seed = 0,
    clause: Annotated[
        list[str],
        typer.Option(help="Try these clauses, by prefix, instead of those that a fault names; or: all. Repeatable."),
    ] = [],  # noqa: B006
    controls: Annotated[bool, typer.Option(help="Also try the list CONTROLS beside the faults: it is right.")] = False,
    shard: Annotated[str, typer.Option(help="Only part i of n of the faults, as i/n.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Faults that are tried at once.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of the kill matrix.")] = Path("results/audit.json"),
) -> None:
    """Tries backends that are wrong on purpose: which clauses kill them, and how fast?

    0: all are killed and no control is detected; 1: some fault survives, or a control is detected; 3: some could not
    run here. An exception kills no fault for a clause about numbers.
    """
    for name in effort:
        if name not in EFFORTS:
            raise usage(f"--effort: unknown effort {name!r}; known: {', '.join(EFFORTS)}")
    efforts = tuple(EFFORTS[name] for name in dict.fromkeys(effort))
    part = parse_shard(shard) if shard else None
    plan = audit.AuditPlan(efforts, seed, tuple(names), ("",) if "all" in clause else tuple(clause), part)
    wrong = load_faults(faults)
    right = load_faults(f"{faults.rpartition(':')[0]}:CONTROLS") if controls else ()

    def tell(audited: audit_record.Audited) -> None:
        for line in audit_record.lines(audited, effort):
            screen.print(escape(line))

    def progress(fault: str, trial: audit_record.AuditTrial) -> None:
        screen.print(escape(audit_record.progress(fault, trial)))

    record = audit.audit(plan, faults, wrong, right, out, jobs, tell, progress)
    for line in audit_record.summary(record):
        screen.print(escape(line))
    screen.print(f"{len(record.audited)} faults in {record.seconds:.0f} s; {escape(str(out))}")
    raise typer.Exit(audit_record.exit_code(record))


app.add_typer(bench.app, name="bench")


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results; a speed record; an audit.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("reports/out/report.html"),
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a Markdown summary.")] = None,
) -> None:
    """Writes the HTML report, and prints a short table and its path."""
    from kvconform.files import write_atomically

    judged, speed, pairs, audited = _collect(files)
    renderers = {config_named.name: config_named for config_named in entry_points(group="kvconform.reports")}
    folder = str(files[0].parent)
    write_atomically(out, renderers["html"].load()(judged, pairs, speed, folder=folder, audit=audited).encode())
    if junit is not None:
        write_atomically(junit, renderers["junit"].load()(judged).encode())
    if markdown is not None:
        text = renderers["markdown"].load()(judged, pairs, speed, folder=folder, audit=audited)
        write_atomically(markdown, text.encode())
    screen.print(escape(renderers["table"].load()(judged)))
    screen.print(f"report: {escape(str(out.resolve()))}")


def _collect(files: list[Path]) -> tuple[list[Results], Record | None, list[Pair], audit_record.AuditRecord | None]:
    """Results, speed record, what backends that ran beside one another agree on, and the audit of the clauses."""
    from kvconform.run import cross_backend
    from kvconform.run.run import named_configs

    judged: list[Results] = []
    speed: Record | None = None
    audited: audit_record.AuditRecord | None = None
    for file in files:
        if speed_record.is_record(file):
            speed = speed_record.read(file)
        elif family_of(file) == audit_record.SCHEMA.partition("/")[0]:
            audited = audit_record.read(file)
        else:
            judged.append(results.read(file))
    names = [one.backend for one in judged]
    folders = {file.parent / "vectors" for file in files}
    pairs = [pair for folder in sorted(folders) for pair in cross_backend.pairs(folder, names, named_configs(judged))]
    return judged, speed, pairs, audited


@app.command()
def backends() -> None:
    """Lists installed backends: ready, absent or broken, with the reason."""
    for name in installed():
        try:
            with WorkerClient(WorkerSpec(name)) as client:
                claims = client.claims
                screen.print(escape(f"{name}: ready ({', '.join(claims.profiles)}; {', '.join(claims.dtypes)})"))
        except BackendUnavailable as sentence:
            screen.print(escape(f"{name}: {sentence}"))


@app.command()
def spec(
    clause: Annotated[str, typer.Argument(help="A clause or chapter; all if left out.")] = "",
    write: Annotated[
        Path | None, typer.Option(help="Write the spec as Markdown, or a clause's example as a file for replay.")
    ] = None,
) -> None:
    """Prints the clauses of the spec, or explains one and shows a program that tries it."""
    known = (*CHAPTERS, *BY_NAME)
    if clause and clause not in known:
        near = get_close_matches(clause, known) or [name for name in known if clause in name]
        hint = f"do you mean {' or '.join(near)}?" if near else f"chapters: {', '.join(CHAPTERS)}"
        raise usage(f"no clause or chapter named {clause!r}; {hint}")
    if write and clause in CHAPTERS:
        raise usage(f"--write: {clause} is a chapter; name a clause, or nothing for the whole spec")
    if clause in BY_NAME:
        if write:
            write_atomically(write, explain.as_file(BY_NAME[clause]))
            screen.print(escape(f"example: kvconform replay {write} -b BACKEND"))
        else:
            screen.print(escape(explain.explained(BY_NAME[clause])))
        return
    if write:
        write_atomically(write, spec_page.page().encode())
        screen.print(escape(f"spec: {write}"))
        return
    screen.print(f"kvconform spec {SUITE_VERSION}: a KV cache must be unobservable")
    for chapter in [clause] if clause else CHAPTERS:
        screen.print(escape(f"\n{chapter}: {CHAPTERS[chapter]}"))
        for one in (c for c in BY_NAME.values() if c.chapter == chapter):
            screen.print(escape(f"\n  {one.name} ({one.level.value}{', core' if one.core else ''})\n    {one.text}"))


@app.command(name="power")
def power_command(
    dtype: Annotated[str, typer.Option(help=f"Known: {', '.join(DTYPES)}.")] = "float32",
    write: Annotated[Path | None, typer.Option(help="Compute all dtypes and write the file that is shipped.")] = None,
) -> None:
    """Computes the null-model power table: which wrong models each clause rejects, and to which it is blind."""
    if write is not None:
        write_atomically(write, power.shipped_as(power.power_table(name) for name in DTYPES))
        return
    config_named(next(iter(CONFIGS)), dtype)  # refuses a dtype that is not known
    for row in power.power_table(dtype):
        if row.note:
            screen.print(f"{row.clause:30}{row.note}")
        elif row.cases:
            said = f"{row.rejected} of {row.tried}" if row.tried else "within the bound everywhere"
            screen.print(f"{row.clause:30}{row.model:28}{said}{'  blind' if row.tried and not row.rejected else ''}")


@app.command()
def schema(kind: Annotated[str, typer.Argument(help=", ".join(FILES))] = "results") -> None:
    """Print the JSON Schema of a kind of file."""
    if kind not in FILES:
        raise usage(f"unknown kind of file {kind!r}; known: {', '.join(FILES)}")
    print(json.dumps(json_schema(kind), indent=1))


@app.command()
def version() -> None:
    """Prints the versions of package and suite."""
    screen.print(f"kvconform {__version__}, suite {SUITE_VERSION}")
