"""A target's calls as Python source without this package, for upstream bug reports."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kvconform_backends.targets.module.recognised import Recognised
from kvconform_backends.targets.module.signature import concrete
from kvconform_specs.describe import describe
from kvconform_specs.program import (
    AliasHandle,
    Append,
    Close,
    Fork,
    Program,
    Reorder,
    Reset,
    Step,
    Truncate,
    UncachedForward,
)


class Origin(Protocol):
    """Where a target comes from (``target.Source``)."""

    @property
    def file(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def init(self) -> Mapping[str, Any]: ...
    @property
    def seed(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype | None: ...


class ModuleScript:
    """Source for one build of a target. ``built``: the call of its name, and the names this uses; None if the name is
    the target itself."""

    def __init__(
        self,
        source: Origin,
        found: Recognised,
        module: Any,
        built: tuple[str, tuple[str, ...]] | None,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.source, self.found, self.convention = source, found, found.convention
        self.device, self.dtype, self.module, self.built = device, dtype, module, built
        self.callee = source.name if built is None and not isinstance(module, nn.Module) else "module"

    def setup(self) -> str:
        source = self.source
        used = () if self.built is None else self.built[1]
        names = ", ".join(dict.fromkeys((source.name, *used, *self.convention.imports)))
        path = Path(source.file).resolve()
        lines = ["import sys", "", "import torch", ""]
        if not source.file.endswith(".py"):
            lines += [f"torch.manual_seed({source.seed})", f"from {source.file} import {names}"]
        elif path.stem.isidentifier() and path.stem not in sys.stdlib_module_names:
            lines += [
                f"sys.path.insert(0, {str(path.parent)!r})",
                f"torch.manual_seed({source.seed})",
                f"from {path.stem} import {names}",
            ]
        else:  # a name that cannot be imported, or a standard module's
            lines += [
                "import runpy",
                f"torch.manual_seed({source.seed})",
                f"names = runpy.run_path({str(path)!r})",
                *(f"{name} = names[{name!r}]" for name in names.split(", ")),
            ]
        lines += ["", f"torch.manual_seed({source.seed})"]
        if self.callee == "module":
            lines.append(f"module = {source.name if self.built is None else self.built[0]}")
        if isinstance(self.module, nn.Module):
            lines.append("module.eval()")
            if source.dtype is not None:
                lines.append(f"module.to({source.dtype})")
            if self.device != "cpu":
                lines.append(f"module.to({self.device!r})")
        if "copy." in self.convention.fork:
            lines.insert(0, "import copy")
        if "device" in self.convention.empty + self.convention.begin + self.convention.reorder:
            lines.append(f"device = {self.device!r}")
        return "\n".join([*lines, "torch.set_grad_enabled(False)", ""])

    def steps(self, program: Program, tag: str) -> str:
        lines: list[str] = []
        held: dict[str, tuple[int, int]] = {}  # rows and tokens of each sequence
        self._ragged: set[str] = set()  # sequences with rows of different lengths
        for number, step in enumerate(program.steps):
            *first, last = self._step(number, step, tag, held)
            lines += [*first, f"{last}  # step {number}: {describe(program, number)}"]
        return "\n".join(lines) + "\n"

    def _step(self, number: int, step: Step, tag: str, held: dict[str, tuple[int, int]]) -> Iterator[str]:
        name = f"{tag}{number}"
        if isinstance(step, Append):
            batch, cached = held.get(step.seq, (len(step.counts), 0))
            if step.seq not in held:
                yield from self._begun(step.seq, batch)
            held[step.seq] = batch, cached + max(step.counts)
            yield from self._told(step)
            if "sofar" in self.convention.call:
                held_before = f"np.concatenate([{all_of(step.seq)}, x{name}], axis=1)" if cached else f"x{name}"
                yield f"{all_of(step.seq)} = {held_before}"
            new = max(step.counts)
            numbers = {"batch": batch, "new": new, "cached": cached, "context": step.context}
            self._ragged.update({step.seq} if len(set(step.counts)) > 1 else ())
            text = self.convention.call
            if self.convention.one_by_one and cached and new > 1:
                yield from self._one_by_one(name, step, batch, cached)
                return
            if step.seq in self._ragged:
                text = re.sub(r"\bcounts\b", str(list(step.counts)), self.convention.ragged)
            yield from self._called(name, step.seq, numbers, text)
        elif type(step) is UncachedForward:
            yield from self._uncached(name, step)
        elif isinstance(step, Reset):
            held[step.seq] = held[step.seq][0], 0
            yield from list(self._begun(step.seq, held[step.seq][0]))
        elif isinstance(step, AliasHandle):
            held[step.into] = held[step.seq]
            yield f"{past_of(step.into)} = {past_of(step.seq)}"
            if "sofar" in self.convention.call:
                yield f"{all_of(step.into)} = {all_of(step.seq)}"
        elif isinstance(step, Truncate):
            batch, cached = held[step.seq]
            length = step.lengths(batch)[0]
            held[step.seq] = batch, length
            names: dict[str, int | str] = {
                "batch": batch,
                "cached": cached,
                "length": length,
                "past": past_of(step.seq),
            }
            call = self._text(self.convention.truncate, names)
            if "sofar" in self.convention.call:
                yield f"{all_of(step.seq)} = {all_of(step.seq)}[:, :{length}]"
            yield f"{past_of(step.seq)} = {call}" if self.found.truncated_new else call
        elif isinstance(step, Fork):
            held[step.into] = held[step.seq]
            yield f"{past_of(step.into)} = {self._text(self.convention.fork, {'past': past_of(step.seq)})}"
            if "sofar" in self.convention.call:
                yield f"{all_of(step.into)} = {all_of(step.seq)}"
        elif isinstance(step, Reorder):
            yield from self._reordered(step, held)
        elif isinstance(step, Close):
            del held[step.seq]
            yield f"{past_of(step.seq)} = None"
        else:
            raise ValueError(f"steps[{number}]: a module called by convention does not support {type(step).__name__}")

    def _reordered(self, step: Reorder, held: dict[str, tuple[int, int]]) -> Iterator[str]:
        batch, cached = held[step.seq]
        held[step.seq] = len(step.rows), cached
        if not cached:
            yield from list(self._begun(step.seq, len(step.rows)))
            return
        past, rows = past_of(step.seq), list(step.rows)
        if "sofar" in self.convention.call:
            yield f"{all_of(step.seq)} = {all_of(step.seq)}[{rows}]"
        call = self._text(self.convention.reorder, {"batch": batch, "rows": str(rows), "past": past})
        yield f"{past} = {call}" if self.found.reordered_new else call

    def _begun(self, seq: str, batch: int) -> Iterator[str]:
        convention, numbers = self.convention, {"batch": batch, "new": 0, "cached": 0}
        if convention.begin:
            yield self._text(convention.begin, numbers)
        if not convention.owned:
            yield f"{past_of(seq)} = {self._text(convention.empty, numbers)}"
        elif not convention.begin:
            yield f"# {seq} starts: the cache cannot be emptied"

    def _told(self, step: Append | UncachedForward) -> Iterator[str]:
        if self.convention.tell:
            yield self._text(self.convention.tell, {"context": step.context})

    def _called(self, name: str, seq: str, numbers: Mapping[str, int], text: str) -> Iterator[str]:
        c, past = self.convention, past_of(seq)
        call = re.sub(r"\bsofar\b", self._into(all_of(seq)), self._text(text, {**numbers, "past": past}))
        x = self._into(f"x{name}")
        output = self._text(c.output, numbers)
        if (c.output, c.present) == ("out[0]", "out[1]") and c.arrays == "torch" and c.batched:
            yield f"y{name}, {past} = {_fed(call, x)}"
        elif c.output == "out" and c.present in ("", "past"):
            yield f"y{name} = {_fed(call, x)}"
        else:
            yield f"out = {_fed(call, x)}"
            if c.present not in ("", "past"):
                yield f"{past} = {c.present}"
            yield f"y{name} = {output}"
        yield f"y{name} = {self._out(f'y{name}')}"

    def _one_by_one(self, name: str, step: Append, batch: int, cached: int) -> Iterator[str]:
        """A call for each token; all their outputs together."""
        yield f"y{name}, x = [], x{name}"
        for token in range(max(step.counts)):
            numbers = {"batch": batch, "new": 1, "cached": cached + token, "context": step.context}
            yield f"x{name} = x[:, {token}:{token + 1}]"
            for line in self._called(name, step.seq, numbers, self.convention.call):
                yield line.replace(f"y{name}", f"one{name}")
            yield f"y{name}.append(one{name})"
        yield f"y{name} = np.concatenate(y{name}, axis=1)"

    def _uncached(self, name: str, step: UncachedForward) -> Iterator[str]:
        c, batch, new = self.convention, len(step.counts), step.counts[0]
        numbers = {"batch": batch, "new": new, "cached": 0, "context": step.context}
        if c.always and c.begin:
            yield self._text(c.begin, numbers)
        yield from self._told(step)
        if self.found.uncached_last:
            yield from self._prefixes(name, batch, new, step.context)
            return
        call = self._text(c.uncached, {**numbers, "past": c.empty})
        part = c.uncached_output.removeprefix("out")  # of what it returns
        yield f"y{name} = {_fed(call, self._into(f'x{name}'))}{part}"
        yield f"y{name} = {self._out(f'y{name}')}"

    def _prefixes(self, name: str, batch: int, new: int, context: int) -> Iterator[str]:
        """The uncached forward of each prefix, if it returns only the last output."""
        c = self.convention
        call = self._text(c.uncached, {"batch": batch, "new": "n", "cached": 0, "context": context, "past": c.empty})
        yield f"y{name} = []"
        yield f"for n in range(1, {new + 1}):"
        yield f"    out = {_fed(call, self._into(f'x{name}[:, :n]'))}"
        yield f"    y{name}.append(np.array({self._out(c.uncached_output)})[:, -1:])"
        yield f"y{name} = np.concatenate(y{name}, axis=1)"

    def _text(self, expression: str, numbers: Mapping[str, int | str]) -> str:
        text = concrete(expression, numbers, self.device)
        return re.sub(r"(?<![\w.])module(?!\w)", self.callee, text)

    def _into(self, x: str) -> str:
        row = x if self.convention.batched else f"{x}[0]"
        row += ".swapaxes(0, 1)" * self.convention.sequence_first
        if self.convention.arrays == "numpy":
            return row
        text = f"torch.from_numpy({row})"
        if self.convention.takes == "states" and self.dtype is not torch.float32:
            text += f".to({self.dtype})"
        return text if self.device == "cpu" else f"{text}.to({self.device!r})"

    def _out(self, y: str) -> str:
        plain = self.device == "cpu" and self.dtype is torch.float32
        text = f"{y}.numpy()" if plain else f"{y}.float().cpu().numpy()"
        text = y if self.convention.arrays == "numpy" else text
        text += ".swapaxes(0, 1)" * self.convention.sequence_first
        return text if self.convention.batched else f"{text}[None]"


def all_of(seq: str) -> str:
    """The variable that holds all tokens of a sequence."""
    return past_of(seq).replace("past_", "all_", 1)


def past_of(seq: str) -> str:
    """The variable that holds a sequence's past."""
    return f"past_{seq}" if seq.isidentifier() else f"past_{seq.encode().hex()}"


def _fed(call: str, x: str) -> str:
    """The call with its input filled in."""
    return re.sub(r"(?<![\w.])x(?![\w=])", lambda _found: x, call)
