"""What the import contracts in pyproject.toml cannot say: what is loaded, who calls a backend, how long a file is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

from kvconform.backend import Backend

PACKAGES = {
    folder.name: folder
    for folder in (
        ROOT / "specs" / "kvconform_specs",
        ROOT / "harness" / "kvconform",
        ROOT / "backends" / "kvconform_backends",
        ROOT / "reports" / "kvconform_reports",
    )
}
FRAMEWORKS = {"torch", "onnx", "onnxruntime", "onnxscript", "transformers", "jax"}
METHODS = {name for name in vars(Backend) if not name.startswith("_") and callable(getattr(Backend, name))}
"""What the harness may call of a backend that is built."""
LONGEST = 400


def modules(*packages: str) -> dict[str, Path]:
    """The files of the packages, by the name of their module."""
    return {
        ".".join((package, *file.relative_to(PACKAGES[package]).with_suffix("").parts)).removesuffix(".__init__"): file
        for package in packages
        for file in sorted(PACKAGES[package].rglob("*.py"))
    }


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


# --- imports ---
def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    """import-linter compares siblings; a package and its own modules may form a circle as well."""
    files = modules(*PACKAGES)
    graph = {
        name: {target if target in files else target.rpartition(".")[0] for target in imports(file)} & files.keys()
        for name, file in files.items()
    }
    TopologicalSorter({name: needed - {name} for name, needed in graph.items()}).prepare()


def loaded_by(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_imports_no_framework_and_nothing_third_party() -> None:
    assert not loaded_by("import kvconform") & {*FRAMEWORKS, "numpy", "hypothesis", "msgspec", "typer", "jinja2"}


def test_a_worker_needs_numpy_and_nothing_else() -> None:
    loaded = loaded_by("import kvconform.worker.server, kvconform_backends.numpy.cache")
    assert "numpy" in loaded
    assert not loaded & {*FRAMEWORKS, "hypothesis", "msgspec", "typer", "rich", "jinja2", "pytest"}


# --- exceptions of other people's code ---
def broad(package: str) -> Iterator[tuple[str, str]]:
    """Module and function of each ``except`` that catches every exception and lets none of them go on."""
    for name, file in modules(package).items():
        for function in ast.walk(tree(file)):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.ExceptHandler) and catches_all(node) and not raises_again(node):
                        yield name, function.name


def catches_all(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or bool({"Exception", "BaseException"} & names(handler.type))


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def calls_of_a_backend(node: ast.AST) -> set[str]:
    """The methods that are called on ``backend`` or ``self.backend``."""
    calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return {
        call.attr
        for call in calls
        if isinstance(call, ast.Attribute)
        and call.attr in METHODS
        and "backend" in (getattr(call.value, "id", ""), getattr(call.value, "attr", ""))
    }


def test_every_exception_is_caught_where_a_backend_runs_or_is_built_and_where_an_engine_answers() -> None:
    found = {place for package in PACKAGES for place in broad(package)}
    assert {place for place in found if not place[0].startswith("kvconform_backends.")} == {
        ("kvconform.worker.execute", "_guarded"),
        ("kvconform.worker.server", "serve"),
        ("kvconform.serving.process", "guarded"),
    }
    # opening a target runs its own code
    assert {place for place in found if ".targets." in place[0]} == {
        ("kvconform_backends.targets.third_party", "guarded")
    }


def test_only_workers_call_a_backend() -> None:
    files = modules("kvconform_specs", "kvconform", "kvconform_reports")
    calling = {name for name, file in files.items() if calls_of_a_backend(tree(file))}
    assert "kvconform.worker.execute" in calling
    timing = ("kvconform.bench.worker.", "kvconform.bench.counters.")
    assert {name for name in calling if not name.startswith(timing)} == {
        "kvconform.worker.execute",
        "kvconform.worker.server",
    }


def test_a_program_calls_a_backend_under_the_one_guard() -> None:
    module = tree(modules("kvconform")["kvconform.worker.execute"])
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    called = set.union(*(calls_of_a_backend(node) for node in functions.values()))
    assert {"start", "step", "uncached_forward", "generate", "truncate", "fork", "reorder", "reset"} <= called
    unguarded, seen = ["execute"], set()
    while unguarded:
        name = unguarded.pop()
        if name != "_guarded" and name not in seen:
            seen.add(name)
            assert not calls_of_a_backend(functions[name]), name
            unguarded += names(functions[name]) & functions.keys()
    guards = [node for node in ast.walk(functions["_guarded"]) if isinstance(node, ast.Try)]
    assert len(guards) == 1
    inside = {part for statement in guards[0].body for part in names(statement)} & functions.keys()
    assert inside == {"_do"}
    assert not calls_of_a_backend(ast.Module([s for s in functions["_guarded"].body if s is not guards[0]], []))


# --- files ---
@pytest.mark.parametrize("package", PACKAGES)
def test_a_file_has_at_most_400_lines_or_says_why(package: str) -> None:
    reason = re.compile(rf"^# Over {LONGEST} lines: \w+", re.MULTILINE)
    long = [
        name
        for name, file in modules(package).items()
        if len(lines := file.read_text().splitlines()) > LONGEST and not reason.search("\n".join(lines[:20]))
    ]
    assert not long
