"""Checks four published designs of a KV cache, as intended and as published; writes ``docs/published-designs.md``.

``python -m published_designs FOLDER`` prints the commands that write results to FOLDER, one a line. With ``-o PAGE`` it
writes the page from the results in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvconform.explain.diagnosis import Diagnosis
from kvconform.explain.diagnosis.text import sentence
from kvconform.explain.visibility import Map
from kvconform.explain.visibility import text as visibility_text
from kvconform.files import write_atomically
from kvconform.results.results import Results, read
from kvconform_reports.markdown import text
from kvconform_reports.terminal import printable
from kvconform_reports.view.outcomes import address, counted, duration, short, standing
from kvconform_specs.clauses import ALL
from kvconform_specs.errors import SpecError

PLACE = "UPSTREAMBUG"
"""Stands for a link while a sentence is escaped."""
MOST_CLAUSES = 3
"""Number of broken clauses that are shown with their sentence; the others are named."""
MOST_MAPS = 2
"""Number of maps of one version that are shown; its results hold all."""


@dataclass(frozen=True)
class Version:
    """One form of a design.

    name: the folder of its results.
    target: the target of the command: ``file.py:NAME`` is judged by its own uncached forward, a backend by the
        definition.
    init: arguments of the class in the file.
    config: the only config to judge; empty for all.
    """

    name: str
    heading: str
    what: str
    target: str
    init: Mapping[str, object] | None = None
    config: str = ""

    @property
    def command(self) -> list[str]:
        if ".py:" in self.target:
            init = ["--init", json.dumps(self.init)] if self.init else []
            return ["kvconform", "check", self.target, *init]
        config = ["--config", self.config] if self.config else []
        return ["kvconform", "run", "-b", self.target, "--effort", "smoke", *config]


@dataclass(frozen=True)
class Design:
    """source: where it was published. what: how its cache works. figures: what the source measured."""

    name: str
    source: str
    what: str
    figures: str
    versions: tuple[Version, ...]


CATALOGUE, EXAMPLES = "kvconform_backends.faults.published", "examples/published"
DESIGNS = (
    Design(
        "past-tuples",
        "A notebook on KV caches",
        "A step takes each layer's past as a tuple `(key, value)` and returns it grown by concatenation.",
        "one attention layer, d 512, 8 heads, vocabulary 50 257, prompt 128, 128 tokens generated, on an A100: "
        "0.0315 s with the cache, 0.0997 s without it, 3.17 times as fast",
        (
            Version(
                "past-tuples",
                "As intended, a backend",
                "The causal mask is aligned to the bottom right, so the last new token sees every token. Judged by the "
                "definition, on every layer and decoder of the suite.",
                "past-tuples",
            ),
            Version(
                "past-tuples-module",
                "As intended, a module",
                "One layer on hidden states, as in user code, judged by its own uncached forward.",
                f"{EXAMPLES}/past_tuples.py:PastTuples",
            ),
            Version(
                "past-tuples-first",
                "As published, first listing",
                "It always passes `is_causal=True`. torch aligns the causal triangle to the top left, so the only "
                "query of a decode step is in its first row.",
                f"{EXAMPLES}/past_tuples_first.py:FirstListing",
            ),
            Version(
                "past-tuples-second",
                "As published, second listing",
                "It passes `is_causal=(past_kv is None)`. A prompt and a decode step are right; a chunk of several "
                "tokens on a cache has no mask.",
                f"{EXAMPLES}/past_tuples_second.py:SecondListing",
            ),
            Version(
                "past-tuples-generation",
                "As published, the generation",
                "The loop runs the prefill twice, and continues from the first generated token without adding it to "
                "the output. Maps do not show this: each step is right.",
                f"{CATALOGUE}:PrefillTwice",
                config="decoder-rope",
            ),
        ),
    ),
    Design(
        "gpt2-transformers",
        "An article that times GPT-2 (124M) through transformers",
        "The library's own cache, `DynamicCache`, behind `past_key_values`.",
        "1000 new tokens, 10 runs, on a T4: 11.885 ± 0.272 s with the cache, 56.197 ± 1.855 s without it, 4.73 times "
        "as fast",
        (
            Version(
                "gpt2-transformers",
                "As intended, and as published",
                "A small GPT-2 with random weights. The article's use of the library has no known mistake.",
                "gpt2-transformers",
            ),
        ),
    ),
    Design(
        "module-buffers",
        "*LLMs from scratch* (rasbt/LLMs-from-scratch, ch04/03_kv-cache)",
        "The attention modules own the cache, in buffers `cache_k` and `cache_v` that grow by concatenation, and the "
        "model counts positions. It holds one sequence at a time, until it is reset.",
        "GPT-124M, 4-token prompt, 200 new tokens, on an M4: 110 tokens/s with the cache, 27 without it; its check is "
        "that both texts are equal",
        (
            Version(
                "module-buffers",
                "As intended, a backend",
                "The mask has a row for each new token and a column for each cached or new token. Judged by the "
                "definition, on every layer and decoder of the suite.",
                "module-buffers",
            ),
            Version(
                "module-buffers-module",
                "As intended, a module",
                "A decoder on token ids, as in user code, judged by its own uncached forward.",
                f"{EXAMPLES}/module_buffers.py:Decoder",
                {"mended": True},
            ),
            Version(
                "module-buffers-published",
                "As published",
                "The mask is cut to the new tokens, `mask[:t, :t]`. Its shape fits a prompt, and, by broadcasting, a "
                "decode step; a chunk of several tokens on a cache raises an exception.",
                f"{EXAMPLES}/module_buffers.py:Decoder",
            ),
        ),
    ),
    Design(
        "list-cache",
        "The conceptual demo of an article",
        "Each token's key and value is an entry of a Python list, and each step stacks the list.",
        "none",
        (
            Version(
                "list-cache",
                "As intended, a backend",
                "Each sequence has its own lists. Judged by the definition, on every layer and decoder of the suite.",
                "list-cache",
            ),
            Version(
                "list-cache-module",
                "As intended, a module",
                "One layer that owns its list and can be reset, judged by its own uncached forward.",
                f"{EXAMPLES}/list_cache.py:OwnListAttention",
            ),
            Version(
                "list-cache-published",
                "As published",
                "The list is a global variable, `KV_CACHE`, that is never cleared.",
                f"{EXAMPLES}/list_cache.py:ListAttention",
            ),
        ),
    ),
)
VERSIONS = tuple(version for design in DESIGNS for version in design.versions)


def commands(folder: Path) -> list[list[str]]:
    """The commands that check all versions; those of broken versions end with exit code 1."""
    return [[*version.command, "--out", str(folder / version.name)] for version in VERSIONS]


def gathered(folder: Path) -> dict[str, Results]:
    """The results in a folder, by the name of the version; missing ones are left out."""
    files = {version.name: sorted((folder / version.name).glob("*.json")) for version in VERSIONS}
    return {name: read(found[0]) for name, found in files.items() if found}


def render(found: Mapping[str, Results]) -> str:
    """The page: every design with its versions. Versions without results are listed as not run."""
    parts = [
        "# Four published designs, as intended and as published",
        "Four KV caches from teaching material, each as intended and as published, with its verdict. The code was "
        "rewritten: modules in the style of their sources under [examples/published](../examples/published), backends "
        "under [backends/kvconform_backends](../backends/kvconform_backends). This page is generated by "
        "`nox -s designs` from the results of the commands on it.",
        _overview(found),
        f"In a map, each row is an output and each column a token: `{visibility_text.LEGEND}`.",
    ]
    for design in DESIGNS:
        parts += [
            f"## {design.name}",
            f"{design.source}. {design.what} Published figures: {design.figures}.",
            *(part for version in design.versions for part in _version(version, found.get(version.name))),
        ]
    return "\n\n".join(parts) + "\n"


def _overview(found: Mapping[str, Results]) -> str:
    lines = ["| design | version | verdict | programs | time |", "|---|---|---|---|---|"]
    for design in DESIGNS:
        for version in design.versions:
            results = found.get(version.name)
            cells = ["not run", "", ""] if results is None else [_verdict(results), *_effort(results)]
            lines.append(f"| {design.name} | {version.heading} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(results: Results) -> str:
    stands = standing(results)
    return f"{stands.symbol} {stands.word}"


def _effort(results: Results) -> list[str]:
    programs = sum(verdict.programs for verdict in results.verdicts)
    return [counted(programs, "program").partition(" ")[0], duration(results.seconds)]


def _version(version: Version, results: Results | None) -> Iterator[str]:
    yield f"### {version.name}: {version.heading[0].lower()}{version.heading[1:]}"
    yield version.what
    yield _fenced(f"$ {shlex.join(version.command)}", "text")
    if results is None:
        yield "It was not run."
        return
    stands = standing(results)
    programs, seconds = _effort(results)
    yield f"{_verdict(results)}: {text(stands.sentence)}; {programs} programs in {seconds}."
    if results.target is not None:
        yield f"Recognised: {text(results.target.recognised)}."
    yield from _broken(results)
    yield from _maps(results.maps)


def _broken(results: Results) -> Iterator[str]:
    """The diagnosis, then the broken clauses, core clauses first."""
    core = {clause.name for clause in ALL if clause.core}
    broken = [verdict for verdict in results.verdicts if verdict.outcome.broken]
    broken.sort(key=lambda verdict: verdict.clause not in core)
    if not broken:
        return
    sentences = {sentence(diagnosis): diagnosis for diagnosis in results.diagnoses.values()}
    yield from (_diagnosis(diagnosis) for diagnosis in sentences.values())
    if not sentences:
        yield "No diagnosis: the results hold none."
    lines = [f"- **{text(v.clause)}** [{text(v.config)}]: {text(v.sentence)}" for v in broken[:MOST_CLAUSES]]
    others = dict.fromkeys(verdict.clause for verdict in broken[MOST_CLAUSES:])
    if others:
        lines.append(f"- also broken: {text(', '.join(others))}")
    yield "\n".join(lines)


def _diagnosis(diagnosis: Diagnosis) -> str:
    """The sentence, with the address of the bug as a link."""
    if not address(diagnosis.bug):
        return f"> {text(sentence(diagnosis))}"
    link = f"[{text(short(diagnosis.bug))}]({diagnosis.bug})"
    return f"> {text(sentence(diagnosis, bug=PLACE))}".replace(PLACE, link)


def _maps(maps: Mapping[str, list[Map]]) -> Iterator[str]:
    """Maps of the first config that has any: those that differ or stopped, else undetermined ones, else chunked."""
    drawn = next((found for found in maps.values() if found), [])
    if not drawn:
        yield "No map: only modules, and configs with a broken clause, have maps."
        return
    wrong = [one for one in drawn if one.differences or one.stopped]
    undetermined = [one for one in drawn if not one.right]
    chunked = [one for one in drawn if one.schedule == "chunked"] or drawn[:1]
    for one in (wrong or undetermined or chunked)[:MOST_MAPS]:
        yield _fenced(visibility_text.drawing(one), "text")


def _fenced(words: str, kind: str) -> str:
    """A fenced block; its fence is longer than any in ``words``."""
    fence = "```"
    while fence in words:
        fence += "`"
    return "\n".join((f"{fence}{kind}", *map(printable, words.splitlines()), fence))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m published_designs", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the results")
    parser.add_argument("-o", "--out", type=Path, help="write the page to this file")
    given = parser.parse_args()
    if given.out is None:
        print("\n".join(map(shlex.join, commands(given.folder))))
        return
    found = gathered(given.folder)
    if not found:
        raise SpecError("designs", f"{given.folder} holds no results: run the commands first")
    write_atomically(given.out, render(found).encode())


if __name__ == "__main__":
    main()
