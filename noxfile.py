"""The project's jobs. ``nox`` alone is the main one: conformance of each backend, then speed, then the report.

torch is installed first and pinned (constraints.txt): what depends on it would otherwise choose another build.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["conformance", "speed", "report"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")
RESULTS = Path("results")
BACKENDS = ("eager", "compiled", "onnx")
"""Each in its own environment, which is also the one whose interpreter is timed."""
TORCH = {"eager", "compiled", "onnx", "hf", "py"}
"""Extras that need torch."""
STUDIES = "docs/studies"
"""Studies and page generators; they are not part of the wheel."""
UNSUPPORTED_HERE = 3
"""Exit code of a backend that this machine cannot run: one sentence, and the others go on."""


def install(session: nox.Session, *extras: str) -> None:
    """torch first, then the project as a wheel, so that nothing is read from the checkout by accident."""
    if TORCH & set(extras):
        session.install(*CONSTRAINTS, "torch")
    session.install(*CONSTRAINTS, f".[{','.join(extras)}]" if extras else ".")


def budget(session: nox.Session) -> list[str]:
    """``nox -- --budget smoke`` hands its options to every conformance run."""
    return list(session.posargs)


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def conformance(session: nox.Session, backend: str) -> None:
    """Judges one backend in an environment of its own; results/<backend>.json."""
    install(session, backend)
    session.run(
        "kvconform", "run", "-b", backend, "--out", str(RESULTS), *budget(session), success_codes=[0, UNSUPPORTED_HERE]
    )


@nox.session
def speed(session: nox.Session) -> None:
    """Times the conformant backends against one another, each in its own environment; results/speed.json."""
    install(session)
    ready = {name: python for name in BACKENDS if (python := interpreter(session, name)) is not None}
    if not ready:
        session.error("no backend has been judged yet: run nox -s conformance first")
    smoke = "smoke" in session.posargs
    short = ["--seconds", "0.5", "--restarts", "2"] if smoke else ["--budget", "360"]
    device = ["--device", "cuda"] if "cuda" in session.posargs else []
    command = ["kvconform", "bench", "--out", str(RESULTS), *short, *device]
    for phase in ("prefill", "decode", "recompute", "recompute-last", "generate"):  # whole loops without a cache: no
        command += ["--phase", phase]
    for name, python in ready.items():
        command += ["-b", name, "--python", f"{name}={python}"]
    session.run(*command, success_codes=[0, 5])  # 5: nothing was conformant, which the report shows


def interpreter(session: nox.Session, backend: str) -> str | None:
    """The interpreter of a backend's conformance environment."""
    place = Path(session.virtualenv.location).parent / f"conformance-{backend}"
    for python in (place / "bin" / "python", place / "Scripts" / "python.exe"):
        if python.exists():
            return str(python)
    return None


@nox.session
def report(session: nox.Session) -> None:
    """Writes reports/out/report.html and prints a short table."""
    install(session)
    files = sorted(str(file) for file in RESULTS.glob("*.json"))
    if not files:
        session.error("there are no results yet: run nox -s conformance first")
    extra = ["--markdown", os.environ["GITHUB_STEP_SUMMARY"]] if "GITHUB_STEP_SUMMARY" in os.environ else []
    session.run("kvconform", "report", *files, *extra)


@nox.session
def gate(session: nox.Session) -> None:
    """Compares results/ with the baseline: nox -s gate -- --baseline docs/baseline."""
    install(session)
    files = [str(RESULTS / f"{name}.json") for name in BACKENDS if (RESULTS / f"{name}.json").exists()]
    if not files:
        session.error("there are no results yet: run nox -s conformance first")
    session.run("kvconform", "gate", *files, *(session.posargs or ["--baseline", "docs/baseline"]))


@nox.session
def tests(session: nox.Session) -> None:
    """All tests: the spec, the machine, the faults, the backends, targets, packaging and the report in a browser."""
    install(session, "eager", "compiled", "onnx", "hf")
    session.install(*CONSTRAINTS, "-r", "tests/requirements.txt")
    browser(session)
    jobs = [] if any(arg.startswith("-n") for arg in session.posargs) else ["-n", "2"]
    session.run(
        "pytest", *jobs, "--dist", "loadgroup", *session.posargs, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": STUDIES}
    )


def browser(session: nox.Session) -> None:
    """Debian's Chromium, where it can be had; elsewhere the browser tests skip and say so, but never in CI."""
    if shutil.which("chromium") is None and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        session.run("apt-get", "update", "-qq", external=True, silent=True)
        session.run(
            "apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", external=True, silent=True
        )


@nox.session
def lint(session: nox.Session) -> None:
    """ruff and mypy --strict over the four source roots."""
    install(session, "eager", "compiled", "onnx", "hf")
    session.install(*CONSTRAINTS, "ruff", "mypy", "-r", "tests/requirements.txt")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(default=False)
def designs(session: nox.Session) -> None:
    """Checks four published designs, as intended and as published; docs/published-designs.md."""
    install(session, "eager", "hf")
    page = ["python", f"{STUDIES}/published_designs.py", str(RESULTS / "designs")]
    for command in str(session.run(*page, silent=True)).splitlines():
        session.run(*shlex.split(command), success_codes=[0, 1])  # 1: as published, some are broken
    session.run(*page, "-o", "docs/published-designs.md")


COUNTED = (
    "numpy",
    "eager",
    "eager-static",
    "compiled",
    "onnx",
    "onnx-shared",
    "past-tuples",
    "module-buffers",
    "list-cache",
)


@nox.session(default=False)
def counters(session: nox.Session) -> None:
    """Counts what each backend does, and compares with the baseline; results/counters.json."""
    install(session, "eager", "compiled", "onnx")
    chosen = [word for name in COUNTED for word in ("-b", name)]
    session.run(
        "kvconform",
        "bench",
        "--counters",
        *chosen,
        "--out",
        str(RESULTS),
        *(session.posargs or ["--baseline", "docs/baseline/counters.json"]),
    )


@nox.session(default=False)
def stopwatch(session: nox.Session) -> None:
    """Proves the stopwatch on equal and slowed code; docs/latency.md. Leave the machine alone meanwhile."""
    install(session)
    samples = "docs/latency-samples.json.gz"
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": STUDIES}
    session.run("python", "-m", "timing.collect", "-o", samples, *session.posargs, env=quiet)
    history = ("--history", "docs/gate-history.jsonl")
    session.run("python", "-m", "timing.page", samples, *history, "-o", "docs/latency.md", env=quiet)


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Tries every planted fault; results/audit.json, which the report shows: nox -s audit -- --budget pr."""
    install(session, "eager", "onnx")
    session.run("kvconform", "audit", "-o", str(RESULTS / "audit.json"), *session.posargs)


@nox.session(default=False)
def numpy(session: nox.Session) -> None:
    """Judges the numpy backend, the one that needs nothing."""
    install(session)
    session.run("kvconform", "run", "-b", "numpy", "--out", str(RESULTS), *budget(session))
