"""No time without conformance: who may be timed on a preset, and one sentence why another may not.

Two questions are asked. What do the results of a conformance run say? And are the outputs on the very inputs that
will be timed within the bound of the definition? The second judges every position of every call that is timed, on
``COLUMNS`` logits drawn by the seed: a logit depends on its own column of the LM head alone, so that the drawn ones
are those of a decoder with a smaller vocabulary, whose bound holds as it stands; a backend cannot know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.bench.presets import Preset
from kvconform.bench.worker.gpu import unfit
from kvconform.bench.worker.timer import digest, tokens
from kvconform.results.results import missing_core, read
from kvconform.worker.client import WorkerClient, WorkerSpec, unproven
from kvconform.worker.execute import StepResult
from kvconform_specs import SUITE_VERSION
from kvconform_specs.claims import Claims
from kvconform_specs.config import Config
from kvconform_specs.errors import SpecError
from kvconform_specs.program import Append, Close, Program, Step, Truncate, UncachedForward
from kvconform_specs.reference import bounds
from kvconform_specs.reference.definition import Arithmetic, Attended, attention, decoder
from kvconform_specs.reference.oracle import ReferenceForward
from kvconform_specs.tensors import weights

Array = NDArray[np.floating]

COLUMNS = 1024
"""Logits that are judged at each position, if the vocabulary has more."""
BLOCK = 512
"""Queries that the definition's attention takes at a time."""
MOST_STEPS = 16
"""Decode steps that are judged at each depth, and the most that are timed in one block."""


def conformance(name: str, spec: WorkerSpec, results_dir: Path) -> str:
    """Why the results ``results_dir/<name>.json`` do not admit this backend, or nothing."""
    try:
        results = read(results_dir / f"{name}.json")
    except SpecError as error:
        return f"no conformance results: {error}"
    if not results.ok:
        return results.summary
    if not results.finished:
        return "its conformance run is not finished"
    missing = missing_core(results, "decoder")
    if missing:
        return f"no PASS on the core clauses {', '.join(missing)} (decoder profile)"
    if results.suite != SUITE_VERSION:
        return f"its conformance results are of suite {results.suite}, this is {SUITE_VERSION}"
    if results.device != spec.device:
        return f"its conformance results are of device {results.device}, not {spec.device}"
    return ""


def outdated(name: str, results_dir: Path, environment: Mapping[str, str], *, same_file: bool = True) -> str:
    """Why the results ``results_dir/<name>.json`` say nothing of a worker with this ``environment``, or nothing: they
    were made with other versions, or another state of the backend's file. ``same_file``: False where a preset has
    another address in the name's place."""
    told = read(results_dir / f"{name}.json").environment
    for key, now in environment.items():
        was = told.get(key, now)
        if was != now and (same_file or key != "source"):
            words = "another state of its file" if key == "source" else f"{key} {was}, this is {now}"
            return f"its conformance results are of {words}: judge it again (kvconform run -b {name})"
    return ""


def unable(claims: Claims, preset: Preset) -> str:
    """Why the backend's claims leave the preset out, or nothing."""
    longest = max(*preset.depths, *preset.prompts)
    if claims.max_batch is not None and claims.max_batch < max(preset.batches):
        return f"claims no batch of more than {claims.max_batch}, the preset needs {max(preset.batches)}"
    if "decoder" not in claims.profiles:
        return "claims no decoder profile"
    if preset.config.dtype not in claims.dtypes:
        return f"claims no {preset.config.dtype}"
    if claims.max_chunk is not None and claims.max_chunk < longest:
        return f"claims no append of more than {claims.max_chunk} tokens, the preset needs {longest}"
    return ""


def misfit(runtime_info: Mapping[str, Any], threads: int, device: str) -> str:
    """Why what really ran gets no time, or nothing: it is not what its name says, or not on so many threads, nobody
    knows what it is, or it copies in every step."""
    if runtime_info.get("fallback"):
        return f"not what its name says: {runtime_info['fallback']}"
    if runtime_info.get("threads", threads) != threads:
        return f"ran on {runtime_info['threads']} threads, not on {threads}"
    return unproven(runtime_info, device) or unfit(runtime_info) or ""


def room(config: Config, depth: int) -> int:
    """How many decode steps are judged from a depth on, and may be timed in one block."""
    return min(MOST_STEPS, config.capacity - depth)


@dataclass(frozen=True)
class Truth:
    """What must come out at every position of the timed tokens: ``value`` ``(positions, columns)`` of the drawn
    ``columns`` of the logits, ``bound`` ``(positions, 1)``."""

    columns: NDArray[np.int64]
    value: Array
    bound: Array


def truth(config: Config, seed: int) -> Truth:
    """By the definition. Takes seconds to minutes: eight noisy runs of it over a whole context."""
    columns = _drawn(config, seed)
    exact: dict[str, Array] = {}
    for name, weight in weights(config).items():
        exact[name] = (weight[:, columns] if name == "lm_head" else weight).astype(np.float64)
    ids = tokens(config, seed)[0]
    value = decoder(ids, exact, config, attend=blockwise)
    noise, rough = bounds.Noisy(bounds.STORAGE[config.dtype], seed=len(ids)), bounds.single(exact)
    # one run after another: eight at once take ten times the memory and are no faster
    strays = [bounds.deviation(decoder(ids, rough, config, 0, noise, blockwise), value) for _ in range(bounds.RUNS)]
    return Truth(columns, value, bounds.decoder_bound(strays, bounds.RUNS, noise.gain))


def own_truth(own: ReferenceForward, config: Config, seed: int) -> Truth:
    """Of a black box, by its own forward without a cache. Raises WorkerDied where that raises."""
    columns = _drawn(config, seed)
    ids: NDArray[Any] = tokens(config, seed)
    value = own(ids, 0.0, 0.0, 0)[0].astype(np.float64)
    noise = bounds.perturbation(config.dtype)
    strays = [
        bounds.deviation(own(ids, noise.storage, noise.accumulation, 1 + run)[0], value) for run in range(bounds.RUNS)
    ]
    return Truth(columns, value[:, columns], bounds.black_box_bound(strays, bounds.RUNS, noise.gain))


def _drawn(config: Config, seed: int) -> NDArray[np.int64]:
    drawn = np.random.default_rng(seed).permutation(config.vocabulary)[:COLUMNS]
    return np.sort(drawn).astype(np.int64)


def blockwise(query: Array, keys: Array, values: Array, config: Config, *, layer: int, how: Arithmetic) -> Attended:
    """``definition.attention`` of all tokens in blocks of queries, each on the keys that it can see at all: a context
    of 8192 tokens has more scores than fit into memory. Only ``output`` is of use."""
    s = keys.shape[-2]
    parts = [
        attention(
            query[..., at : at + BLOCK, :],
            keys[..., : at + BLOCK, :],
            values[..., : at + BLOCK, :],
            config,
            layer=layer,
            at=at,
            how=how,
        )
        for at in range(0, s, BLOCK)
    ]
    return parts[-1]._replace(output=np.concatenate([part.output for part in parts], axis=-2))


def parity(client: WorkerClient, preset: Preset, config: Config, seed: int, known: Truth) -> tuple[str, int]:
    """What is wrong with the backend's outputs on the timed inputs, or nothing; and how many numbers were compared.

    ``config``: what the backend is built for, the preset's or a black box's own. Raises WorkerDied and BackendUnavailable where
    the backend cannot be asked.
    """
    if config is not preset.config and digest(tokens(config, seed)) != digest(tokens(preset.config, seed)):
        return "its tokens are others than those of the preset: another vocabulary, or other special tokens", 0
    compared = 0
    for n in sorted({*preset.depths, *preset.prompts}):
        calls = list(_calls(preset, client.claims, n, seed))
        trace = client.run(Program(config, tuple(step for step, _ in calls)), (0,)).apart()[0]
        for (step, first), done in zip(calls, trace, strict=False):  # a trace ends where a step raised
            words, count = _wrong(step, first, done, config, client.claims, known)
            compared += count
            if words:
                return f"not conformant on the timed inputs: {_name(step, first)}: {words}", compared
    return "" if compared else "nothing was compared", compared


def _calls(preset: Preset, claims: Claims, n: int, seed: int) -> Iterator[tuple[Step, int]]:
    """The steps that are timed at ``n`` tokens, and the position of the first token of each."""
    yield Append("timed", (n,), seed), 0
    if n in preset.depths:
        for position in range(n, n + room(preset.config, n)):
            yield Append("timed", (1,), seed), position
        if claims.can("truncate"):
            yield Truncate("timed", n - 1), 0
            yield Append("timed", (1,), seed), n - 1
            yield Append("timed", (1,), seed), n
    yield Close("timed"), 0
    if n in preset.depths:
        for last in (False, True) if claims.can("last_only") else (False,):
            yield (
                (UncachedForward if claims.can("uncached_forward") else Append)(
                    "whole", (n + 1,), seed, last_only=last
                ),
                0,
            )
            if not claims.can("uncached_forward"):
                yield Close("whole"), 0


def _name(step: Step, first: int) -> str:
    """As the phases are called in a record."""
    if isinstance(step, Append | UncachedForward) and step.seq == "whole":
        return f"recompute{'-last' * step.last_only}({step.counts[0] - 1})"
    if isinstance(step, Append):
        return f"prefill({step.counts[0]})" if first == 0 else f"decode({first})"
    return type(step).__name__.lower()


def _wrong(step: Step, first: int, done: StepResult, config: Config, claims: Claims, known: Truth) -> tuple[str, int]:
    if done.error is not None:
        return f"raised {done.error}", 0
    if not isinstance(step, Append | UncachedForward):
        return "", 0
    t, got = step.counts[0], done.output
    if step.last_only or (claims.returns == "last" and isinstance(step, Append)):
        first, t = first + t - 1, 1
    shape: tuple[Any, ...] = (1, 1, t, config.vocabulary)  # of one variant, one row
    if got is None or got.shape != shape or got.dtype != np.float32:
        came = "nothing" if got is None else f"{got.dtype} {got.shape[1:]}"
        return f"gave {came}, want float32 {shape[1:]}", 0
    if not np.isfinite(got).all():
        return "gave numbers that are not finite", 0
    mine = got[0, 0][:, known.columns]
    want, bound = known.value[first : first + t], known.bound[first : first + t]
    off = ~(np.abs(mine - want) <= bound)
    if off.any():
        position, column = (int(i) for i in np.argwhere(off)[0])
        return (
            f"position {first + position}, logit {known.columns[column]}: got {mine[position, column]:.6g}, "
            f"want {want[position, column]:.6g} ± {bound[position, 0]:.2g}"
        ), mine.size
    return "", mine.size
