"""Eligibility: no time without conformance. Which backends may be timed on a preset, and why another may not.

Three questions are asked: whether the results of a conformance run allow it, whether the outputs on the very inputs
that will be timed are within the bound of the definition, and whether the right thing ran (``runtime_info``). The
second judges every position of every call that is timed, on ``COLUMNS`` logits drawn by the seed: a logit depends on
its own column of the LM head alone, so that the drawn ones are those of a decoder with a smaller vocabulary, whose
bound holds as it stands; a backend cannot know them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvconform.bench.presets import Preset
from kvconform.bench.worker.gpu import unfit
from kvconform.bench.worker.timer import digest, tokens
from kvconform.errors import BackendUnavailable, KvconformError, WorkerDied
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


class Ineligible(KvconformError):
    """A backend may not be timed: one sentence."""


def config_of(client: WorkerClient, preset: Preset) -> Config:
    """The config that a backend is built for: the preset's; for a black box its own, with the preset's capacity."""
    own = list(client.configs.values())
    return preset.config if not own else replace(own[0], capacity=preset.config.capacity)


def build(client: WorkerClient, preset: Preset) -> None:
    """Builds a backend whose claims cover the preset, unless its worker has it. Raises Ineligible."""
    try:
        why = unable(client.claims, preset) or client.build(config_of(client, preset))
    except (WorkerDied, BackendUnavailable) as error:
        raise Ineligible(str(error)) from error
    if why:
        raise Ineligible(why)


def check_outputs(client: WorkerClient, preset: Preset, seed: int, defined: Callable[[], ExpectedLogits]) -> int:
    """Judges a built backend's outputs on the timed inputs: how many numbers were compared. Raises Ineligible.

    ``defined`` gives what the definition expects; a black box is judged by its own uncached forward.
    """
    config = config_of(client, preset)
    if config is not preset.config and digest(tokens(config, seed)) != digest(tokens(preset.config, seed)):
        raise Ineligible("its tokens differ from the preset's: another vocabulary, or other special tokens")
    compared = 0
    try:
        forward = client.reference_forward
        if client.claims.changes_at:
            raise Ineligible("its outputs change with the number of tokens: one forward does not tell them")
        expected = defined() if forward is None else by_reference(forward(config), config, seed)
        for n in sorted({*preset.depths, *preset.prompts}):
            calls = list(_calls(preset, client.claims, n, seed))
            trace = client.run(Program(config, tuple(step for step, _ in calls)), (0,)).apart()[0]
            for (step, first), done in zip(calls, trace, strict=False):  # a trace ends where a step raised
                words, count = _wrong(step, first, done, config, client.claims, expected)
                compared += count
                if words:
                    raise Ineligible(f"not conformant on the timed inputs: {_name(step, first)}: {words}")
    except (WorkerDied, BackendUnavailable) as error:
        raise Ineligible(str(error)) from error
    if not compared:
        raise Ineligible("nothing was compared")
    return compared


def check_runtime(client: WorkerClient, preset: Preset, threads: int) -> dict[str, Any]:
    """What really ran (``Backend.runtime_info``). Raises Ineligible if that may not be timed."""
    try:
        found = client.runtime_info(config_of(client, preset))
    except (WorkerDied, BackendUnavailable) as error:
        raise Ineligible(f"died in runtime_info(): {error}") from error
    why = misfit(found, threads, client.spec.device)
    if why:
        raise Ineligible(why)
    return found


def conformance(name: str, spec: WorkerSpec, results_dir: Path) -> str:
    """Why the results ``results_dir/<name>.json`` do not allow timing this backend; empty if they do."""
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
    """Why the results ``results_dir/<name>.json`` do not apply to a worker with this ``environment``; empty if they do:
    they were made with other versions, or with another state of the backend's file. ``same_file``: False if a preset
    replaces the name's address."""
    then = read(results_dir / f"{name}.json").environment
    for key, now in environment.items():
        was = then.get(key, now)
        if was != now and (same_file or key != "source"):
            words = "another state of its file" if key == "source" else f"{key} {was}, this is {now}"
            return f"its conformance results are of {words}: judge it again (kvconform run -b {name})"
    return ""


def unable(claims: Claims, preset: Preset) -> str:
    """Why the backend's claims exclude the preset; empty if they do not."""
    longest = max(*preset.depths, *preset.prompts)
    if claims.max_batch is not None and claims.max_batch < max(preset.batches):
        return f"claims no batch of more than {claims.max_batch}, the preset needs {max(preset.batches)}"
    if "decoder" not in claims.profiles:
        return "claims no decoder profile"
    if preset.config.dtype not in claims.dtypes:
        return f"claims no {preset.config.dtype}"
    if claims.max_chunk is not None and claims.max_chunk < longest:
        return f"claims no append of more than {claims.max_chunk} tokens, the preset needs {longest}"
    other = [size for size in sorted({*preset.depths, *preset.prompts}) if size and claims.longest(size) != size]
    if other:
        return f"claims no append of {other[0]} tokens, which the preset needs"
    return ""


def misfit(runtime_info: Mapping[str, Any], threads: int, device: str) -> str:
    """Why what ran may not be timed; empty if it may. It is not what its name says, used another number of threads,
    cannot be verified, or copies between host and device in every step."""
    if runtime_info.get("fallback"):
        return f"not what its name says: {runtime_info['fallback']}"
    if runtime_info.get("threads", threads) != threads:
        return f"ran on {runtime_info['threads']} threads, not on {threads}"
    return unproven(runtime_info, device) or unfit(runtime_info) or ""


def room(config: Config, depth: int) -> int:
    """The number of decode steps that are judged from a depth on, and that may be timed in one block."""
    return min(MOST_STEPS, config.capacity - depth)


@dataclass(frozen=True)
class ExpectedLogits:
    """The expected logits at every position of the timed tokens: ``value`` ``(positions, columns)`` in the drawn
    ``columns``, and ``bound`` ``(positions, 1)``."""

    columns: NDArray[np.int64]
    value: Array
    bound: Array


def by_definition(config: Config, seed: int) -> ExpectedLogits:
    """By the definition. Takes seconds to minutes: eight noisy runs of it over a whole context."""
    columns = _drawn(config, seed)
    exact: dict[str, Array] = {}
    for name, weight in weights(config).items():
        exact[name] = (weight[:, columns] if name == "lm_head" else weight).astype(np.float64)
    ids = tokens(config, seed)[0]
    value = decoder(ids, exact, config, attend=blockwise)
    noise, rough = bounds.Noisy(bounds.STORAGE[config.dtype], seed=len(ids)), bounds.single(exact)
    # one run after another: eight at once take ten times the memory and are no faster
    deviations = [bounds.deviation(decoder(ids, rough, config, 0, noise, blockwise), value) for _ in range(bounds.RUNS)]
    return ExpectedLogits(columns, value, bounds.decoder_bound(deviations, bounds.RUNS, noise.gain))


def by_reference(forward: ReferenceForward, config: Config, seed: int) -> ExpectedLogits:
    """By a black box's own forward without a cache. Raises WorkerDied if that raises."""
    columns = _drawn(config, seed)
    ids: NDArray[Any] = tokens(config, seed)
    value = forward(ids, 0.0, 0.0, 0)[0].astype(np.float64)
    noise = bounds.perturbation(config)
    deviations = [
        bounds.deviation(forward(ids, noise.storage, noise.accumulation, 1 + run)[0], value)
        for run in range(bounds.RUNS)
    ]
    return ExpectedLogits(columns, value[:, columns], bounds.black_box_bound(deviations, bounds.RUNS, noise.gain))


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


def _calls(preset: Preset, claims: Claims, n: int, seed: int) -> Iterator[tuple[Step, int]]:
    """The steps that are timed at ``n`` tokens, and the position of the first token of each."""
    yield Append("timed", (n,), seed), 0
    if n in preset.depths:
        for position in range(n, n + room(preset.config, n)):
            yield Append("timed", (1,), seed), position
        if claims.can("truncate") and claims.keeps(n + room(preset.config, n)) < n:
            yield Truncate("timed", n - 1), 0
            yield Append("timed", (1,), seed), n - 1
            yield Append("timed", (1,), seed), n
    yield Close("timed"), 0
    uncached = UncachedForward if claims.can("uncached_forward") else Append
    for last in (False, True) if n in preset.depths else ():
        if not last or claims.can("last_only"):
            yield uncached("whole", (n + 1,), seed, last_only=last), 0
            if uncached is Append:
                yield Close("whole"), 0


def _name(step: Step, first: int) -> str:
    """As the phases are called in a record."""
    if isinstance(step, Append | UncachedForward) and step.seq == "whole":
        return f"recompute{'-last' * step.last_only}({step.counts[0] - 1})"
    if isinstance(step, Append):
        return f"prefill({step.counts[0]})" if first == 0 else f"decode({first})"
    return type(step).__name__.lower()


def _wrong(
    step: Step, first: int, done: StepResult, config: Config, claims: Claims, expected: ExpectedLogits
) -> tuple[str, int]:
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
    mine = got[0, 0][:, expected.columns]
    want, bound = expected.value[first : first + t], expected.bound[first : first + t]
    off = ~(np.abs(mine - want) <= bound)
    if off.any():
        position, column = (int(i) for i in np.argwhere(off)[0])
        return (
            f"position {first + position}, logit {expected.columns[column]}: got {mine[position, column]:.6g}, "
            f"want {want[position, column]:.6g} ± {bound[position, 0]:.2g}"
        ), mine.size
    return "", mine.size
