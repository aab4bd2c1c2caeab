"""``kvconform check TARGET``: what a person has, judged without a backend being written for it.

A target is a module in a file, an ONNX decoder, a transformers model or a backend; each is an address that every other
command takes as well (``registry``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvconform.explain.visibility import text as visibility_text
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results, exit_code
from kvconform.search.effort import Effort
from kvconform.worker.registry import installed
from kvconform_specs.clauses import ALL
from kvconform_specs.errors import SpecError

SHOWN, DRAWN = 3, 2
"""Broken clauses that are printed in full, the others by name; maps that are drawn, the others in words."""
BUDGET = Effort("check", 8, 2, 20.0, rebuild=5.0, leaks=SHOWN)
"""A broken module shows in the first structures; the whole check of a small one is to take less than a minute."""
FORMS = (
    "file.py:NAME or package.module:NAME (a class, factory or function), decoder.onnx, "
    "hf:DIRECTORY or hf:CONFIG_CLASS (transformers), or the name of an installed backend"
)
CORE = {clause.name for clause in ALL if clause.core}


def addresses(target: str, options: Mapping[str, Any]) -> list[str]:
    """The addresses behind a target; a transformers model has one for each kind of cache. Raises SpecError."""
    if target.startswith("hf:"):
        caches = [options["cache"]] if "cache" in options else ["dynamic", "static"]
        return [_address("hf", target.removeprefix("hf:"), {**options, "cache": cache}) for cache in caches]
    if target.endswith(".onnx"):
        if not Path(target).is_file():
            raise SpecError("target", f"no file {target}")
        return [_address("onnx", target, options)]
    if target in installed():
        return [target]
    module, colon, name = target.rpartition(":")
    if not colon or not module or not name.isidentifier():
        raise SpecError("target", f"{target!r} is nothing that is known; known: {FORMS}")
    if module.endswith(".py") and not Path(module).is_file():
        raise SpecError("target", f"no file {module}")
    return [_address("py", target, options)]


def options(init: str, others: Sequence[str]) -> dict[str, Any]:
    """The options of a target from the command line. Raises SpecError where one is no JSON."""
    found: dict[str, Any] = {}
    for at, text in [("init", f"init={init}")] * bool(init) + [("option", text) for text in others]:
        name, equals, value = text.partition("=")
        if not equals:
            raise SpecError(at, f"want NAME=JSON, got {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            if at == "init" or not value.isidentifier():
                raise SpecError(at, f"{name} is no JSON: {value!r}") from None
            found[name] = value  # a word without its quotation marks
    if not isinstance(found.get("init", {}), dict):
        raise SpecError("init", f"want a JSON object, got {init!r}")
    return found


def _address(kind: str, target: str, options: Mapping[str, Any]) -> str:
    return f"{kind}:{target}" + (f"?{json.dumps(options, sort_keys=True)}" if options else "")


def lines(results: Results, folder: Path) -> Iterator[str]:
    """What a person reads: how the target was called, what is wrong with it, and what its outputs see."""
    if results.target is not None:
        yield f"{results.backend}: {results.target.recognised}"
        yield from (f"  assumed: {words}" for words in results.target.assumed)
        yield "  judged by its own cache-less forward; what is wrong in both alike is not seen (chapter definition)"
        for name, noise in results.target.noise.items():
            yield f"  noise floor [{name}]: outputs may stray by {noise:.1g} of their size at most"
    broken = [verdict for verdict in results.verdicts if verdict.outcome.broken]
    broken.sort(key=lambda verdict: verdict.clause not in CORE)  # what matters most first
    yield from diagnosed(results)
    for verdict in broken[:SHOWN]:
        yield from _failure(results, verdict, folder)
    if len(broken) > SHOWN:
        yield f"also broken: {', '.join(dict.fromkeys(v.clause for v in broken[SHOWN:]))}"
    yield from _maps(results)
    yield f"{results.backend}: {exit_code(results)[1]}"
    passed = sum(verdict.outcome is Outcome.PASS for verdict in results.verdicts)
    programs = sum(verdict.programs for verdict in results.verdicts)
    if results.verdicts:
        yield f"  {passed} clauses hold, {len(broken)} are broken; {programs} programs in {results.seconds:.0f} s"


def diagnosed(results: Results) -> Iterator[str]:
    """What is behaved like, config by config."""
    for name, found in results.diagnoses.items():
        if found.sentence:
            yield f"diagnosis [{name}]: {found.sentence}"


def _failure(results: Results, verdict: Verdict, folder: Path) -> Iterator[str]:
    yield f"broken: {verdict.clause}: {verdict.sentence}"
    if verdict.counterexample:
        file = folder / "failures" / results.backend / verdict.counterexample
        yield f"  replay: kvconform replay {file}   (--script bug.py writes it as one file)"


def _maps(results: Results) -> Iterator[str]:
    """Of each config the maps that are not what they must be, as pictures, and the others in words; where all are, one
    picture of what is seen."""
    drawn = False
    for name, maps in results.maps.items():
        wrong = [one for one in maps if not one.right]
        pictures = wrong[:DRAWN] or [one for one in maps if one.schedule == "chunked"] or maps[:1]
        right = [visibility_text.title(one) for one in maps if one.right]
        if right:
            yield f"visibility [{name}]: as demanded: {', '.join(right)}"
        for one in pictures:
            yield f"visibility [{name}]: {visibility_text.drawing(one)}"
        yield from (f"visibility [{name}]: {visibility_text.words(one)}" for one in wrong[DRAWN:])
        drawn = drawn or bool(pictures)
    if drawn:
        yield visibility_text.LEGEND
