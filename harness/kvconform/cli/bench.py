"""``kvconform bench``: times, the gate on times, and counts; of conformant backends only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn

from kvconform.bench import presets, protocol, runner
from kvconform.bench.counters import compare as counters
from kvconform.bench.engine import Options, Say
from kvconform.bench.gate import runner as gates
from kvconform.bench.gate import self_test as self_tests
from kvconform.bench.gate.environments import environment
from kvconform.bench.presets import Preset
from kvconform.bench.record import PHASES, Record
from kvconform.cli.options import Device, Json, Out, Pythons, Seed, launches, print_json, say, screen, usage
from kvconform.results.gate import worst as worst_difference
from kvconform.results.results import read
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerSpec
from kvconform_specs.errors import SpecError

TIMED = [phase for phase in PHASES if phase not in ("read", "multiply")]
NOTHING = 5
"""Exit code: nothing was timed, or counted."""

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

Backends = Annotated[
    list[str],
    typer.Option("--backend", "-b", help="A backend, the reference first; the presets' by default. May be repeated."),
]
Presets = Annotated[list[str], typer.Option("--preset", help=f"One of: {', '.join(presets.PRESETS)}. May be repeated.")]
Seconds = Annotated[float, typer.Option(help="Seconds of one case in one restart, after its warm-up.")]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds of the whole run after the backends were judged.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each worker.")]


@app.callback()
def bench(
    context: typer.Context,
    backend: Backends = [],  # noqa: B006
    preset: Presets = ["quick"],  # noqa: B006
    device: Device = "cpu",
    out: Out = Path("results"),
    phase: Annotated[list[str], typer.Option(help=f"Time only one of: {', '.join(TIMED)}. May be repeated.")] = [],  # noqa: B006
    seconds: Seconds = protocol.SECONDS_PER_CASE,
    time_limit: TimeLimit = None,
    restarts: Annotated[int, typer.Option(min=1, help="How often all workers are started.")] = protocol.RESTARTS,
    threads: Threads = 1,
    seed: Seed = 0,
    python: Pythons = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Times conformant backends against one another in paired rounds; writes OUT/speed.json.

    A backend without results in OUT is judged first, with the least effort. A backend that is not conformant is not
    timed, nor one whose results are of other versions or of another state of its file. With --time-limit, cases for
    which it leaves too little time are left out. Exit code 5: nothing was timed.
    """
    if context.invoked_subcommand is not None:
        sources = [context.get_parameter_source(one.name or "") for one in context.command.params]
        if any(source is not None and source.name == "COMMANDLINE" for source in sources):
            raise usage(f"options of {context.invoked_subcommand!r} are given after that word")
        return
    unknown = [name for name in phase if name not in TIMED]
    if unknown:
        raise usage(f"--phase: no phase named {unknown[0]!r}; known: {', '.join(TIMED)}")
    chosen = _presets(preset)
    specs = launches(backend or _backends(chosen), device, python)
    with _Shown(quiet=as_json) as shown:
        _judge(specs, out, shown.say)
        options = Options(out / "speed.json", seconds, out, time_limit, seed, threads, shown.say)
        record = runner.bench(specs, chosen, options, restarts=restarts, phases=phase, advance=shown.advance)
    if as_json:
        print_json(record)
    else:
        _conclude(record, out / "speed.json")
    raise typer.Exit(0 if record.rounds else NOTHING)


@app.command()
def gate(
    backend: Backends = [],  # noqa: B006
    preset: Presets = ["small", "past-tuples"],  # noqa: B006
    base: Annotated[str, typer.Option(help="A git ref, '.' for the working tree, or an interpreter.")] = "HEAD",
    head: Annotated[str, typer.Option(help="Like --base, for the candidate side.")] = ".",
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Run --head against itself; count its false alarms.")
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="Runs of the self-test.")] = 20,
    history: Annotated[
        Path | None, typer.Option(help="Where self-tests are appended; OUT/gate-history.jsonl by default.")
    ] = None,
    device: Device = "cpu",
    out: Out = Path("results"),
    seconds: Seconds = gates.SECONDS_PER_CASE,
    time_limit: TimeLimit = None,
    threads: Threads = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compares the times of one backend in two versions; writes OUT/gate/<backend>.json.

    Exit code 4: head is slower than base, and that is confirmed. With --self-test exit code 1: there are more false
    alarms than the stated rate allows.
    """
    if self_test and time_limit is not None:
        raise usage("--time-limit does not apply to a self-test: every run is whole")
    if history is not None and not self_test:
        raise usage("--history applies to a self-test only")
    chosen = _presets(preset)
    options = Options(out / "gate", seconds, None, time_limit, seed, threads, _lines(as_json))
    codes = []
    with TemporaryDirectory(prefix="kvconform-") as folder:
        sides = {ref: environment(ref, Path(folder), options.say) for ref in ({head} if self_test else {base, head})}
        for name, spec in launches(backend or _backends(chosen), device, []).items():
            after = sides[head].spec(spec.address, spec.device)
            if self_test:
                mine = replace(options, out=options.out / name)
                log = history or out / "gate-history.jsonl"
                tested = self_tests.self_test(after, chosen, name, log, mine, runs=runs)
                codes.append(int(tested.verdict == self_tests.EXCEEDED))
                print_json(tested) if as_json else None
                continue
            before, mine = sides[base].spec(spec.address, spec.device), replace(options, out=out / f"gate/{name}.json")
            record = gates.gate(before, after, chosen, name, mine, {"base": sides[base], "head": sides[head]})
            codes.append(record.exit_code)
            if as_json:
                print_json(record)
            else:
                say("\n".join(f"{name}: {line}" for line in record.lines()))
    raise typer.Exit(max(codes))


@app.command("counters")
def count(
    backend: Backends = [],  # noqa: B006
    preset: Presets = ["small", "past-tuples"],  # noqa: B006
    baseline: Annotated[Path | None, typer.Option(help="A counters file to compare with.")] = None,
    device: Device = "cpu",
    out: Out = Path("results"),
    python: Pythons = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Counts what each backend does, which is exact and never flaky; writes OUT/counters.json.

    Exit code 4: a count breaks a law, or is greater than in the baseline. `counters` exits with 5 if nothing was
    counted.
    """
    chosen, before = _presets(preset), None if baseline is None else counters.read(baseline)
    specs = launches(backend or _backends(chosen), device, python)
    record = counters.count(specs, chosen, out / "counters.json", _lines(as_json))
    found = counters.broken(record) + ([] if before is None else counters.compare(before, record))
    if as_json:
        print_json(record)
    else:
        say("\n".join([*counters.lines(found), f"counters: {out / 'counters.json'}"]))
    raise typer.Exit(worst_difference([one.code for one in found]) if found or record.counts else NOTHING)


def _lines(quiet: bool) -> Say:
    return (lambda line: None) if quiet else say


def _presets(names: list[str]) -> dict[str, Preset]:
    unknown = [name for name in names if name not in presets.PRESETS]
    if unknown:
        raise usage(f"--preset: no preset named {unknown[0]!r}; known: {', '.join(presets.PRESETS)}")
    return {name: presets.PRESETS[name] for name in names}


def _backends(chosen: Mapping[str, Preset]) -> list[str]:
    return list(dict.fromkeys(name for preset in chosen.values() for name in preset.backends))


def _judge(specs: Mapping[str, WorkerSpec], out: Path, say: Say) -> None:
    """Judges backends without complete conformance results."""
    for name, spec in specs.items():
        path = out / f"{name}.json"
        if path.exists() and not _cut_short(path):
            continue
        why = f"the results in {out} are not finished" if path.exists() else f"there are no results in {out}"
        say(f"{name}: {why}: it is judged first (smoke effort)")
        run_backend(name, replace(spec, environment={}), Plan(EFFORTS["smoke"]), out)


def _cut_short(path: Path) -> bool:
    """Whether a run was interrupted. The bench reports results that cannot be read."""
    with suppress(SpecError):
        return not read(path).finished
    return False


def _conclude(record: Record, path: Path) -> None:
    """Prints the ratios of a run, what was not timed, and the path of the record."""
    rows = [("case", "backend", "against", "ratio [95 % interval]")]
    for one in record.ratios:
        case = record.cases[one.case]
        arm, other = case.arms[one.arm], case.arms[one.reference]
        where = f"{case.preset}: {arm.phase} at {case.depth}{f' x {case.batch}' if case.batch > 1 else ''}"
        number = f"{one.ratio:.3f} [{one.low:.3f}, {one.high:.3f}]" if one.valid else f"not valid: {one.why_invalid}"
        rows.append((where, arm.backend, other.phase if other.backend == arm.backend else other.backend, number))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for excluded in record.excluded:
        what = " ".join(part for part in (excluded.backend, excluded.phase) if part)
        say(f"{excluded.preset}: no time for {what}: {excluded.why}")
    valid = sum(one.valid for one in record.ratios)
    say(f"{valid} of {len(record.ratios)} ratios are valid, in {record.seconds:.0f} s; record: {path.resolve()}")


class _Shown:
    """Lines, and on a terminal a bar with the time that remains."""

    def __init__(self, quiet: bool) -> None:
        percent = TextColumn("{task.percentage:.0f} % {task.fields[left]}")
        hidden = quiet or not screen.is_terminal
        self.progress = Progress(
            TextColumn("bench"), BarColumn(), percent, console=screen, transient=True, disable=hidden
        )
        self.task = self.progress.add_task("bench", total=1.0, left="")
        self.say: Say = (lambda line: None) if quiet else lambda line: say(line, self.progress.console)

    def __enter__(self) -> _Shown:
        self.progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.progress.stop()

    def advance(self, done: float, remaining: float) -> None:
        minutes, seconds = divmod(round(remaining), 60)
        self.progress.update(self.task, completed=done, left=f"{minutes} min {seconds:02} s left")
