"""A program on an ONNX decoder as Python source that needs only onnxruntime and numpy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvconform_backends.targets.onnx.signature import GraphSignature
from kvconform_specs.describe import describe
from kvconform_specs.program import Append, Close, Program, Reset, UncachedForward


@dataclass(frozen=True)
class GraphCall:
    """A graph, and its name in the script."""

    name: str
    path: Path
    signature: GraphSignature

    def feeds(self, x: str, batch: int, past: int, t: int | str, held: str) -> str:
        """Its inputs for ``t`` tokens ``x`` after ``past`` others stored in ``held``; ``t`` may be a name."""
        s = self.signature
        feeds = {s.tokens.name: f"{x}.astype(np.{s.tokens.dtype})"}
        end = past + t if isinstance(t, int) else t
        if s.mask is not None:
            feeds[s.mask.name] = f"np.ones(({batch}, {end}), {_scalar(s.mask.dtype)})"
        for tensor in (s.positions, s.cache_position):
            if tensor is not None:
                rows = 1 if tensor.axes[0] == 1 else batch
                counted = f"np.arange({past}, {end}, dtype={_scalar(tensor.dtype)})"
                feeds[tensor.name] = counted if len(tensor.axes) == 1 else f"np.tile({counted}, ({rows}, 1))"
        if s.branch is not None:
            feeds[s.branch.name] = f"np.full({(1,) * len(s.branch.axes)}, {past > 0})"
        if s.kept is not None:
            feeds[s.kept.name] = f"np.zeros({(1,) * len(s.kept.axes)}, {_scalar(s.kept.dtype)})"
        feeds |= {tensor.name: f"np.array({s.window}, {_scalar(tensor.dtype)})" for tensor in s.windows}
        items = [f"{_text(name)}: {value}" for name, value in feeds.items()]
        if s.pasts:
            items.append(f"**dict(zip(PASTS, {held}))")
        return f"{{{', '.join(items)}}}"


@dataclass(frozen=True)
class OnnxScript:
    """What a script needs to know of a target. first: the graph of a sequence's first step; cached: of later steps;
    uncached: of the reference. dummy, last, one_by_one: see ``decoder.DecoderGraphs``."""

    first: GraphCall
    cached: GraphCall
    uncached: GraphCall
    device: str
    dummy: int
    last: bool
    one_by_one: bool = False

    def setup(self) -> str:
        cuda = '("CUDAExecutionProvider", {"use_tf32": "0"}), ' if self.device == "cuda" else ""
        lines = ["import onnxruntime", "", f'PROVIDERS = [{cuda}"CPUExecutionProvider"]']
        calls = {call.name: call for call in (self.cached, self.first, self.uncached)}
        for name, call in calls.items():
            lines.append(f"{name} = onnxruntime.InferenceSession({_text(str(call.path))}, providers=PROVIDERS)")
        pasts = self.cached.signature.pasts
        lines += _listed("PASTS", [past.tensor.name for past in pasts])
        for name in dict.fromkeys((self.cached.name, self.first.name)):
            presents = [calls[name].signature.present(past.slot) or "" for past in pasts]
            lines += _listed(f"{name}_PRESENTS", presents)
        lines += ["", "", "def nothing(batch):", '    """The past of a sequence without tokens."""']
        made = []
        for past in pasts:
            shape = ", ".join(str(size) for size in past.shape("batch", self.dummy))
            made.append(f"np.zeros(({shape}), {_scalar(past.tensor.dtype)})")
        if len(set(made)) == 1:
            lines.append(f"    return [{made[0]} for _ in PASTS]")
        else:
            lines += ["    return [", *(f"        {zeros}," for zeros in made), "    ]"]
        return "\n".join([*lines, ""])

    def steps(self, program: Program, tag: str) -> str:
        """Raises ValueError for steps that no ONNX target supports."""
        lines, lengths = [f"past{tag} = {{}}"], dict[str, int]()
        for number, step in enumerate(program.steps):
            x, y, words = f"x{tag}{number}", f"y{tag}{number}", f"  # {describe(program, number)}"
            if isinstance(step, Append):
                held, past = f"past{tag}[{_text(step.seq)}]", lengths.get(step.seq, 0)
                batch, t = len(step.counts), max(step.counts)
                if self.one_by_one and past and batch > 1 and t > 1:
                    parts = [f"{y}_{i}" for i in range(t)]
                    for i, part in enumerate(parts):
                        lines.append(self._append(f"{x}[:, {i}:{i + 1}]", part, batch, 1, held, past + i) + words)
                        words = ""
                    lines.append(f"{y} = np.concatenate([{', '.join(parts)}], axis=1)")
                else:
                    lines.append(self._append(x, y, batch, t, held, past) + words)
                lines.append(f"{y} = {y}.astype(np.float32)")
                call = self.cached if past else self.first
                lines[-1] += "[:, None]" * (len(call.signature.output.axes) == 2)
                lengths[step.seq] = past + max(step.counts)
            elif type(step) is UncachedForward:
                lines.append(f"{y} = {self._uncached(x, len(step.counts), max(step.counts))}{words}")
                lines.append(f"{y} = {y}.astype(np.float32)")
            elif isinstance(step, Reset | Close):
                lines.append(f"past{tag}.pop({_text(step.seq)}, None){words}")
                lengths.pop(step.seq, None)
            else:
                raise ValueError(f"an ONNX target does not support {type(step).__name__}")
        return "\n".join([*lines, ""])

    def _append(self, x: str, y: str, batch: int, t: int, held: str, past: int) -> str:
        call = self.cached if past else self.first
        outputs = f"[{_text(call.signature.output.name)}, *{call.name}_PRESENTS]"
        feeds = call.feeds(x, batch, past, t, held if past else f"nothing({batch})")
        line = f"{y}, *{held} = {call.name}.run({outputs}, {feeds})"
        return (
            line if len(line) <= 100 else line.replace(f"({outputs}, {feeds})", f"(\n    {outputs},\n    {feeds},\n)")
        )

    def _uncached(self, x: str, batch: int, t: int) -> str:
        call, held = self.uncached, f"nothing({batch})"
        outputs = f"[{_text(call.signature.output.name)}]"
        if not self.last:
            return f"{call.name}.run({outputs}, {call.feeds(x, batch, 0, t, held)})[0]"
        axis = "stack" if len(call.signature.output.axes) == 2 else "concatenate"
        one = f"{call.name}.run({outputs}, {call.feeds(f'{x}[:, :n]', batch, 0, 'n', held)})[0]"
        return f"np.{axis}([{one} for n in range(1, {t} + 1)], axis=1)"


def _listed(name: str, texts: Sequence[str]) -> list[str]:
    """An assignment of a list, one item per line if it does not fit on one."""
    line = f"{name} = [{', '.join(map(_text, texts))}]"
    return [line] if len(line) <= 100 else [f"{name} = [", *(f"    {_text(text)}," for text in texts), "]"]


def _text(x: str) -> str:
    return json.dumps(x, ensure_ascii=False)


def _scalar(dtype: str) -> str:
    return "np.bool_" if dtype == "bool" else f"np.{dtype}"
