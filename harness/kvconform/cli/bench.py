"""``kvconform bench``: times, and only of what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from kvconform.bench import presets, protocol
from kvconform.bench import runner as controller
from kvconform.bench.counters import compare as counters
from kvconform.bench.gate import runner as pingpong
from kvconform.bench.gate import self_test
from kvconform.bench.gate.environments import environment
from kvconform.bench.presets import Preset
from kvconform.bench.record import PHASES, json_schema
from kvconform.cli.options import Device, Out, Pythons, Seed, launches, screen, usage
from kvconform.errors import BackendUnavailable, GpuBusy
from kvconform.results.gate import exit_code
from kvconform.results.results import read
from kvconform.run.run import Plan, run_backend
from kvconform.search.effort import EFFORTS
from kvconform.worker.client import WorkerSpec
from kvconform_specs.errors import SpecError

TIMED = [phase for phase in PHASES if phase not in ("read", "multiply")]
DEFAULT_PRESETS = ("small", "past-tuples")
HISTORY = "gate-history.jsonl"
NOTHING = 5
"""Exit code: nobody was timed, or counted."""


def bench(
    backend: Annotated[
        list[str], typer.Option("--backend", "-b", help="Backends, the reference first; the preset's if none is named.")
    ] = [],  # noqa: B006
    preset: Annotated[list[str], typer.Option(help=f"Known: {', '.join(presets.PRESETS)}. Repeatable.")] = [],  # noqa: B006
    device: Device = "cpu",
    out: Out = Path("results"),
    seconds: Annotated[
        float | None,
        typer.Option(
            help=f"Longest time of one case in one restart; {protocol.SECONDS_PER_CASE:g} after its warm-up, or "
            f"{pingpong.SECONDS_PER_CASE:g} with it for --gate."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds of the whole run once all are judged, instead of --seconds.")
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(min=1, help=f"How often all workers start anew; {protocol.RESTARTS} if none.")
    ] = None,
    phase: Annotated[list[str], typer.Option(help=f"Only these: {', '.join(TIMED)}. Repeatable.")] = [],  # noqa: B006
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker.")] = 1,
    seed: Seed = 0,
    python: Pythons = [],  # noqa: B006
    gate: Annotated[
        bool, typer.Option("--gate", help="Is HEAD slower than BASE? Exit code 4 where that is confirmed.")
    ] = False,
    base: Annotated[str, typer.Option(help="A git ref, '.' for the working tree, or an interpreter.")] = "HEAD",
    head: Annotated[str, typer.Option(help="As --base.")] = ".",
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="With --gate: HEAD against itself; are its false alarms as rare as stated?"),
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="Of the self-test.")] = 20,
    history: Annotated[Path | None, typer.Option(help="Of the self-test; OUT/gate-history.jsonl if none.")] = None,
    count: Annotated[
        bool, typer.Option("--counters", help="Counts instead of timing, which cannot flake; exit code 4 on more work.")
    ] = False,
    baseline: Annotated[Path | None, typer.Option(help="Counters that these are compared with.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Prints the record's JSON Schema and ends.")] = False,
) -> None:
    """Times conformant backends against one another in paired rounds; writes OUT/speed.json.

    A backend that has no results in OUT is judged first, at the smoke budget; one that is not conformant gets no time,
    nor one whose results are of other versions or of another state of its file.
    """
    if schema:
        screen.print_json(json_schema().decode())
        return
    if (self_test or history) and not gate:
        raise usage("--self-test and --history are of the gate: add --gate")
    if baseline and not count:
        raise usage("--baseline is of counters: add --counters")
    unknown = [name for name in preset if name not in presets.PRESETS]
    if unknown:
        raise usage(f"--preset: no preset named {unknown[0]!r}; known: {', '.join(presets.PRESETS)}")
    strange = [name for name in phase if name not in TIMED]
    if strange:
        raise usage(f"--phase: no phase named {strange[0]!r}; known: {', '.join(TIMED)}")
    chosen = {name: presets.PRESETS[name] for name in preset or DEFAULT_PRESETS}
    named = launches(backend or _default(chosen.values()), device, python)
    if count:
        raise typer.Exit(_counts(named, chosen, out, baseline))
    if gate:
        if python:
            raise usage("--python: the gate takes interpreters as --base and --head")
        if phase or restarts:
            raise usage("--phase and --restarts are not of the gate: it has its own")
        if self_test and budget is not None:
            raise usage("--budget: a self-test has --runs, each of them whole")
        common = {"seed": seed, "threads": threads} | ({} if seconds is None else {"seconds_per_case": seconds})
        with _one_at_a_time():
            if self_test:
                raise typer.Exit(_self_tests(named, chosen, head, runs, out, history or out / HISTORY, common))
            raise typer.Exit(_gates(named, chosen, base, head, out, {**common, "seconds": budget}))
    _judge(named, out)
    with _Shown() as shown, _one_at_a_time():
        record = controller.bench(
            named,
            chosen,
            out,
            out / "speed.json",
            seconds_per_case=seconds or protocol.SECONDS_PER_CASE,
            restarts=restarts or protocol.RESTARTS,
            seconds=budget,
            phases=phase,
            seed=seed,
            threads=threads,
            tell=shown.tell,
            advance=shown.advance,
        )
    for excluded in record.excluded:
        screen.print(escape(f"no time: {excluded.backend}, {excluded.preset}: {excluded.why}"))
    raise typer.Exit(0 if record.rounds else NOTHING)


def _counts(named: Mapping[str, WorkerSpec], chosen: Mapping[str, Preset], out: Path, baseline: Path | None) -> int:
    before = None if baseline is None else counters.read(baseline)
    record = counters.count(named, chosen, out / "counters.json", _say)
    found = counters.broken(record) + ([] if before is None else counters.compare(before, record))
    for words in counters.lines(found):
        _say(words)
    return exit_code(found) if found or record.counts else NOTHING


def _gates(
    named: Mapping[str, WorkerSpec],
    chosen: Mapping[str, Preset],
    base: str,
    head: str,
    out: Path,
    common: dict[str, Any],
) -> int:
    """The worst exit code of the backends."""
    codes = []
    with TemporaryDirectory(prefix="kvconform-") as folder:
        sides = {ref: environment(ref, Path(folder), _say) for ref in dict.fromkeys((base, head))}
        for name, spec in named.items():
            before, after = (sides[ref].spec(spec.address, spec.device) for ref in (base, head))
            record = pingpong.gate(
                before,
                after,
                chosen,
                name,
                out / "gate" / f"{name}.json",
                tell=_say,
                environments={"base": sides[base], "head": sides[head]},
                **common,
            )
            for words in record.lines():
                _say(f"{name}: {words}")
            codes.append(record.exit_code)
    return max(codes)


def _self_tests(
    named: Mapping[str, WorkerSpec],
    chosen: Mapping[str, Preset],
    head: str,
    runs: int,
    out: Path,
    history: Path,
    common: dict[str, Any],
) -> int:
    """0, or 1 where there were more false alarms than the stated rate lets expect."""
    told = []
    with TemporaryDirectory(prefix="kvconform-") as folder:
        side = environment(head, Path(folder), _say)
        for name, spec in named.items():
            mine = side.spec(spec.address, spec.device)
            place = out / "gate" / name
            told.append(self_test.self_test(mine, chosen, name, place, history, runs=runs, tell=_say, **common))
    return int(any(one.verdict == self_test.EXCEEDED for one in told))


def _say(words: str) -> None:
    screen.print(escape(words))


def _default(chosen: Iterable[Preset]) -> list[str]:
    return list(dict.fromkeys(name for one in chosen for name in one.backends))


def _judge(named: dict[str, WorkerSpec], out: Path) -> None:
    """Judges whom nobody has judged yet, or not to the end."""
    for name, spec in named.items():
        path = out / f"{name}.json"
        if path.exists() and not _cut_short(path):
            continue
        there = f"the results in {out} are not finished" if path.exists() else f"there are no results in {out}"
        screen.print(escape(f"{name}: {there}: it is judged first (smoke budget)"))
        run_backend(name, replace(spec, environment={}), Plan(EFFORTS["smoke"]), out)


def _cut_short(path: Path) -> bool:
    """Whether a run was interrupted; what cannot be read is told by who reads it for the bench."""
    with suppress(SpecError):
        return not read(path).finished
    return False


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """A GPU that another benchmark holds is missing infrastructure."""
    try:
        yield
    except GpuBusy as sentence:
        raise BackendUnavailable(str(sentence)) from None


class _Shown:
    """Lines, and on a terminal a bar with the time that remains."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TextColumn("{task.fields[left]}"),
            console=screen,
            transient=True,
            disable=not screen.is_terminal,
        )
        self.task = self.progress.add_task("bench", total=1.0, left="")
        self.tell: Callable[[str], None] = lambda words: self.progress.console.print(escape(words))

    def __enter__(self) -> _Shown:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def advance(self, done: float, remaining: float) -> None:
        minutes, seconds = divmod(round(remaining), 60)
        self.progress.update(self.task, completed=done, left=f"{minutes} min {seconds:02} s left")
