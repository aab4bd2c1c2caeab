"""The importable API: public names, base classes, ``conformance()``, and the same error at every entry point."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import adapters
import pytest
from places import SUPPORT

import kvconform
from kvconform import (
    Backend,
    BackendUnavailable,
    BadArgument,
    BlackBox,
    Claims,
    Config,
    InvalidBackend,
    KvconformError,
    SpecError,
    Unavailable,
    UnknownClause,
    WorkerDied,
    WorkerTimeout,
    conformance,
)
from kvconform.backend import METHODS, completed, invalid
from kvconform.search.effort import DEFAULT_EFFORT
from kvconform.worker import registry
from kvconform.worker.registry import address_of, load
from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.claims import ABILITIES
from kvconform_specs.configs import config_named

SUBJECTS, ADAPTERS = SUPPORT / "subjects.py", SUPPORT / "adapters.py"
QUICK: dict[str, Any] = {"effort": "smoke", "configs": ("attention-gqa",)}


# --- names ---
def test_every_public_name_is_there_and_loaded_on_first_use() -> None:
    for name in kvconform.__all__:
        assert getattr(kvconform, name).__name__ == name
    assert {"Backend", "BlackBox", "Claims", "Config", "Results", "Verdict", "Outcome", "Mismatch"} <= {
        *kvconform.__all__
    }
    with pytest.raises(AttributeError, match="module 'kvconform' has no attribute 'Nothing'"):
        kvconform.Nothing  # noqa: B018


def test_every_error_is_one_of_ours_and_bad_input_is_a_value_error() -> None:
    errors = [getattr(kvconform, name) for name in kvconform.__all__]
    raised = [one for one in errors if isinstance(one, type) and issubclass(one, Exception)]
    assert len(raised) > 10
    assert all(issubclass(one, KvconformError) for one in raised)
    assert {one for one in raised if issubclass(one, ValueError)} == {
        BadArgument,
        InvalidBackend,
        SpecError,
        UnknownClause,
    }
    assert issubclass(Unavailable, BackendUnavailable)
    assert issubclass(WorkerTimeout, WorkerDied)
    lacking = Unavailable("this needs a GPU", "rent one")
    assert (lacking.sentence, lacking.remedy, str(lacking)) == (
        "this needs a GPU",
        "rent one",
        "this needs a GPU; rent one",
    )


# --- base classes ---
def test_the_methods_of_the_base_class_are_abilities_with_a_docstring() -> None:
    assert set(METHODS) <= set(ABILITIES)
    public = {name: value for name, value in vars(Backend).items() if inspect.isfunction(value) and name[0] != "_"}
    assert set(METHODS) <= set(public)
    assert all(inspect.getdoc(value) for value in public.values())


@pytest.mark.slow
def test_the_example_of_the_base_class_is_conformant(tmp_path: Path) -> None:
    source = inspect.getdoc(Backend)
    assert source is not None
    example = source.partition("the test that judges it:\n")[2]
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(example))
    found = conformance(f"{file}:MyCache", effort="smoke", configs=("attention-gqa", "attention-window"))
    assert found.counts["pass"] > 10
    window = {v.sentence for v in found.verdicts if v.config == "attention-window" and v.clause.startswith("shape")}
    assert "only plain causal attention is implemented" in window


class Least(Backend):
    claims = kvconform.Claims()

    def __init__(self, *_: Any) -> None: ...

    def start(self, batch: int) -> None: ...

    def step(self, cache: None, *inputs: Any, **options: Any) -> tuple[Any, None]:
        return None, None


def test_start_step_and_the_constructor_are_required_and_the_rest_has_defaults() -> None:
    assert Backend.__abstractmethods__ == {"__init__"}  # start and step are demanded where claims name them: invalid()
    assert BlackBox.__abstractmethods__ == {"__init__", "uncached_forward", "perturbed"}
    least = Least()
    assert Least.refuses(config_named("attention-gqa"), "cpu") is None
    assert (least.runtime_info(), least.allocated(), least.device_ns(print, 1)) == ({}, None, None)
    assert least.cache_design is None
    called: list[int] = []
    assert least.count(lambda: called.append(1)) == {}
    assert called == [1]
    for name in METHODS:
        parameters = inspect.signature(getattr(least, name)).parameters.values()
        arguments = [None for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        with pytest.raises(NotImplementedError, match=f"Least does not implement the ability '{name}'"):
            getattr(least, name)(*arguments)


def test_a_class_without_the_base_class_works_and_gets_the_defaults() -> None:
    built = completed(adapters.Duck(config_named("attention-gqa"), {}, "cpu"))
    assert isinstance(built, Backend)
    assert type(built).__name__ == "Duck"
    assert built.runtime_info() == {}
    assert built.close(built.start(1)) is None  # type: ignore[func-returns-value]
    mine = NumpyCache(config_named("attention-gqa"), {})
    assert completed(mine) is mine
    found = conformance(adapters.Duck, **QUICK, clauses=("shape", "lifecycle.reset"))
    assert found.counts["pass"] == 4
    unsupported = {v.sentence for v in found.verdicts if v.outcome.value == "unsupported"}
    assert unsupported == {"claims no length", "claims no empty append"}


# --- loading ---
WRONG = {
    "NoClaims": "declares no claims (an attribute ``claims = Claims(...)``)",
    "ClaimsADictionary": "claims is a dict, want kvconform.Claims",
    "NoStep": "has no method step()",
    "NoConstructor": "has no constructor __init__(config, weights, device)",
    "ClaimWithoutMethod": "claims the ability 'truncate' and has no method truncate()",
    "BaseClaimWithoutMethod": "claims the ability 'length' and has no method length()",
    "MethodWithoutClaim": "has a method reset() and does not claim the ability 'reset': claim it, or rename the method",
    "MethodBelowTheClaims": "has a method fork() and does not claim the ability 'fork': claim it, or rename the method",
}


@pytest.mark.parametrize("name", WRONG)
def test_claims_and_methods_that_disagree_are_one_sentence_when_the_class_is_loaded(name: str) -> None:
    with pytest.raises(InvalidBackend) as raised:
        load(f"{ADAPTERS}:{name}")
    assert str(raised.value) == f"backend '{ADAPTERS}:{name}' {WRONG[name]}"


@pytest.mark.slow
def test_a_claim_that_is_not_one_of_the_known_ones_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from kvconform import Claims\nclass Mine:\n    claims = Claims(returns='first')\n")
    for address in (f"{file}:Mine", f"py:{file}:Mine"):
        with pytest.raises(InvalidBackend, match=r"claims\.returns: unknown value 'first'; known: all, last"):
            conformance(address, **QUICK)


def test_a_subclass_that_narrows_its_claims_may_inherit_methods() -> None:
    assert load(f"{ADAPTERS}:Narrowed").claims.abilities == ("reset",)


def test_every_shipped_backend_loads() -> None:
    for name in ("numpy", "numpy-static", "numpy-ring", "numpy-paged", "numpy-int8"):
        assert issubclass(load(name), Backend)


def test_a_nested_class_works_and_a_local_one_is_one_sentence() -> None:
    assert address_of(adapters.Outer.Nested) == f"{ADAPTERS}:Outer.Nested"
    found = conformance(adapters.Outer.Nested, **QUICK, clauses=("shape.output",))
    assert found.backend == "Outer.Nested"

    class Local(NumpyCache):
        pass

    with pytest.raises(InvalidBackend, match="Local is defined inside a function, where a worker cannot import it"):
        conformance(Local)


# --- conformance() ---
def test_the_default_effort_is_the_same_at_every_entry_point() -> None:
    assert inspect.signature(conformance).parameters["effort"].default == DEFAULT_EFFORT == "pr"


@pytest.mark.slow
def test_conformance_returns_results_or_raises_each_sentence(tmp_path: Path) -> None:
    good = conformance("numpy", **QUICK, clauses=("shape",))
    assert (len(good.verdicts), good.ok, good.failures, good.exit_code) == (5, True, (), 0)
    with pytest.raises(AssertionError, match=r"definition\.attention on .*PrintsAndIsWrong \[attention-gqa\]: step"):
        conformance(f"{SUBJECTS}:PrintsAndIsWrong", **QUICK, clauses=("definition",), out=tmp_path)
    assert (tmp_path / "PrintsAndIsWrong.json").exists()
    with pytest.raises(AssertionError, match="no PASS on the core clauses"):
        conformance(f"{SUBJECTS}:ClaimsNothing", effort="smoke")


def test_conformance_does_not_pass_for_nothing() -> None:
    with pytest.raises(AssertionError, match="no cell of the selected part passed"):
        conformance(f"{SUBJECTS}:FewAbilities", **QUICK, clauses=("batch.left-padding",))
    with pytest.raises(AssertionError, match="no cell of the selected part passed"):
        conformance(f"{SUBJECTS}:FewAbilities", **QUICK, clauses=("contents",))


@pytest.mark.slow
def test_a_worker_may_use_another_interpreter_and_timeout() -> None:
    with pytest.raises(BackendUnavailable, match="interpreter '/no/python' cannot be started"):
        conformance("numpy", **QUICK, python="/no/python")
    with pytest.raises(AssertionError, match=r"no answer within 0\.5 s"):
        conformance(f"{SUBJECTS}:Hangs", **QUICK, clauses=("definition.attention",), step_timeout=0.5)


# --- the same mistake at the three entry points ---
MISTAKES: dict[str, tuple[dict[str, Any], int, type[Exception], str]] = {
    "effort": ({"effort": "quick"}, 2, BadArgument, "unknown effort 'quick'; known: smoke, pr, nightly"),
    "dtype": ({"dtypes": ("int8",)}, 2, BadArgument, "unknown dtype 'int8'; known: float32, bfloat16, float16"),
    "device": ({"device": "tpu"}, 2, BadArgument, "unknown device 'tpu'; known: cpu, cuda"),
    "clause": ({"clauses": ("equivalnce",)}, 2, UnknownClause, "no clause starts with 'equivalnce'; chapters: shape"),
    "config": ({"configs": ("tiny",)}, 2, BadArgument, "no config starts with 'tiny'; known: attention-gqa"),
    "ledger": ({"known_failures": "none.toml"}, 2, SpecError, "none.toml: cannot be read: No such file or directory"),
    "invalid": ({"backend": f"{ADAPTERS}:NoStep"}, 2, InvalidBackend, "has no method step()"),
    "unknown": ({"backend": "eagr"}, 3, BackendUnavailable, "no backend named 'eagr'; installed: compiled, eager"),
    "broken": ({"backend": "nowhere:Thing"}, 3, BackendUnavailable, "cannot be imported: no module named 'nowhere'"),
    "lacking": ({"backend": f"{SUBJECTS}:CannotRunHere"}, 3, Unavailable, "this backend needs a quantum computer"),
    "wrong": ({"backend": f"{SUBJECTS}:PrintsAndIsWrong"}, 1, AssertionError, "definition.attention on "),
}
OPTIONS = {"dtypes": "dtype", "clauses": "clause", "configs": "config", "known_failures": "known-failures"}


def options(arguments: dict[str, Any], prefix: str) -> list[str]:
    """The arguments of ``conformance()`` as options of another entry point."""
    words = []
    for name, value in arguments.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"{prefix}{OPTIONS.get(name, name)}", str(one)]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_the_same_sentence_at_every_entry_point(mistake: str, tmp_path: Path) -> None:
    given, code, error, words = MISTAKES[mistake]
    arguments = {"backend": "numpy", **QUICK, "clauses": ("definition.attention",), **given}
    with pytest.raises(error) as raised:
        conformance(**arguments)
    assert type(raised.value) is error
    assert words in str(raised.value)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False, cwd=tmp_path
        )

    line = run("kvconform", "run", *options(arguments, "--"))
    assert line.returncode == code
    assert words in line.stdout + line.stderr
    assert "Traceback" not in line.stderr

    suite = ["pytest", "-p", "no:cacheprovider", "-q", "-rs", "--pyargs", "kvconform.pytest_plugin.suite"]
    items = run(*suite, *options(arguments, "--kv-"))
    assert words in items.stdout + items.stderr
    assert "Traceback" not in items.stderr
    if error is Unavailable:
        assert (items.returncode, "1 skipped" in items.stdout) == (0, True)
    elif code == 2 and error is not InvalidBackend:
        assert items.returncode not in (0, 1)
    else:
        assert (items.returncode, "1 failed" in items.stdout) == (1, True)


def test_a_backend_whose_package_is_missing_is_unavailable_and_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("onnx", "needs_more:Thing", registry.GROUP)
    monkeypatch.setattr(registry, "installed", lambda: {"onnx": point})
    with pytest.raises(Unavailable) as raised:
        load("onnx")
    assert raised.value.sentence == "backend 'onnx' is not installed: it needs 'no_such_package'"
    assert raised.value.remedy == "install it with: pip install its distribution"


def test_methods_of_an_adapter_that_delegates_are_not_judged_before_it_is_built() -> None:
    class Delegates:
        claims = Claims(profiles=("decoder",), abilities=("length",))

        def __init__(self, config: Config, weights: Mapping[str, Any], device: str) -> None:
            self.inner: Any = None

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    assert invalid(Delegates) == ""
