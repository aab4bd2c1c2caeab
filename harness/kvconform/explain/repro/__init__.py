"""A failure as one Python file that needs the target and numpy only: what one pastes in an issue upstream.

It gives the target the counterexample's inputs, call by call, prints what came and what must come, and exits with 1
while the bug is there and with 0 once it is gone.
"""

from __future__ import annotations

import os
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from kvconform.errors import WorkerDied
from kvconform.explain.repro.calls import cache, calls, imports_of, target
from kvconform.explain.repro.checks import check
from kvconform.explain.repro.failure import Failure, located
from kvconform.explain.repro.inputs import WIDTH, Run, inputs, layouts
from kvconform.judging.render import render
from kvconform.search.counterexample import Counterexample
from kvconform.worker.client import WorkerClient
from kvconform_specs.clause import Case, Clause
from kvconform_specs.clauses import BY_NAME
from kvconform_specs.config import Config
from kvconform_specs.describe import describe
from kvconform_specs.program import Append, Close, Program, ReadCache, Reject, UncachedForward

OWN = ("platform", "source", "source of the reference", "kvconform")
"""What an environment names beside versions of distributions, and this package."""
PATIENCE = 120
"""Seconds after which a file says that the target hangs."""
"""The relations that look at outputs alone; the others ask for what only the backend protocol tells."""
TOLD = ("length", "free_slots", "bytes")
"""What a backend that claims to know is asked for after each step about a sequence (``record``)."""


def script(found: Counterexample, client: WorkerClient) -> str:
    """The file for a counterexample, as it breaks its clause on this backend now.

    Raises SpecError where it does not.
    """
    clause = BY_NAME[found.clause]
    before = [Program.from_json(program, f"before[{i}]") for i, program in enumerate(found.before)]
    failure, before = located(clause, client, before, Case.from_json(found.case, "case"))
    programs = [*before, *(one.program for one in failure.observed)]
    programs[-1] = replace(programs[-1], steps=programs[-1].steps[: failure.mismatch.end])
    single = len(programs) == 1
    runs = [Run(program, "" if single else f"{number}_") for number, program in enumerate(programs)]
    runs[-1] = replace(runs[-1], watched=failure.watched)
    body, imports = _body(failure, runs, client)
    words = render(msgspec.structs.replace(failure.mismatch, earlier_programs=len(before)))
    return "\n".join([*_header(clause, words, client), *_imports(imports, body), *body]) + "\n"


def tried(file: Path, python: str) -> str:
    """Runs a file once, and says in words what came of it."""
    try:
        done = subprocess.run(
            [python, file],
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
    except subprocess.TimeoutExpired:
        return f"{file} does not end"
    if done.returncode == 1 and "got: " in done.stdout:  # Python exits with 1 as well where the script itself is wrong
        return f"python {file} shows it, and exits with 1 until it is mended"
    last = (done.stderr or done.stdout).strip().splitlines()[-1:]
    return f"python {file} does not show the failure: exit code {done.returncode}, {' '.join(last)}"


# --- the file ---
def _header(clause: Clause, words: str, client: WorkerClient) -> list[str]:
    versions = {k: v for k, v in client.environment.items() if k not in OWN}
    where = f"{client.spec.address} on {client.spec.device}"
    with_ = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = clause.text.replace("`", "")
    paragraphs = [
        f"{words}.",
        "",
        f"This breaks {clause.name}: {text}",
        f"Target: {where}; {with_}, {client.environment.get('platform', '')}.",
        "Run it with OMP_NUM_THREADS=1: it exits with 1 while the bug is there, with 0 once it is gone.",
    ]
    lines = [line for p in paragraphs for line in textwrap.wrap(p, WIDTH - 3, break_long_words=False) or [""]]
    safe = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    return [*f'"""{safe}\n"""'.splitlines(), ""]


def _imports(wanted: Sequence[str], body: Sequence[str]) -> list[str]:
    """What the lines need; ``wanted``: further modules of the standard library."""
    text = "\n".join(body)
    names = {"base64": "base64.", "subprocess": "subprocess.", "sys": "sys."}
    standard = sorted({*wanted, *(name for name, used in names.items() if used in text)})
    lines = [*(f"import {name}" for name in standard), "", "import numpy as np"]
    if "= Config(" in text:  # a kvconform backend: it is built from these
        lines.append("from kvconform_specs.config import Config")
    if "CallerMemory(" in text:
        lines.append("from kvconform.worker.caller_memory import CallerMemory, room")
    if "weights(config" in text:
        lines.append("from kvconform_specs.tensors import weights")
    return [*lines, ""]


def _body(failure: Failure, runs: list[Run], client: WorkerClient) -> tuple[list[str], list[str]]:
    """The lines behind the imports, and which modules they need beyond numpy."""
    names = _names(runs)
    box = _black_box(failure, runs, client)
    if box is None:
        address = client.spec.address
        setup = target(address, names, client.spec.device, client.claims.reference)
        steps = [calls(run, names[run.program.config], run is not runs[-1]) for run in runs]
        sources, imports = [[line for step in program for line in step] for program in steps], imports_of(address)
        last, earlier = steps[-1][-1], [x for step in steps[-1][:-1] for x in step]
        if failure.raised:
            last = [*last, *_asked(runs[-1], names[runs[-1].program.config], client)]
    else:
        setup, imports = [line for line in box[0].strip().splitlines() if line != "import sys"], []
        while not setup[0]:
            del setup[0]
        sources = [source.strip().splitlines() for source in box[1]]
        last, earlier = sources[-1], []
    given = inputs(runs, box is None)
    lines = _watched() if failure.died else []
    lines += ["# the target", *setup, "", "# what it is given", *given]
    for run, source in zip(runs, sources, strict=True):
        whole = run is not runs[-1] or not (failure.raised or failure.accepted)
        lines += ["", f"# program {run.tag.rstrip('_')}" if run.tag else "# the steps"]
        lines += source if whole else earlier
    backend_name = names[runs[-1].program.config]
    if failure.raised or failure.accepted or failure.died:
        lines += _outcome(failure, runs[-1], last)
    else:
        relation = "what an output is like" if failure.mismatch.relation is None else failure.mismatch.relation.value
        if client.claims.reference == "self":
            forward = f"the reference, {client.reference_address}," if client.reference_address else "it"
            instead = f"what {forward} gives for the same tokens without a cache"
            relation = relation.replace("the definition's value", instead)
        compared = runs[-len(failure.observed) :]
        said = textwrap.wrap(f"what must hold: {relation}", WIDTH - 2)
        lines += ["", *(f"# {line}" for line in said), *check(failure, compared, backend_name)]
    return [*_tools(runs, lines), *lines, 'print("holds: the bug is gone")'], imports


def _names(runs: Sequence[Run]) -> dict[Config, str]:
    """A variable for the backend of each config."""
    configs = list(dict.fromkeys(run.program.config for run in runs))
    return {config: f"backend{number or ''}" for number, config in enumerate(configs)}


def _black_box(failure: Failure, runs: Sequence[Run], client: WorkerClient) -> tuple[str, list[str]] | None:
    """What the target's own adapter writes; None where it cannot say it without the backend protocol."""
    if client.claims.reference != "self" or failure.accepted:
        return None
    if failure.mismatch.relation is not None and not failure.mismatch.relation.judges_outputs:
        return None
    if any(isinstance(step, Append) and step.reused for run in runs for step in run.program.steps):
        return None
    try:
        return client.script(runs[0].program.config, [(run.program, run.tag) for run in runs])
    except WorkerDied:
        return None


def _asked(run: Run, name: str, client: WorkerClient) -> list[str]:
    """What the last step's sequence is asked for, which may raise as well."""
    step = run.program.steps[-1]
    if isinstance(step, UncachedForward | ReadCache | Close | Reject):
        return []
    return [f"{name}.{ability}({cache(step.seq)})" for ability in TOLD if client.claims.can(ability)]


def _tools(runs: Sequence[Run], lines: Sequence[str]) -> list[str]:
    """Functions that the lines call."""
    functions = layouts(runs)
    if any(" = raw(" in line for line in lines):
        functions.append(
            [
                "def raw(text, dtype, shape):",
                "    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy()",
            ]
        )
    if any(line.startswith("close(backend") for line in lines):
        functions.append(
            [
                "def close(backend, cache, *others):",
                '    if hasattr(backend, "close") and not any(cache is other for other in others):',
                "        backend.close(cache)",
            ]
        )
    spaced = [line for function in functions for line in ["", *function, ""]]
    return [*spaced, ""] if spaced else []


def _outcome(failure: Failure, run: Run, last: Sequence[str]) -> list[str]:
    """The end of a failure that has no numbers."""
    if failure.died:
        return []
    if failure.accepted:
        flag = run.name("refused", failure.step)
        what = describe(run.program, failure.step)
        return [
            *last,
            f"if not {flag}:",
            f'    print("got:  {what} was accepted\\nwant: it is refused with an exception")',
            "    sys.exit(1)",
        ]
    return [
        "try:",
        *(f"    {line}" if line else "" for line in last),
        "except Exception as error:",
        '    print(f"got:  {type(error).__name__}: {error}\\nwant: no exception")',
        "    sys.exit(1)",
    ]


def _watched() -> list[str]:
    """The file starts itself a second time, as the process that dies."""
    return [
        "if len(sys.argv) == 1:  # a second process makes the calls below, and dies of them",
        "    try:",
        f'        code = subprocess.run([sys.executable, __file__, "child"], timeout={PATIENCE}).returncode',
        "    except subprocess.TimeoutExpired:",
        f'        code = "no end within {PATIENCE} s"',
        "    if code == 0:",
        "        sys.exit(0)",
        '    print(f"got:  exit status {code}\\nwant: 0, of a process that runs to its end")',
        "    sys.exit(1)",
        "",
    ]
