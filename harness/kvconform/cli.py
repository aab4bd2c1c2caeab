"""The command line. It selects, calls and prints; every decision is made elsewhere. Exit codes are in ``--help``."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvconform import __version__, gate, latency, presets, protocol, results
from kvconform import counterexample as counterexamples
from kvconform.budget import BUDGETS, DEFAULT_BUDGET
from kvconform.counterexample import Broken
from kvconform.doors import file_name
from kvconform.latency_record import Record
from kvconform.pairwise import Pair
from kvconform.registry import installed
from kvconform.results import Results
from kvconform.run import Plan, cells, run_backend, summary
from kvconform.subject import STEP_TIMEOUT, Infrastructure, Launch, Subject
from kvconform.verdict import Verdict
from kvconform_specs import SUITE_VERSION
from kvconform_specs.clause import Case
from kvconform_specs.clauses import BY_NAME, CHAPTERS
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Program

EXIT_CODES = (
    "Exit codes: 0 conformant; 1 non-conformant; 2 usage; 3 infrastructure (backend absent, broken or unsupported "
    "here); 4 regression; 5 only inconclusive, or core clauses without a pass."
)
app = typer.Typer(
    help=f"Conformance of KV-cache attention. A KV cache must be unobservable.\n\n{EXIT_CODES}",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
screen, errors = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)

Backends = Annotated[
    list[str], typer.Option("--backend", "-b", help="Installed name, module:Name or file.py:Name. Repeatable.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda; cuda is proven, or the run ends with exit code 3.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of results.")]
Pythons = Annotated[list[str], typer.Option("--python", help="Interpreter of the workers, or BACKEND=INTERPRETER.")]
Seed = Annotated[int, typer.Option(help="Seed of the whole run.")]


def main() -> None:
    """Entry point: bad input and missing infrastructure are one sentence, not a traceback."""
    try:
        app()
    except SpecError as error:
        errors.print(f"kvconform: {escape(str(error))}")
        sys.exit(2)
    except Infrastructure as error:
        errors.print(f"kvconform: {escape(str(error))}")
        sys.exit(3)


def _usage(sentence: str) -> typer.Exit:
    errors.print(f"kvconform: {escape(sentence)}")
    return typer.Exit(2)


def _launches(
    backends: list[str], device: str, pythons: list[str], step_timeout: float = STEP_TIMEOUT
) -> dict[str, Launch]:
    """One launch for each backend, by the name of its results."""
    if device not in ("cpu", "cuda"):
        raise _usage(f"--device: unknown device {device!r}; known: cpu, cuda")
    common, own = sys.executable, {}
    for item in pythons:
        name, equals, path = item.partition("=")
        if equals:
            own[name] = path
        else:
            common = item
    unknown = sorted(set(own) - set(backends))
    if unknown:
        raise _usage(f"--python: no backend {unknown[0]!r} in this run; given: {', '.join(backends)}")
    launches = {file_name(b): Launch(b, device, own.get(b, common), step_timeout) for b in backends}
    if len(launches) < len(backends):
        raise _usage(f"--backend: two of {', '.join(backends)} would write the same results")
    return launches


@app.command()
def run(
    backend: Backends,
    device: Device = "cpu",
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16 or float16. Repeatable.")] = ["float32"],  # noqa: B006
    budget: Annotated[str, typer.Option(help=f"How much to try: {', '.join(BUDGETS)}.")] = DEFAULT_BUDGET,
    seed: Seed = 0,
    out: Out = Path("results"),
    clause: Annotated[list[str], typer.Option(help="Only clauses that begin so. Repeatable.")] = [],  # noqa: B006
    config: Annotated[list[str], typer.Option(help="Only configs that begin so. Repeatable.")] = [],  # noqa: B006
    python: Pythons = [],  # noqa: B006
    step_timeout: Annotated[float, typer.Option(help="Seconds without progress that make a timeout.")] = STEP_TIMEOUT,
) -> None:
    """Judges backends by every clause; writes OUT/<backend>.json and a counterexample for each failure.

    A run that was killed goes on where it stopped. With several backends the worst exit code counts.
    """
    if budget not in BUDGETS:
        raise _usage(f"--budget: unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
    plan = Plan(BUDGETS[budget], seed, tuple(dtype), tuple(clause), tuple(config))
    total = sum(1 for _ in cells(plan))
    if total == 0:
        raise _usage(f"no cell matches --clause {' '.join(clause) or '*'} and --config {' '.join(config) or '*'}")
    codes = []
    for name, launch in _launches(backend, device, python, step_timeout).items():
        with _progress() as progress:
            task = progress.add_task(name, total=total)

            def tell(verdict: Verdict, progress: Progress = progress, task: object = task, name: str = name) -> None:
                progress.advance(task)  # type: ignore[arg-type]
                if verdict.outcome.broken:
                    _print_failure(progress.console, name, verdict, out)

            judged = run_backend(name, launch, plan, out, tell)
        code, sentence = results.exit_code(judged)
        codes.append(code)
        counts = ", ".join(f"{n} {outcome}" for outcome, n in summary(judged).items() if n)
        programs = sum(verdict.programs for verdict in judged.verdicts)
        screen.print(f"{escape(name)}: {escape(sentence)}")
        if judged.verdicts:
            screen.print(f"  {counts}; {programs} programs in {judged.seconds:.0f} s; {out / (name + '.json')}")
    raise typer.Exit(_worst(codes))


def _worst(codes: list[int]) -> int:
    """Broken before everything, then regressions, missing infrastructure, undecided."""
    return next((code for code in (1, 4, 3, 5) if code in codes), 0)


def _progress() -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=screen, transient=True, disable=not screen.is_terminal,
    )  # fmt: skip


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
) -> None:
    """Runs a counterexample on a fresh process and says what is wrong; exit code 1 if it still is."""
    found = counterexamples.read(file)
    if found.clause not in BY_NAME:
        raise _usage(f"{file}: no clause named {found.clause!r}; known: {', '.join(BY_NAME)}")
    case = Case.from_json(found.case, "case")
    before = [Program.from_json(program, f"before[{i}]") for i, program in enumerate(found.before)]
    address = backend or found.backend
    with Subject(Launch(address, device or found.device, python, step_timeout)) as subject:
        tried = counterexamples.replayed(BY_NAME[found.clause], subject, before, case)
    place = f"{found.clause} on {address}"
    if isinstance(tried, Broken):
        screen.print(escape(f"{place}: {counterexamples.sentence(tried, before)}"))
        raise typer.Exit(1)
    screen.print(escape(f"{place}: holds now; the file says: {found.sentence}"))


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


_GATED = {gate.OK: "no regression", gate.NEW_FAILURE: "new failures", gate.REGRESSION: "regressed"}


@app.command()
def bench(
    backend: Backends,
    preset: Annotated[list[str], typer.Option(help=f"Known: {', '.join(presets.PRESETS)}. Repeatable.")] = [],  # noqa: B006
    device: Device = "cpu",
    out: Out = Path("results"),
    seconds: Annotated[float, typer.Option(help="Longest time of one case.")] = protocol.SECONDS_PER_CASE,
    seed: Seed = 0,
    python: Pythons = [],  # noqa: B006
) -> None:
    """Times conformant backends against one another in paired rounds; writes OUT/speed.json.

    A backend whose OUT/<backend>.json is not conformant gets no time. The first backend is the reference.
    """
    unknown = [name for name in preset if name not in presets.PRESETS]
    if unknown:
        raise _usage(f"--preset: no preset named {unknown[0]!r}; known: {', '.join(presets.PRESETS)}")
    chosen = {name: presets.PRESETS[name] for name in preset or presets.PRESETS}
    record = latency.bench(
        _launches(backend, device, python), chosen, out, out / "speed.json", seconds_per_case=seconds, seed=seed,
        tell=lambda words: screen.print(escape(words)),
    )  # fmt: skip
    for excluded in record.excluded:
        screen.print(escape(f"no time: {excluded.backend}, {excluded.preset}: {excluded.why}"))
    raise typer.Exit(0 if record.rounds else 5)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results, and a speed record if any.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("reports/out/report.html"),
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a Markdown summary.")] = None,
) -> None:
    """Writes the HTML report, and prints a short table and its path."""
    from kvconform.storage import write_atomically

    judged, speed, pairs = _collect(files)
    renderers = {point.name: point for point in entry_points(group="kvconform.reports")}
    folder = str(files[0].parent)
    write_atomically(out, renderers["html"].load()(judged, pairs, speed, folder=folder).encode())
    if junit is not None:
        write_atomically(junit, renderers["junit"].load()(judged).encode())
    if markdown is not None:
        write_atomically(markdown, renderers["markdown"].load()(judged, pairs, speed, folder=folder).encode())
    screen.print(escape(renderers["table"].load()(judged)))
    screen.print(f"report: {escape(str(out.resolve()))}")


def _collect(files: list[Path]) -> tuple[list[Results], Record | None, list[Pair]]:
    """Results, speed record, and what backends that ran beside one another agree on."""
    from kvconform import pairwise
    from kvconform.run import named_configs

    judged: list[Results] = []
    speed: Record | None = None
    for file in files:
        if latency.is_record(file):
            speed = latency.read(file)
        else:
            judged.append(results.read(file))
    names = [one.backend for one in judged]
    folders = {file.parent / "vectors" for file in files}
    pairs = [pair for folder in sorted(folders) for pair in pairwise.pairs(folder, names, named_configs(judged))]
    return judged, speed, pairs


@app.command()
def backends() -> None:
    """Lists installed backends: ready, absent or broken, with the reason."""
    for name in installed():
        try:
            with Subject(Launch(name)) as subject:
                claims = subject.claims
                screen.print(escape(f"{name}: ready ({', '.join(claims.profiles)}; {', '.join(claims.dtypes)})"))
        except Infrastructure as sentence:
            screen.print(escape(f"{name}: {sentence}"))


@app.command()
def spec(clause: Annotated[str, typer.Argument(help="A clause or chapter; all if left out.")] = "") -> None:
    """Prints the clauses of the spec."""
    found = [c for c in BY_NAME.values() if c.name == clause or c.chapter == clause or not clause]
    if not found:
        raise _usage(f"no clause or chapter named {clause!r}; chapters: {', '.join(CHAPTERS)}")
    screen.print(f"kvconform spec {SUITE_VERSION}: a KV cache must be unobservable")
    chapter = ""
    for one in found:
        if one.chapter != chapter:
            chapter = one.chapter
            screen.print(escape(f"\n{chapter}: {CHAPTERS[chapter]}"))
        screen.print(escape(f"\n  {one.name} ({one.level.value}{', core' if one.core else ''})\n    {one.text}"))
        if clause == one.name:
            screen.print(escape(f"    holds if {' and '.join(r.value for r in one.relations)}"))
            screen.print(escape(f"    profiles: {', '.join(one.profiles)}; needs: {', '.join(one.needs) or 'nothing'}"))
            for link in one.why:
                screen.print(escape(f"    stops: {link}"))


@app.command()
def schema() -> None:
    """Prints the JSON Schema of a results file."""
    import json

    print(json.dumps(results.schema(), indent=1))


@app.command()
def version() -> None:
    """Prints the versions of package and suite."""
    screen.print(f"kvconform {__version__}, suite {SUITE_VERSION}")
