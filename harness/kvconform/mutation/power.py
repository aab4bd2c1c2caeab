"""The null-model power table: the wrong models that each clause rejects, and those that it cannot detect.

A *null model* is the definition with one mistake. It computes every step of a program from the tokens, in float64
rounded to the config's dtype, and reports its lengths correctly. The same ``judge`` decides as for a backend. A clause
that compares programs with one another cannot detect a mistake that affects all of them alike; the table shows this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvconform.errors import Raised
from kvconform.judging.judge import judge
from kvconform.worker.execute import StepResult
from kvconform.worker.protocol import Traces
from kvconform_specs import SUITE_VERSION
from kvconform_specs.claims import ABILITIES, ENOUGH, Claims
from kvconform_specs.clause import Case, Clause
from kvconform_specs.clauses import ALL
from kvconform_specs.config import DTYPES, PROFILES, Config
from kvconform_specs.configs import CONFIGS, LONG
from kvconform_specs.history import Histories, context_of, prefixed, requests
from kvconform_specs.program import Append, Generate, ReadCache, Reject, Step, UncachedForward, called
from kvconform_specs.reference.definition import Attended, attention, decoder, rope, sinks
from kvconform_specs.reference.oracle import Expected, Generation, expect
from kvconform_specs.rotary import frequencies
from kvconform_specs.strategies import drawn
from kvconform_specs.tensors import Streams, rounded, weights

Array = NDArray[Any]
NO_OUTPUTS = "judges no numbers"
STRUCTURES = 6
"""The least number of cases for each clause; as many are drawn on each config that it concerns."""


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """How often a clause rejects a null model in a dtype.

    cases: the number of cases that were drawn on configs where the model is wrong. tried: those in which an output of
    it is outside its bound. rejected: those of them that the clause rejects. note: why nothing is counted, or empty.
    """

    clause: str
    dtype: str
    model: str = ""
    cases: int = 0
    tried: int = 0
    rejected: int = 0
    note: str = ""

    @property
    def power(self) -> float | None:
        """The share of the cases tried that were rejected; None if the model was never wrong."""
        return self.rejected / self.tried if self.tried else None


# --- null models ---
def _same(config: Config) -> Config:
    return config


def _always(config: Config) -> bool:
    return True


@dataclass(frozen=True)
class Null:
    """A mistake. ``changed``: the config with which attention is computed. ``counts``: how often each key is counted,
    by its ``rank`` among the ``n`` visible ones, 1 being the oldest. ``applies``: whether a config is affected."""

    name: str
    applies: Callable[[Config], bool] = _always
    changed: Callable[[Config], Config] = _same
    counts: Callable[[Array, Array], Array] | None = None
    late: bool = False  # queries' positions are one too large
    tiled: bool = False  # query head i reads KV head i % g

    def attend(self, query: Array, keys: Array, values: Array, config: Config, **options: Any) -> Attended:
        """As ``definition.attention``; only the output of the result is used."""
        if self.tiled:
            heads = np.arange(config.heads) % config.kv_heads
            keys, values, config = (
                keys[..., heads, :, :],
                values[..., heads, :, :],
                replace(config, kv_heads=config.heads),
            )
        if self.late and config.positions == "rope":
            angle = frequencies(config.rotary, config.rotary_dim or config.head_dim, keys.shape[-2])
            still = config.head_dim if config.latent else 0
            turned = rope(query[..., still:], (np.cos(angle), np.sin(angle)))
            query = np.concatenate([query[..., :still], turned], axis=-1)
        config = self.changed(config)
        right = attention(query, keys, values, config, **options)
        if self.counts is None:
            return right
        rank = np.cumsum(right.visible, axis=-1)
        powers = right.weights * right.total * self.counts(rank, rank[..., -1:])
        total = powers.sum(axis=-1, keepdims=True)
        if config.sink is not None:
            total = total + np.exp(sinks(config) - right.top)
        wrong = powers / np.where(total == 0, 1.0, total)
        shared = np.repeat(values, config.group, axis=-3)
        return right._replace(output=wrong @ shared, weights=wrong)


def _level(config: Config) -> Config:
    return replace(config, scale=0.0, sink=None, positions=config.positions.replace("alibi", "none"))


def _narrower(config: Config) -> Config:
    return replace(config, window=(config.window or 1) - 1)


def _stale(rank: Array, n: Array) -> Array:
    return np.where(n < 2, 1, 1 - (rank == n // 2) + (rank == n // 2 + 1))


DEFINITION = Null("definition")
"""The definition without a mistake: no clause may reject it."""
NULLS = (
    Null("zeros", counts=lambda rank, n: rank * 0),
    Null("mean of the visible values", changed=_level),
    Null("one visible token dropped", counts=lambda rank, n: rank != n // 2),
    Null("one visible token stale: its slot holds the next one", counts=_stale),
    Null("window one too wide", lambda c: c.window is not None, lambda c: replace(c, window=(c.window or 0) + 1)),
    Null("window one too narrow", lambda c: (c.window or 0) > 1, _narrower),
    Null("queries' positions one too large", lambda c: c.positions in ("rope", "learned"), late=True),
    Null("KV head i % g", lambda c: 1 < c.kv_heads < c.heads, tiled=True),
    Null("newest visible token only", counts=lambda rank, n: rank == n),
    Null("first token only", changed=lambda c: replace(c, window=None), counts=lambda rank, n: rank == 1),
)
"""With alibi, a query's position one too large gives the same softmax, so that it is not a mistake."""


# --- their outputs ---
Answers = list[list[Array | None]]
"""For each program and step ``(1, b, t, e)`` in float32, as ``Observed.outputs``, or the generated token ids
``(1, b, new)``; None for a step that computes nothing."""


class _Trial:
    """A case on which models are evaluated.

    All rows of its programs are one batch, padded at the end, since models are causal; a row with which another one
    begins is cut from it. A model's output is therefore a function of the tokens, bit for bit.
    """

    def __init__(self, case: Case, claims: Claims) -> None:
        self.case, self.claims, self.config = case, claims, case.programs[0].config
        self.expected = [expect(program, (0,), claims.precision) for program in case.programs]
        self.wants = [
            [self._wanted(step, want) for step, want in zip(program.steps, wants, strict=True)]
            for program, wants in zip(case.programs, self.expected, strict=True)
        ]
        self._steps = {
            (number, index): list(zip(requests(step, want.rows), want.counts, strict=True))
            for number, (program, wants) in enumerate(zip(case.programs, self.wants, strict=True))
            for index, (step, want) in enumerate(zip(program.steps, wants, strict=True))
            if want is not None and isinstance(step, Append | UncachedForward) and not isinstance(step, Generate)
        }
        wanted = [one for rows in self._steps.values() for one in rows]
        owners = prefixed(dict.fromkeys(request for request, _count in wanted), self.config.changes_at)
        self._batch = list(dict.fromkeys(owners.values()))
        self._homes = {request: self._batch.index(owner) for request, owner in owners.items()}
        self._first = min((len(request.row) - count for request, count in wanted), default=0)
        self._longest = max((len(request.row) for request in self._batch), default=0)
        self._streams = Streams(self.config, max(program.span for program in case.programs), (0,))
        rows = [self._streams.row(request.row)[0] for request in self._batch]
        like = self._streams.tape(0)
        self._contents = np.zeros((len(rows), self._longest, *like.shape[2:]), like.dtype)
        for padded, row in zip(self._contents, rows, strict=True):
            padded[: len(row)] = row

    def _wanted(self, step: Step, want: Expected | None) -> Expected | None:
        return want.last() if want is not None and self.claims.returns == "last" and isinstance(step, Append) else want

    def answers(self, model: Null) -> Answers:
        given: Answers = [
            [self._generated(model, want, step) for step, want in zip(program.steps, wants, strict=True)]
            for program, wants in zip(self.case.programs, self.wants, strict=True)
        ]
        if not self._steps:
            return given
        solved = rounded(self._solved(model), self.config.dtype)  # (batch, positions, e)
        for (number, index), rows in self._steps.items():
            want = self.wants[number][index]
            assert want is not None
            output = given[number][index] = np.zeros((1, *want.real.shape, solved.shape[-1]), np.float32)
            for row, (request, count) in enumerate(rows):
                stop = len(request.row) - self._first
                output[0, row, want.real[row]] = solved[self._homes[request], stop - count : stop]
        return given

    def _solved(self, model: Null) -> Array:
        c, first = self.config, self._first
        if c.profile == "decoder" and c.changes_at:  # numbers depend on the length: rows are not padded
            solved = np.zeros((len(self._batch), self._longest - first, c.vocabulary))
            for index, request in enumerate(self._batch):
                n = len(request.row)
                tokens = self._contents[index, :n]
                solved[index, : n - first] = self._logits(model, tokens, first, context_of(request.row))
            return solved
        if c.profile == "decoder":
            contexts = np.array([context_of(request.row) for request in self._batch])
            return self._logits(model, self._contents, first, contexts)
        query, keys, values = (part.astype(np.float64) for part in self._streams.split(self._contents))
        query = query[:, :, first:].copy()
        mask = np.ones((len(self._batch), 1, 1, self._longest), bool)
        for index, request in enumerate(self._batch):
            if request.needle is not None:
                query[index] = self._streams.needle(request.needle)[0]
            mask[index, ..., list(request.masked)] = False
        output = model.attend(query, keys, values, c, at=first, mask=mask).output.swapaxes(1, 2)
        return output.reshape(*output.shape[:2], -1)

    def _logits(self, model: Null, tokens: Array, first: int, context: int | Array = 0) -> Array:
        """``context``: of all rows, or of each."""
        c = self.config
        late = model.late and c.positions == "learned"
        return decoder(tokens, _weights(c, late), c, first, attend=model.attend, context=context)

    def _generated(self, model: Null, want: Expected | None, step: Step) -> Array | None:
        if not isinstance(want, Generation) or not isinstance(step, Generate):
            return None
        tokens = want.prompts()  # (1, b, s)
        for s in range(tokens.shape[-1], tokens.shape[-1] + step.new):
            logits = rounded(self._logits(model, tokens, s - 1, step.context), self.config.dtype)
            tokens = np.concatenate([tokens, logits.argmax(axis=-1)], axis=-1)
        return tokens[..., -step.new :]

    def wrong(self, model: Null, given: Answers) -> bool:
        """Whether an output, or a logit from which a token was generated, is outside its bound."""
        for wants, outputs in zip(self.wants, given, strict=True):
            for want, output in zip(wants, outputs, strict=True):
                if want is None or output is None:
                    continue
                numbers, real = want.numbers, want.real[None, :, :, None]
                if isinstance(want, Generation):
                    numbers, real = want.along(output), np.ones((1, 1, 1, 1), bool)
                    output = self._behind(model, want, output)
                real = real & ~np.isnan(numbers("value"))  # what follows a token of NaN has no value
                if bool((~(np.abs(output - numbers("value")) <= numbers("bound")) & real).any()):
                    return True
        return False

    def _behind(self, model: Null, want: Generation, ids: Array) -> Array:
        """The logits from which a model chose these tokens."""
        tokens, context = np.concatenate([want.prompts(), ids[..., :-1]], axis=-1), context_of(want.rows[0])
        if self.config.changes_at:
            ends = range(tokens.shape[-1] - ids.shape[-1] + 1, tokens.shape[-1] + 1)
            made = [self._logits(model, tokens[..., :end], end - 1, context) for end in ends]
            return rounded(np.concatenate(made, axis=-2), self.config.dtype)
        return rounded(self._logits(model, tokens, tokens.shape[-1] - ids.shape[-1], context), self.config.dtype)

    def rejects(self, clause: Clause, given: Answers) -> bool:
        traces = [self._traces(number, outputs) for number, outputs in enumerate(given)]
        return judge(self.case, clause.relations, self.claims, traces, self.expected).mismatch is not None

    def _traces(self, number: int, outputs: Sequence[Array | None]) -> Traces:
        c, histories, trace = self.config, Histories(), []
        for step, want, output in zip(self.case.programs[number].steps, self.wants[number], outputs, strict=True):
            histories.apply(step)
            lengths = tuple(map(len, histories.rows.get(called(step).seq, ())))
            told = {"length": lengths, "free_slots": tuple(c.capacity - n for n in lengths)} if lengths else {}
            if output is not None and c.profile == "attention":
                output = output.reshape(*output.shape[:3], c.heads, c.head_dim).swapaxes(2, 3)
            if isinstance(step, ReadCache):
                told, width = {"token_counts": lengths}, c.kept
                shown = np.zeros((1, len(lengths), max(lengths), width)) if want is None else want.value
                output = shown.astype(np.float32)
            trace.append(StepResult(output, told, refused=Raised("Refused", "") if isinstance(step, Reject) else None))
        return Traces(1, tuple(trace))


@lru_cache(maxsize=16)
def _weights(config: Config, late: bool) -> dict[str, Array]:
    exact: dict[str, Array] = {name: value.astype(np.float64) for name, value in weights(config).items()}
    if late:
        exact["position"] = np.roll(exact["position"], -1, axis=0)
    return exact


# --- the table ---
def power_table(dtype: str, clauses: Iterable[Clause] = ALL, models: Sequence[Null] = NULLS) -> list[Power]:
    """Every clause with every model, in one dtype; the same each time."""
    return [entry for clause in clauses for entry in _entries(clause, dtype, models)]


def _entries(clause: Clause, dtype: str, models: Sequence[Null]) -> list[Power]:
    if not any(relation.judges_outputs for relation in clause.relations):
        return [Power(clause=clause.name, dtype=dtype, note=NO_OUTPUTS)]
    counts = {model.name: [0, 0, 0] for model in models}
    configs = [replace(point, dtype=dtype) for point in CONFIGS.values() if clause.concerns(point)]
    for config in configs:
        claims = _everything(clause, config)
        cases = drawn(clause.strategy(config, claims), -(-STRUCTURES // len(configs)) + 1)
        for case in cases[1:] or cases:  # the first is the simplest
            trial = _Trial(case, claims)
            for model in models:
                if not model.applies(config):
                    continue
                given = trial.answers(model)
                wrong, counted = trial.wrong(model, given), counts[model.name]
                counted[0] += 1
                counted[1] += wrong
                counted[2] += (wrong or model is DEFINITION) and trial.rejects(clause, given)
    return [
        Power(clause=clause.name, dtype=dtype, model=name, cases=cases, tried=tried, rejected=rejected)
        for name, (cases, tried, rejected) in counts.items()
    ]


def _everything(clause: Clause, config: Config) -> Claims:
    """Claims of every ability; where claims exclude one another, those that the clause needs. In long contexts only the
    last outputs: all of them would take gigabytes."""
    claimed: dict[str, Any] = {"overflow": "refused", "unused_slots": "any", "padding": ("right", "left"), "page": 4}
    for need in clause.needs:
        claimed |= ENOUGH.get(need, {})
    if config.capacity >= LONG:
        claimed["returns"] = "last"
    claimed |= {"profiles": PROFILES, "abilities": tuple(ABILITIES), "dtypes": DTYPES, "max_graphs": 8}
    return Claims(**claimed)


# --- the table in the package ---
STORED = "power_table.json"
FIELDS = ("clause", "model", "cases", "tried", "rejected", "note")


def stored(dtype: str) -> list[dict[str, Any]]:
    """The table of this suite in the package (a test recomputes it); empty if it belongs to another suite."""
    shipped = msgspec.json.decode(files("kvconform.mutation").joinpath(STORED).read_bytes())
    if shipped["suite"] != SUITE_VERSION:
        return []
    return [dict(zip(FIELDS, row, strict=True)) for row in shipped["power"].get(dtype, [])]


def shipped_as(certificates: Iterable[list[Power]]) -> bytes:
    """The contents of the file: one line for each clause and model."""
    power = {rows[0].dtype: [[getattr(row, name) for name in FIELDS] for row in rows] for rows in certificates}
    lines = {
        dtype: "[\n" + ",\n".join(msgspec.json.encode(row).decode() for row in rows) + "\n]"
        for dtype, rows in power.items()
    }
    body = ",\n".join(f'"{dtype}": {text}' for dtype, text in lines.items())
    return f'{{"suite": "{SUITE_VERSION}", "power": {{\n{body}\n}}}}\n'.encode()
