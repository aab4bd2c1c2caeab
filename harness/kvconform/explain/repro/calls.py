"""A backend and its programs as Python source: how it is imported and built, and its calls, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np

from kvconform.explain.repro.inputs import WIDTH, Run, filled, layout_of
from kvconform.worker.execute import INPUTS
from kvconform.worker.registry import TARGETS, installed, openers
from kvconform_specs.config import Config
from kvconform_specs.describe import describe
from kvconform_specs.program import (
    POISONS,
    AliasHandle,
    Append,
    Call,
    Close,
    Fork,
    Generate,
    Poison,
    ReadCache,
    Reject,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
    called,
)


# --- the target and its calls, for what follows the backend protocol ---
def target(address: str, config_names: dict[Config, str], device: str, truth: str) -> list[str]:
    """The lines that import a backend by its address and build it for each config."""
    lines = [*_imported(address), ""]
    for number, (config, name) in enumerate(config_names.items()):
        told = f"config{number or ''}"
        held = "{}" if truth == "self" or config.profile != "decoder" else f"weights({told})"
        shown = (f for f in fields(config) if f.name == "profile" or getattr(config, f.name) != f.default)
        arguments = ", ".join(f"{f.name}={_said(getattr(config, f.name))}" for f in shown)
        line = f"{told} = Config({arguments})"
        if len(line) > WIDTH:
            line = f"{told} = Config(\n{filled(arguments)}\n)"
        lines += [line, f"{name} = Backend({told}, {held}, {_said(device)})"]
    return lines


def _imported(address: str) -> list[str]:
    kind, colon, _rest = address.partition(":")
    if colon and kind in openers():
        return [
            "from kvconform.worker.registry import load",
            "",
            f"Backend = load({_said(address)})  # by entry point of {TARGETS}",
        ]
    points = installed()
    value = points[address].value if address in points else address
    module, _, name = value.rpartition(":")
    here = Path.cwd()
    if module.endswith(".py"):
        path = Path(module).resolve()
        beside = [f"sys.path.append({_said(str(here))})"] if path.is_relative_to(here) else []
        return [
            *beside,
            f"spec = importlib.util.spec_from_file_location({_said(path.stem)}, {_said(str(path))})",
            "module = importlib.util.module_from_spec(spec)",
            f"sys.modules[{_said(path.stem)}] = module",
            "spec.loader.exec_module(module)",
            f"Backend = module.{name}",
        ]
    root = here / module.partition(".")[0]
    own = root.is_dir() or root.with_suffix(".py").is_file()
    beside = [f"sys.path.insert(0, {_said(str(here))})"] if own and address not in points else []
    return [*beside, f"from {module} import {name} as Backend"]


def _said(value: object) -> str:
    """A literal; strings in double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def imports_of(address: str) -> list[str]:
    """The modules of the standard library that ``target`` needs."""
    return ["importlib.util"] if ".py:" in address and address.partition(":")[0] not in openers() else []


def calls(run: Run, backend: str, then: bool) -> list[list[str]]:
    """The lines of each step; ``then``: another program follows, so that what is open is ended behind the last."""
    names: dict[str, str] = {}
    lines = [list(_step(run, number, step, backend, names)) for number, step in enumerate(run.program.steps)]
    if then and names:
        open_ones = list(names.values())
        lines[-1] += [f"close({backend}, {', '.join(open_ones[i:])})" for i in range(len(open_ones))]
        lines[-1].append(f"del {', '.join(open_ones)}")
    return lines


def cache(seq: str) -> str:
    """The variable that holds a sequence's cache."""
    return f"cache_{seq}" if seq.isidentifier() else f"cache_{seq.encode().hex()}"


def _step(run: Run, number: int, step: Step, backend: str, names: dict[str, str]) -> Iterator[str]:
    comment = f"  # step {number}: {describe(run.program, number)}"
    call = called(step)
    if isinstance(step, Reject):
        yield f"try:{comment}, which must be refused"
        for line in _called(run, number, call, backend, dict(names)):
            yield f"    {line}"
        yield f"    {run.name('refused', number)} = False"
        yield "except Exception:"
        yield f"    {run.name('refused', number)} = True"
        return
    *first, last = _called(run, number, call, backend, names)
    yield from first
    yield last + comment
    if isinstance(step, Append) and step.count_macs:
        yield f"{run.name('work', number)} = {backend}.macs()"
    if isinstance(step, Append) and step.reused:
        for x in (run.name(letter, number) for letter in _letters(run)):
            yield f"{x}.fill({'-1' if run.program.config.profile == 'decoder' else 'np.nan'})  # by the caller"


def _called(run: Run, number: int, step: Call, backend: str, names: dict[str, str]) -> Iterator[str]:
    """The calls of one step; ``names`` are the open sequences and their variables."""
    if isinstance(step, Append | UncachedForward):
        watched = run.watched == number
        wrap = f"{layout_of(step)}({{}})" if layout_of(step) != "contiguous" and not watched else "{}"
        given = ", ".join(wrap.format(run.name(letter, number)) for letter in _letters(run))
        y = run.name("y", number)
        if watched:
            yield from _between_bands(run, number, step)
    name = cache(step.seq)
    match step:
        case Generate():
            yield f"{y} = {backend}.generate({given}, {step.new}{_of_run(step)})"
        case UncachedForward():
            yield f"{y} = {backend}.uncached_forward({given}{_of_run(step)})"
        case Append():
            if step.seq not in names:
                names[step.seq] = name
                yield f"{name} = {backend}.start({len(step.counts)})"
            yield f"{y}, {name} = {backend}.step({name}, {given}{_keywords(run, number, step)})"
        case Truncate():
            length = step.length if isinstance(step.length, int) else list(step.length)
            yield f"{name} = {backend}.truncate({name}, {length})"
        case Fork():
            names[step.into] = cache(step.into)
            yield f"{cache(step.into)} = {backend}.fork({name})"
        case AliasHandle():
            names[step.into] = cache(step.into)
            yield f"{cache(step.into)} = {name}"
        case Reorder():
            yield f"{name} = {backend}.reorder({name}, {list(step.rows)})"
        case Reset():
            yield f"{name} = {backend}.reset({name})"
        case ReadCache():
            yield f"{run.name('held', number)} = {backend}.contents({name})"
        case Poison():
            keys, values = (_float(POISONS[word]) for word in (step.keys, step.values))
            yield f"{backend}.poison({name}, {keys}, {values})"
        case Close():
            del names[step.seq]
            others = "".join(f", {other}" for other in names.values())
            yield f"close({backend}, {name}{others})"
            yield f"del {name}"


def _letters(run: Run) -> str:
    return "qkv" if run.program.config.profile == "attention" else "x"


def _between_bands(run: Run, number: int, step: Append | UncachedForward) -> Iterator[str]:
    """The inputs are handed over in memory of ``worker.caller_memory``."""
    names = [run.name(letter, number) for letter in _letters(run)]
    arrays = list(zip(INPUTS[run.program.config.profile], names, [layout_of(step)] * len(names), strict=True))
    if isinstance(step, Append):
        arrays += [("counts", run.name("n", number), "contiguous")] * (len(set(step.counts)) > 1)
        arrays += [("mask", run.name("m", number), "contiguous")] * bool(step.masked)
    yield f"arrays = [{', '.join(f'({_said(word)}, {name}, {_said(layout)})' for word, name, layout in arrays)}]"
    yield "memory = CallerMemory(room(arrays))"
    yield f"{', '.join(name for _word, name, _layout in arrays)}{',' * (len(arrays) == 1)} = memory.hand_over(arrays)"


def _float(number: float | None) -> str:
    return "None" if number is None else repr(number) if np.isfinite(number) else f"np.{number}"


def _keywords(run: Run, number: int, step: Append) -> str:
    said = []
    if len(set(step.counts)) > 1:
        said.append(f"counts={run.name('n', number)}")
        if step.pad is not None and step.pad[0] == "left":
            said.append('padding="left"')
    said += [f"mask={run.name('m', number)}"] if step.masked else []
    said += [f"{word}=True" for word in ("in_place", "count_macs") if getattr(step, word)]
    return "".join(f", {word}" for word in said) + _of_run(step)


def _of_run(step: Append | UncachedForward) -> str:
    """The keywords that appends and forwards without a cache have in common."""
    return ", last_only=True" * step.last_only + f", context={step.context}" * bool(step.context)
