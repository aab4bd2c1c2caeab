"""Results, pairs and speed records that were never measured, for the tests of the report."""

from __future__ import annotations

import random
from datetime import date
from typing import Any

from mismatches import WRONG, cause

from kvconform.explain.diagnosis import Diagnosis
from kvconform.explain.diagnosis.record import FirstFailure
from kvconform.explain.visibility import Map
from kvconform.judging.render import render
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.mutation import record as audit_record
from kvconform.mutation.record import Audited, AuditTrial
from kvconform.results import guarantees, known_failures
from kvconform.results.results import Results, Target
from kvconform.run.cross_backend import Pair
from kvconform_specs.clauses import ALL
from kvconform_specs.configs import CONFIGS

HOSTILE = ("<img src=x onerror=alert(1)>", '"><script>alert(1)</script>', "</script>", "'onload='alert(1)", "{{ 7*7 }}")


def passed(clause: str, config: str, seed: int = 0) -> Verdict:
    draw = random.Random(f"{clause} {config} {seed}")
    return Verdict(
        clause=clause,
        config=config,
        backend="",
        outcome=Outcome.PASS,
        compared=draw.randrange(100, 10**6),
        programs=320,
        structures=16,
        seconds=round(draw.random(), 3),
        worst=draw.random() * 0.4,
    )


def other(clause: str, config: str, outcome: Outcome, sentence: str, **more: Any) -> Verdict:
    fields: dict[str, Any] = {"programs": 40, "structures": 2, **cause(outcome), **more}
    return Verdict(clause=clause, config=config, backend="", outcome=outcome, sentence=sentence, **fields)


def everywhere(seed: int = 0) -> list[Verdict]:
    """A pass in every cell of the suite."""
    cells = [(clause.name, name) for name, config in CONFIGS.items() for clause in ALL if clause.concerns(config)]
    return [passed(clause, config, seed) for clause, config in cells]


def results(backend: str, verdicts: list[Verdict], **more: Any) -> Results:
    settings: dict[str, Any] = {
        "suite": "0.1.0",
        "backend": backend,
        "device": "cpu",
        "dtypes": ["float32"],
        "effort": "pr",
        "seed": 0,
        "started": "2026-11-21T22:07:34+00:00",
        "seconds": 41.5,
        "finished": True,
        "environment": {"python": "3.11.7", "numpy": "2.4.6", "machine": {"system": "Linux", "cpus": 2}},
        "claims": {"profiles": ["attention", "decoder"], "abilities": ["full", "length"], "max_batch": None},
        "runtime_info": {name: {"numpy": "2.4.6"} for name in CONFIGS},
    }
    return Results(verdicts=verdicts, **(settings | more))


def broken(verdicts: list[Verdict], seed: int = 0) -> list[Verdict]:
    """The same cells with a failure of each kind, and cells without a verdict."""
    changed = {
        ("equivalence.chunks", "attention-window"): other(
            "equivalence.chunks",
            "attention-window",
            Outcome.FAIL,
            "program 2, step 2 out[0] at row 1, head 3: got -0.4482, want -0.4266 ± 7.4e-07 (29340x the bound)",
            steps="append 5 to a of 2 rows, append 3 to a of 2 rows (2 times) (window 6)",
            counterexample="equivalence.chunks-3f2a91c0.json",
            found_after=17,
            worst=0.21,
        ),
        ("equivalence.chunks", "decoder-learned"): other(
            "equivalence.chunks",
            "decoder-learned",
            Outcome.FAIL,
            "program 1, step 1 out[0] at row 0, token 2: got 1.0931, want 1.1807 ± 2.2e-05 (3981x the bound)",
            steps="append 1 to a, append 2 to a",
            counterexample="equivalence.chunks-90bb1d02.json",
            found_after=3,
        ),
        ("lifecycle.reset", "attention-gqa"): other(
            "lifecycle.reset",
            "attention-gqa",
            Outcome.CRASH,
            "step 3 reset: the worker died with signal 11 (segmentation fault)",
            steps="append 4 to a, truncate a to 2, reset a",
            counterexample="lifecycle.reset-0c51ff2e.json",
            found_after=1,
        ),
        ("shape.no-specialisation", "decoder-rope"): other(
            "shape.no-specialisation",
            "decoder-rope",
            Outcome.TIMEOUT,
            "step 2 append: no answer within 30 s",
            steps="append 19 to a, append 1 to a",
            counterexample="shape.no-specialisation-77aa0e11.json",
        ),
        ("causality.visibility", "decoder-softcap"): other(
            "causality.visibility",
            "decoder-softcap",
            Outcome.INCONCLUSIVE,
            "failed once and passed on fresh processes, alone and after what ran before: step 1 out[0] moved",
        ),
    }
    return [changed.get(verdict.key, verdict) for verdict in verdicts]


def lacking(verdicts: list[Verdict]) -> list[Verdict]:
    """The same cells of a backend without the decoder profile and without a cache-less forward."""
    found = []
    for verdict in verdicts:
        if verdict.config.startswith("decoder"):
            verdict = other(verdict.clause, verdict.config, Outcome.UNSUPPORTED, "claims no decoder profile")
        elif verdict.clause == "equivalence.full-stable":
            verdict = other(verdict.clause, verdict.config, Outcome.UNSUPPORTED, "claims no full")
        elif verdict.clause == "shape.no-specialisation":
            sentence = "not tested: 3 nodes fell back to CPUExecutionProvider"
            verdict = other(verdict.clause, verdict.config, Outcome.NOT_EXERCISED, sentence)
        found.append(verdict)
    return found


KNOWN = "numerics.zero-keys", "attention-gqa"


def row(backend: str, **more: Any) -> known_failures.Row:
    settings: dict[str, Any] = {
        "backend": backend,
        "clause": KNOWN[0],
        "config": KNOWN[1],
        "reason": "bug in a library",
        "link": "https://github.com/pytorch/pytorch/issues/103082",
        "versions": {"torch": "2.11.*"},
        "expires": date(2027, 3, 31),
        "counterexample": "known/numerics.zero-keys-1a2b3c4d.json",
    }
    return known_failures.Row(**(settings | more))


def known(backend: str, verdicts: list[Verdict]) -> dict[str, Any]:
    """The same cells with one in the known failures: the verdicts and the known_failures of their results."""
    entry = row(backend)
    sentence = f"{entry.reason}, known until {entry.expires}, {entry.link}: {render(WRONG)}"
    file = "numerics.zero-keys-1a2b3c4d.json"
    failure = other(*KNOWN, Outcome.KNOWN_FAILURE, sentence, steps="append 7 to a", counterexample=file)
    return {"verdicts": [failure if v.key == KNOWN else v for v in verdicts], "known_failures": [entry]}


def refuted(verdicts: list[Verdict], clause: str = "determinism.chunk-invariant") -> list[Verdict]:
    """The same cells with one guarantee refuted wherever it was measured."""
    return [
        other(
            v.clause,
            v.config,
            Outcome.REFUTED,
            f"step 1 out[0] under {v.config}: got 0.6555021, but 0.6555020",
            counterexample=f"{v.clause}-{v.config}.json",
        )
        if v.clause == clause
        else v
        for v in verdicts
    ]


MODELS = (
    "zeros",
    "one visible token dropped",
    "window one too wide",
    "KV head i % g",
    "mean of the visible values",
    "one visible token stale: its slot holds the next one",
    "window one too narrow",
    "newest visible token only",
    "queries' positions one too large",
    "first token only",
)


def power() -> list[dict[str, Any]]:
    """A null-model power table: the first clause judges no numbers, the second is blind, the third is weak on the first
    model, the others reject all. The third model is a mistake where there is a window, the fourth never shows in one
    chapter."""
    first, blind, weak, *_ = (clause.name for clause in ALL)
    rows = []
    for name in (clause.name for clause in ALL):
        models = ("",) if name == first else MODELS
        for model in models:
            cases = 0 if name == first or (model == MODELS[2] and not name.startswith("window")) else 8
            tried = 0 if model == MODELS[3] and name.startswith("errors") else cases
            caught = 0 if name == blind else 3 if (name, model) == (weak, MODELS[0]) else tried
            note = "judges no numbers" if name == first else ""
            rows.append(
                {"clause": name, "model": model, "cases": cases, "tried": tried, "rejected": caught, "note": note}
            )
    return rows


def _trial(clause: str, kills: bool, effort: str = "smoke", **more: Any) -> AuditTrial:
    sentence = "step 1 out[0]: got 0.5, want 0.25" if kills else ""
    return AuditTrial(
        effort=effort,
        clause=clause,
        outcome=Outcome.FAIL if kills else Outcome.PASS,
        kills=kills,
        by="judgement" if kills else "",
        config="attention-gqa",
        programs=12,
        seconds=0.25,
        ran=3,
        sentence=sentence,
        **more,
    )


def audit(name: str = "top-left") -> audit_record.AuditRecord:
    """Four faults under two efforts: one is killed, one by a clause that it does not name, too, one survives the
    smaller effort, one could not run; and two controls, of which one is detected."""

    def fault(name: str, conditional: bool, trials: list[AuditTrial], **more: Any) -> Audited:
        settings: dict[str, Any] = {
            "address": f"faults:{name}",
            "classes": ("M1",),
            "clauses": ("causality.past-seen", "equivalence.decode"),
            "bug": "pytorch/pytorch/issues/108108",
            "sentence": f"The mask of {name} begins at the top left.",
        }
        return Audited(name=name, conditional=conditional, trials=trials, **(settings | more))

    both = ("smoke", "pr")
    seen, decode, decoder = "causality.past-seen", "equivalence.decode", "definition.decoder"
    record = audit_record.AuditRecord(
        suite="0.1.0",
        faults="faults:FAULTS",
        efforts=list(both),
        seed=0,
        names=[],
        clauses=[],
        shard="",
        started="2026-11-21T23:30:00+00:00",
        seconds=12.5,
        finished=True,
        audited=[
            fault(name, False, [_trial(clause, True, effort) for effort in both for clause in (seen, decode)]),
            fault("tail-attended", True, [_trial(c, c != decode, b) for b in both for c in (seen, decode, decoder)]),
            fault("conditional-mask", True, [_trial(seen, effort == "pr", effort) for effort in both], bug="a report"),
            fault("gpu-only", True, [], unavailable="it needs a GPU"),
        ],
        controls=[
            fault("right", False, [_trial(clause.name, False) for clause in ALL], clauses=()),
            fault("right-too", False, [_trial(seen, True)], clauses=(), sentence="It is right."),
        ],
    )
    record.scores = audit_record.scores(record)
    return record


def four() -> list[Results]:
    """One backend of each standing."""
    ort = {
        "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"],
        "nodes": {"MatMul": 24, "Softmax": 2},
        "memcpy_nodes": 0,
        "onnxruntime": "1.31.1",
    }
    first = known("eager", refuted(everywhere(1)))
    return [
        results("eager", **first, guarantees=guarantees.measured(first["verdicts"])),
        results("eager-static", broken(everywhere(2))),
        results("onnx", lacking(everywhere(3)), device="cuda", runtime_info=dict.fromkeys(CONFIGS, ort)),
        results(
            "compiled",
            [],
            environment={},
            claims={},
            runtime_info={},
            seconds=0.0,
            unavailable="backend 'compiled' is not installed; install it with: pip install 'kvconform[compiled]'",
        ),
    ]


TOP_LEFT = Map(
    schedule="decode", sizes=[1, 1, 1], wanted=["x..", "xx.", "xxx"], seen=["x..", "x..", "x.."], notes=["a note"]
)
AS_EXPECTED = Map(schedule="chunked", sizes=[2, 1], wanted=["x..", "xx.", "xxx"], seen=["x..", "xx.", "xxx"])


def black_box(name: str, words: str = "behaves like a mask that begins at the top left") -> Results:
    """A broken black box with maps and a diagnosis."""
    said = "got 0.41, want -0.18"
    return results(
        name,
        [other("equivalence.decode", "hidden-self", Outcome.FAIL, said), passed("shape.length", "hidden-self")],
        target=Target(recognised=words, assumed=[words], configs={"hidden-self": {}}, noise={"hidden-self": 4e-5}),
        maps={"hidden-self": [AS_EXPECTED, TOP_LEFT]},
        diagnoses={
            "hidden-self": Diagnosis(
                mistake="M1",
                bug="https://github.com/pytorch/pytorch/issues/108108",
                first=FirstFailure(probe=words, mismatch=WRONG, sentence=words),
            )
        },
    )


def pairs() -> list[Pair]:
    draw = random.Random(5)
    two = [("eager", "onnx"), ("eager", "eager-static"), ("eager-static", "onnx")]
    off = {("attention-window", a, b): 29340.0 for a, b in two if "eager-static" in (a, b)}
    keys = [(config, a, b) for config in CONFIGS for a, b in two]
    return [Pair(*key, off.get(key, draw.random() * 0.3), 1e-6, 1008) for key in keys]
