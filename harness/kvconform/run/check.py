"""``kvconform check TARGET``: judges a target for which no backend has been written.

A target is a module in a file, an ONNX decoder, a transformers model or a backend; each has an address that every other
command accepts as well (``worker.registry``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvconform.errors import BadArgument, SpecError
from kvconform.explain.diagnosis import text as diagnosis_text
from kvconform.explain.visibility import text as visibility_text
from kvconform.judging.verdict import Outcome, Verdict
from kvconform.results.results import Results
from kvconform.results.serving import Served
from kvconform.search.effort import CHECK
from kvconform.worker.registry import installed
from kvconform_specs.claims import Claims

SHOWN, DRAWN = CHECK.leaks, 2
"""How many broken clauses are printed in full, the others by name; how many maps are drawn, the others in words."""
LISTED = 5
"""How many clauses are named that have one reason."""
NOT_IN_MAPS = (
    "within these lengths each output depends on the right tokens: the mistake is in the numbers, or shows in programs "
    "that no map runs"
)
UNCLAIMED = {
    "two rows": "several rows",
    "ragged": "rows of different lengths",
    "left padding": "padded rows",
    "mask": "a caller's mask",
    "truncate": "truncation",
    "fork": "forks",
    "reorder": "reordered rows",
    "poison": "what unused slots hold",
    "contexts": "contexts (adapters, images, encoder states)",
}
"""What a black box is not asked without a claim, in words."""
ENOUGH = {"quantiser": {"kv_bits": 8}, "residual": {"kv_bits": 8}}
"""Claims that others need."""
CLAIM_HELP = (
    "What the target can do, where trials cannot tell a limit from a mistake, as NAME=JSON: max_chunk=6 (tokens of a "
    "call), max_batch=1 (rows), max_sequences=1, overflow=refused, returns=last, cache_dtype=bfloat16 or kv_bits=8 "
    "(a lossy cache). May be repeated. docs/spec.md lists all claims."
)
OPTION_HELP = (
    "An option of the target as NAME=JSON, such as cache=static (transformers), dtype=bfloat16, seed=1, or how a "
    'module is called, which is otherwise found by trial: convention=\'{"call": "module(x, past, cached)", '
    '"output": "out[0]", "present": "out[1]"}\'. Names in it: module, x (the new tokens), sofar (all tokens), '
    "past, cached, new, batch, out (the result). May be repeated."
)
FORMS = (
    "file.py:NAME or package.module:NAME (a class, factory or function), decoder.onnx or a folder with one, "
    "hf:DIRECTORY or hf:CONFIG_CLASS (transformers), the name of an installed backend, or the URL of a "
    "serving engine such as http://127.0.0.1:8000/v1"
)


ADDRESSED = ("hf:", "onnx:", "py:")
REFERENCE_HELP = (
    "Another artefact with the same weights, in any of the forms of TARGET, such as the model that TARGET was exported "
    "from: its forward without a cache is the reference, in place of the target's own. What an export has changed "
    "(window, scale, heads, positions, soft cap) is found, too. It may be an address with options, such as "
    '\'py:model.py:Model?{"init": {"layers": 2}}\'.'
)


def addresses(target: str, options: Mapping[str, Any], reference: str = "") -> list[str]:
    """The addresses behind a target; a transformers model has one for each kind of cache. ``reference``: another
    target, which it is compared with. Raises BadArgument."""
    if reference:
        try:
            whole = reference if reference.startswith(ADDRESSED) else addresses(reference, {})[0]
            options = {**options, "reference": whole}
        except BadArgument as error:
            sentence = str(error).replace("target", "reference", 1)
            raise BadArgument("reference", reference, sentence=sentence) from None
    if target.startswith("hf:"):
        caches = [options["cache"]] if "cache" in options else ["dynamic", "static"]
        return [_address("hf", target.removeprefix("hf:"), {**options, "cache": cache}) for cache in caches]
    if target.endswith(".onnx") or (Path(target).is_dir() and target not in installed()):
        if not Path(target).exists():
            raise BadArgument("target", target, sentence=f"target: no file {target}")
        return [_address("onnx", target, options)]
    if target in installed():
        if options:
            name = next((name for name in ("claim", "reference") if {name, f"{name}s"} & {*options}), "option")
            raise BadArgument(name, target, sentence=f"{name}: the installed backend {target!r} takes none")
        return [target]
    module, colon, name = target.rpartition(":")
    if not colon or not module or not all(part.isidentifier() for part in name.split(".")):
        raise BadArgument("target", target, sentence=f"unrecognised target {target!r}; expected {FORMS}")
    if module.endswith(".py") and not Path(module).is_file():
        raise BadArgument("target", target, sentence=f"target: no file {module}")
    return [_address("py", target, options)]


def options(init: str, others: Sequence[str], claimed: Sequence[str] = ()) -> dict[str, Any]:
    """The options of a target from the command line. Raises BadArgument if one is not valid JSON, or a claim has an
    unknown name or value."""
    found: dict[str, Any] = {}
    for at, text in [("init", f"init={init}")] * bool(init) + [("option", text) for text in others]:
        name, value = _pair(at, text)
        found[name] = value
    if not isinstance(found.get("init", {}), dict):
        raise BadArgument("init", init, sentence=f"init: want a JSON object, got {init!r}")
    claims = dict(_pair("claim", text) for text in claimed)
    known = [one.name for one in fields(Claims)]
    for name, value in claims.items():
        if name not in known:
            raise BadArgument("claim", name, known)
        try:
            Claims.from_json({**ENOUGH.get(name, {}), name: value})
        except SpecError as error:
            raise BadArgument("claim", value, sentence=f"claim: {error}") from None
    return found | ({"claims": claims} if claims else {})


def _pair(at: str, text: str) -> tuple[str, Any]:
    """``NAME=JSON``, or ``NAME=word`` without quotation marks."""
    name, equals, value = text.partition("=")
    if not equals:
        raise BadArgument(at, text, sentence=f"{at}: want NAME=JSON, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        if at == "init" or not value.isidentifier():
            raise BadArgument(at, text, sentence=f"{at}: {name} is not valid JSON: {value!r}") from None
        return name, value


def _address(kind: str, target: str, options: Mapping[str, Any]) -> str:
    return f"{kind}:{target}" + (f"?{json.dumps(options, sort_keys=True)}" if options else "")


def header(results: Results) -> Iterator[str]:
    """How a target is called, and what is assumed about it, as far as it is known."""
    if results.served is not None:
        yield from served(results.served)
    if results.target is not None:
        yield f"{results.backend}: {results.target.recognised}"
        yield from (f"  assumed: {words}" for words in results.target.assumed)
        if results.target.reference:
            yield f"  reference: the forward without a cache of {results.target.reference}"
        else:
            yield "  reference: its own forward without a cache; a mistake that both share is not detected"
        for name, noise in results.target.noise.items():
            yield f"  noise floor [{name}]: rounding moves outputs by at most {noise:.1g} of their size"


def served(found: Served) -> Iterator[str]:
    """What was found of a serving engine, and what its numbers are worth."""
    told = [f"dtype {found.dtype or 'unknown'}", f"context {found.context}", f"vocabulary {found.vocabulary}"]
    told += [f"blocks of {found.block} tokens"] if found.block else []
    told += [f"a cache of {found.cache_tokens} tokens"] if found.cache_tokens else []
    yield f"{found.engine} {found.version}, {found.model}: {', '.join(told)}"
    yield f"  abilities: {', '.join(found.abilities) or 'none'}"
    yield from (f"  assumed: {words}" for words in found.assumed)
    if found.reference:
        yield (
            f"  references: its own answers without the prefix cache; {found.reference}, where a difference above "
            f"{found.reference_bound:.2g} is an error and one wrong token makes {found.reference_effect:.2g} or more"
        )
    else:
        yield (
            "  reference: its own answers without the prefix cache; a mistake that both share is detected only with "
            "--model DIRECTORY, the weights that it serves"
        )
    if found.changes:
        lengths = ", ".join(map(str, found.lengths))
        yield (
            f"  noise: decode and prefill without the cache differ by at most {found.noise:.2g} at lengths {lengths} "
            f"(floor {found.floor:.2g}); the same request again by {found.repeat:.2g}"
        )
        effect = f"by {found.effect:.2g} or more" if found.seen else "by less than that can be told from noise"
        bound = f"a difference above {found.bound:.2g} is an error" if found.bound else "no verdict by numbers"
        yield f"  effect of one wrong token: {found.seen} of {found.changes} move answers {effect}; {bound}"


def first_tokens(found: Served) -> Iterator[str]:
    """The times to the first token, a line for each length of the prompt."""
    for one in found.seconds_to_first:
        yield (
            f"  first token of {one.length}: cold {1e3 * one.cold:.3g} ms, warm {1e3 * one.warm:.3g} ms "
            f"({one.cached} tokens cached): {one.ratio:.3g} times as fast (95 % interval {one.low:.3g} to "
            f"{one.high:.3g}, {one.pairs} pairs)"
        )


def lines(results: Results, folder: Path, told: Collection[str] = ()) -> Iterator[str]:
    """The report on a target: how it was called, what is wrong with it, and which tokens its outputs depend on.
    ``told``: the lines of its header that are printed already."""
    yield from (line for line in header(results) if line not in told)
    broken = results.failures
    yield from diagnosed(results)
    groups = _by_error(broken)
    for first, *others in groups[:SHOWN]:
        yield from _failure(results, first, folder)
        if others:
            yield f"  by the same error: {', '.join(dict.fromkeys(v.clause for v in others))}"
    if len(groups) > SHOWN:
        yield f"also broken: {', '.join(dict.fromkeys(v.clause for group in groups[SHOWN:] for v in group))}"
    yield from maps(results)
    yield f"{results.backend}: {results.summary}"
    yield from _not_tried(results)
    passed = sum(verdict.outcome is Outcome.PASS for verdict in results.verdicts)
    programs = sum(verdict.programs for verdict in results.verdicts)
    if results.verdicts:
        yield f"  {passed} clauses hold, {len(broken)} are broken; {programs} programs in {results.seconds:.0f} s"
        yield from remarks(results)


def _by_error(broken: Sequence[Verdict]) -> list[list[Verdict]]:
    """The failures, those together that raised one error; each other one alone."""
    groups: dict[object, list[Verdict]] = {}
    for verdict in broken:
        groups.setdefault(verdict.error_pattern or verdict.key, []).append(verdict)
    return [*groups.values()]


def counted(counts: Mapping[str, int]) -> str:
    """Numbers of cells by outcome, in words."""
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)


def undecided(results: Results) -> Iterator[str]:
    """Why cells have no verdict on the backend, though its claims include them: each reason with its clauses."""
    groups: dict[tuple[str, str], list[str]] = {}
    for verdict in results.verdicts:
        if verdict.outcome in (Outcome.INCONCLUSIVE, Outcome.NOT_EXERCISED):
            groups.setdefault((verdict.outcome.value, verdict.sentence), []).append(verdict.clause)
    for (outcome, sentence), clauses in groups.items():
        yield f"  {outcome}: {_listed(clauses)}: {sentence}"


def remarks(results: Results) -> Iterator[str]:
    """What stands beside a conclusion: why cells have no verdict, which guarantees are refuted, what time has cut."""
    yield from undecided(results)
    yield from _not_applicable(results)
    refuted = [verdict.clause for verdict in results.verdicts if verdict.outcome is Outcome.REFUTED]
    if refuted:
        yield f"  refuted: {_listed(refuted)}: measured guarantees that do not hold; conformance does not require them"
    cut = [verdict.clause for verdict in results.verdicts if verdict.cut]
    if cut:
        yield f"  cut: {_listed(cut)}: the time limit ended before all planned programs were judged"


def _not_applicable(results: Results) -> Iterator[str]:
    """Why cells are not judged that the claims leave out: the reasons with most cells."""
    reasons = Counter(one.sentence for one in results.verdicts if one.outcome is Outcome.UNSUPPORTED)
    named = [f"{words} ({count})" for words, count in reasons.most_common(LISTED)]
    if named:
        more = f" and {len(reasons) - LISTED} more reasons" if len(reasons) > LISTED else ""
        yield f"  not applicable: {', '.join(named)}{more}"


def _listed(clauses: Sequence[str]) -> str:
    names = list(dict.fromkeys(clauses))
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def foremost(results: Results) -> Iterator[str]:
    """Of several failures, the one to read first."""
    if len(results.failures) > 1:
        first = results.failures[0]
        yield f"read first: {first.clause} on {results.backend} [{first.config}]: {first.sentence}"


def diagnosed(results: Results) -> Iterator[str]:
    """The diagnoses, config by config."""
    for name, found in results.diagnoses.items():
        yield f"diagnosis [{name}]: {diagnosis_text.sentence(found)}"


def _not_tried(results: Results) -> Iterator[str]:
    """What a black box has or may have that its verdict says nothing of, and memory that it need not take."""
    if results.target is None or not results.verdicts:
        return
    claims = Claims.from_json(results.claims)
    if results.target.held is not None and results.target.held.sentence:
        yield f"  memory: {results.target.held.sentence}"
    left = [*results.target.not_tried, *(words for need, words in UNCLAIMED.items() if not claims.can(need))]
    if left:
        yield f"  not tried: {', '.join(left)}"


def _failure(results: Results, verdict: Verdict, folder: Path) -> Iterator[str]:
    yield f"broken: {verdict.clause}: {verdict.sentence}"
    if verdict.counterexample:
        file = folder / "failures" / results.backend / verdict.counterexample
        yield from steps(verdict)
        yield f"  replay: kvconform replay {file}   (--script bug.py writes it as one file)"


def steps(verdict: Verdict) -> Iterator[str]:
    """The line with the steps of the program that broke a clause; nothing where no program was running."""
    if verdict.steps:
        yield f"  steps: {verdict.steps}"


def maps(results: Results, drawn: int = DRAWN) -> Iterator[str]:
    """For each config, the first wrong maps as pictures and the others in words; one picture if none is wrong.
    ``drawn``: how many are pictures."""
    shown, failed = False, {verdict.config for verdict in results.failures}
    for name, found in results.maps.items():
        wrong = [one for one in found if not one.right]
        pictures = wrong[:drawn] or [one for one in found if one.schedule == "chunked"] or found[:1]
        right = [one for one in found if one.right]
        if right:
            yield f"visibility [{name}]: as expected: {visibility_text.coverage(right)}"
        if right and not wrong and name in failed:
            yield f"visibility [{name}]: {NOT_IN_MAPS}"
        for one in pictures:
            yield f"visibility [{name}]: {visibility_text.drawing(one)}"
        yield from (f"visibility [{name}]: {visibility_text.words(one)}" for one in wrong[drawn:])
        shown = shown or bool(pictures)
    if shown:
        yield visibility_text.LEGEND
