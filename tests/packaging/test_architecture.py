"""Which package may import which, and what imports no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvconform
import kvconform_backends
import kvconform_reports
import kvconform_specs

ROOTS = {
    module.__name__: Path(module.__path__[0])
    for module in (kvconform_specs, kvconform, kvconform_backends, kvconform_reports)
}
MAY_IMPORT = {
    "kvconform_specs": set(),
    "kvconform": {"kvconform_specs"},
    "kvconform_backends": {"kvconform_specs", "kvconform"},
    "kvconform_reports": {"kvconform_specs", "kvconform"},
}
FRAMEWORKS = {"torch", "onnx", "onnxruntime", "onnxscript", "transformers", "jax"}
ARITHMETIC_OF_THE_ORACLE = {"definition", "oracle", "bounds"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", ROOTS)
def test_dependencies_point_towards_the_specs(package: str) -> None:
    for file in ROOTS[package].rglob("*.py"):
        roots = {name.partition(".")[0] for name in imports(file)} & set(ROOTS)
        assert roots <= MAY_IMPORT[package] | {package}, file


@pytest.mark.parametrize("package", ["kvconform_specs", "kvconform", "kvconform_reports"])
def test_only_backends_know_a_framework(package: str) -> None:
    for file in ROOTS[package].rglob("*.py"):
        assert not {name.partition(".")[0] for name in imports(file)} & FRAMEWORKS, file


def test_backends_share_no_arithmetic_with_the_oracle() -> None:
    for file in ROOTS["kvconform_backends"].rglob("*.py"):
        used = {name for name in imports(file) if name.startswith("kvconform_specs.")}
        assert not {part for name in used for part in name.split(".")} & ARITHMETIC_OF_THE_ORACLE, file


def loaded_by(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return {
        name.partition(".")[0]
        for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    }


def test_importing_the_package_imports_no_framework_and_nothing_third_party() -> None:
    assert not loaded_by("import kvconform") & {*FRAMEWORKS, "numpy", "hypothesis", "msgspec", "typer", "jinja2"}


def test_a_worker_needs_numpy_and_nothing_else() -> None:
    loaded = loaded_by("import kvconform.worker.server, kvconform_backends.numpy.cache")
    assert "numpy" in loaded
    assert not loaded & {*FRAMEWORKS, "hypothesis", "msgspec", "typer", "rich", "jinja2", "pytest"}


def test_the_harness_calls_a_subject_in_one_place_and_builds_it_in_another() -> None:
    broad = [
        file.name
        for root in (ROOTS["kvconform"], ROOTS["kvconform_specs"], ROOTS["kvconform_reports"])
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception"
    ]
    assert sorted(broad) == ["execute.py", "server.py"]


def test_code_of_others_is_expected_to_raise_in_one_place_while_a_target_is_opened() -> None:
    targets = ROOTS["kvconform_backends"] / "targets"
    broad = [file.name for file in targets.rglob("*.py") if "except Exception" in file.read_text()]
    assert broad == ["foreign.py"]


def test_a_module_is_read_in_one_sitting() -> None:
    for root in ROOTS.values():
        for file in root.rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 500, file
