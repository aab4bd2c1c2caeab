"""The page ``docs/engines-serving.md``: what each serving engine was found to do, from ``docs/evidence/serving``.

``python docs/studies/serving_page.py RESULTS.json... --mode WORDS -o FILE`` keeps what the page shows of the first
results, and counts of the others, which are runs with other seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs/evidence/serving"
FAULTS = "vllm-faults.json"
Json = Mapping[str, Any]
MARKS = {
    "pass": "✓",
    "fail": "**✗**",
    "crash": "**✗ died**",
    "unsupported": "",
    "not exercised": "not exercised",
    "inconclusive": "blind",
    "not confirmed": "failed once, not again",
    "refuted": "no",
}
GUARANTEES = {"repeatable", "batch-invariant", "bitwise-hit"}


BROKEN = ("fail", "crash", "timeout")


def compact(results: Json, mode: str, *others: Json) -> dict[str, Any]:
    """What is kept of a run. mode: how the engine was started, in words. others: runs with other seeds."""
    served = results["served"]
    kept: tuple[str, ...] = (
        "engine",
        "version",
        "model",
        "dtype",
        "context",
        "block",
        "cache_tokens",
        "cache_off",
        "alternatives",
    )
    kept += ("assumed", "requests", "hits", "preemptions", "noise", "floor", "repeat", "effect", "changes", "seen")
    verdicts = results["verdicts"]
    return {
        "mode": mode,
        "suite": results["suite"],
        "started": results["started"],
        "seconds": results["seconds"],
        "first_verdict": round(results["seconds"] - sum(v.get("seconds", 0.0) for v in verdicts[1:]), 1),
        **{name: served.get(name) for name in (*kept, "bound")},
        "judged_by_model": bool(served.get("reference")),
        "reference_bound": served.get("reference_bound"),
        "reference_effect": served.get("reference_effect"),
        "seconds_to_first": served.get("seconds_to_first", []),
        "runs": [counts(one) for one in (results, *others)],
        "clauses": {v["clause"]: _came_to(v) for v in verdicts},
        "found": [
            {"clause": v["clause"], "sentence": v["sentence"], "steps": v.get("steps", "")}
            for v in verdicts
            if v["outcome"] not in ("pass", "unsupported")
        ],
    }


def _came_to(verdict: Json) -> str:
    """The outcome; of one that failed once and was not confirmed, that."""
    return str(verdict["reason"] if verdict.get("reason") == "not confirmed" else verdict["outcome"])


def counts(results: Json) -> dict[str, int]:
    """Of one run: its seed, how many requests were sent and read from the cache, and how many clauses broke."""
    broken = sum(verdict["outcome"] in BROKEN for verdict in results["verdicts"])
    served = results["served"]
    return {"seed": results["seed"], "requests": served["requests"], "hits": served["hits"], "broken": broken}


def render(records: Sequence[Json], faults: Json | None) -> str:
    """The page."""
    records = sorted(records, key=lambda record: (record["engine"].lower(), record["mode"]))
    parts = (_head(records), _clauses(records), _first_tokens(records), _found(records))
    return "\n".join([*(line for part in parts for line in (*part, "")), *_faults(faults)]).rstrip() + "\n"


def _head(records: Sequence[Json]) -> Iterator[str]:
    yield HEAD
    yield "| engine | mode | verdict | requests (hits) | all runs | first verdict | noise | one wrong token | bound |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for r in records:
        seen = f"{r['effect']:.2g}" if r["seen"] else "not seen"
        bound = "none: blind" if r["bound"] is None else f"{r['bound']:.2g}"
        requests = f"{r['requests']} ({r['hits']})"
        yield (
            f"| {r['engine']} {r['version']} | {r['mode']} | {_verdict(r)} | {requests} | {_runs(r)} | "
            f"{r['first_verdict']:.0f} s | "
            f"{max(r['noise'], r['floor']):.2g} | {seen} ({r['seen']} of {r['changes']}) | {bound} |"
        )


def _runs(record: Json) -> str:
    runs = record.get("runs", [])
    return f"{sum(one['requests'] for one in runs)} in {len(runs)}: {sum(one['broken'] for one in runs)} broken"


def _first_tokens(records: Sequence[Json]) -> Iterator[str]:
    timed = [record for record in records if record.get("seconds_to_first")]
    if not timed:
        return
    yield "## Time to the first token"
    yield ""
    yield TIMES
    yield ""
    yield "| engine | mode | tokens | cached | cold | warm | times as fast [95 % interval] |"
    yield "|---|---|---|---|---|---|---|"
    for r in timed:
        for one in r["seconds_to_first"]:
            yield (
                f"| {r['engine']} | {r['mode']} | {one['length']} | {one['cached']} | {1e3 * one['cold']:.3g} ms | "
                f"{1e3 * one['warm']:.3g} ms | {one['ratio']:.3g} [{one['low']:.3g}, {one['high']:.3g}] |"
            )


def _verdict(record: Json) -> str:
    outcomes = {name: outcome for name, outcome in record["clauses"].items() if _short(name) not in GUARANTEES}
    broken = [_short(name) for name, outcome in outcomes.items() if outcome in ("fail", "crash")]
    if broken:
        return f"**not conformant**: {', '.join(broken)}"
    undecided = ("inconclusive", "not exercised", "not confirmed")
    open_ = [_short(name) for name, outcome in outcomes.items() if outcome in undecided]
    return f"no verdict on {len(open_)} clauses" if open_ else "conformant"


def _short(name: str) -> str:
    return name.removeprefix("serving.")


def _clauses(records: Sequence[Json]) -> Iterator[str]:
    names = list(dict.fromkeys(name for record in records for name in record["clauses"]))
    yield "## By clause"
    yield ""
    yield "✓ holds, ✗ broken, *no*: a guarantee that does not hold; empty: the engine has no such ability."
    yield ""
    yield "| clause | " + " | ".join(f"{r['engine']}, {r['mode']}" for r in records) + " |"
    yield "|---|" + "---|" * len(records)
    for name in names:
        cells = [MARKS.get(r["clauses"].get(name, "unsupported"), r["clauses"].get(name, "")) for r in records]
        yield f"| {_short(name)} | " + " | ".join(cells) + " |"


def _found(records: Sequence[Json]) -> Iterator[str]:
    yield "## What was found"
    yield ""
    for r in records:
        for one in r["found"]:
            if _short(one["clause"]) not in GUARANTEES and r["clauses"][one["clause"]] in (*BROKEN, "not confirmed"):
                yield f"- {r['engine']} {r['version']}, {r['mode']}, {one['clause']}: {one['sentence']}"
                if one["steps"]:
                    yield f"  Requests: {one['steps']}."
    yield ""
    yield UPSTREAM


def _faults(faults: Json | None) -> Iterator[str]:
    if faults is None:
        return
    yield ""
    yield "## Mistakes planted in vLLM"
    yield ""
    yield FAULTS_HEAD.format(version=faults["version"])
    yield ""
    yield "| what is wrong | detected by | programs | requests |"
    yield "|---|---|---|---|"
    for row in faults["faults"]:
        detected = _short(row["detected"]) or ("nothing to detect" if row["fault"] is None else "**not detected**")
        yield f"| {row['what']} | {detected} | {row.get('programs', '')} | {row['requests']} |"


HEAD = """# Serving engines, measured

Generated by `nox -s regenerate` from `docs/evidence/serving`. Do not edit.

Each engine serves a tiny random model that is made here (a Llama of 2 layers with grouped queries, float32), on 2 CPU
cores that other work shared: times are upper bounds. `nox -s "engine(NAME)"` judges one again.

*Noise*: the largest difference of a log-probability between decode and prefill without the cache, or the floor of the
dtype where that is higher. *One wrong token*: the smallest effect of one changed token of a prompt, of those that can
be told from noise, and how many of those tried can. A difference above the bound is an error; where the two do not
separate there is no bound and no verdict. *First verdict*: the start of the engine, the measurement of noise and the
first clause. *All runs*: requests in how many runs, each with another seed, and how many clauses broke in them. `model`
compares with the same weights in transformers.
"""
TIMES = """Prompts of an engine that conforms, cold (without the prefix cache) and warm in turn; medians, and the
interval of the median ratio of pairs."""

UPSTREAM = """Scripts that show these without kvconform, and mistakes that were found beside the law:

- `docs/upstream/transformers_cb_too_long.py`: a request that is longer than the cache ends the manager for all others.
- `docs/upstream/openvino_genai_ignored.py`: a prompt longer than the cache makes the pipeline ignore a short one.
- `docs/upstream/mlx_lm_empty_prompt.py`: an empty prompt ends the server's generation thread, for all later requests.
- `docs/upstream/mlx_lm_logprobs.py`: with `top_logprobs` an entry's own token is not the generated one.
- `docs/upstream/vllm_prompt_logprobs.py`: scores of cached positions are uninitialised memory if a caller has the
  cache read for them ([vllm#42019](https://github.com/vllm-project/vllm/issues/42019)); by default it is not read."""

FAULTS_HEAD = """`nox -s vllm_faults` changes vLLM {version} in its own process; each row is one mistake. The requests
are those sent up to the end of the clause that detects it, shrinking included."""


def page(folder: Path = EVIDENCE) -> str:
    """The page from the files of a folder."""
    texts = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    faults = texts.pop(FAULTS, None)
    return render(list(texts.values()), faults)


def main() -> None:
    parser = argparse.ArgumentParser(prog="serving_page.py", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results of kvconform run or check on an engine")
    parser.add_argument("--mode", required=True, help="how the engine was started, in words")
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    shown, *others = (json.loads(file.read_text()) for file in given.results)
    kept = compact(shown, given.mode, *others)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
