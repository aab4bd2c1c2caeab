"""The spec as a page, ``docs/spec.md``, generated from the clauses, configs, claims and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from itertools import groupby
from typing import Any

from kvconform.judging.every_clause import BY_NAME
from kvconform.judging.every_clause import CHAPTERS as EVERY
from kvconform.spec_docs import engines
from kvconform.spec_docs.clause import named, needs, scope
from kvconform_specs import SUITE_VERSION, program
from kvconform_specs.ambiguities import AMBIGUITIES
from kvconform_specs.claims import ABILITIES, DERIVED, ENOUGH, Claims, Precision
from kvconform_specs.clause import Relation
from kvconform_specs.clauses import ALL, CHAPTERS
from kvconform_specs.config import DTYPES, POSITIONS, PROFILES, Config
from kvconform_specs.configs import CONFIGS
from kvconform_specs.program import DISTRIBUTIONS, LAYOUTS, MALFORMED, OPS, POISONS
from kvconform_specs.reference import bounds, definition
from kvconform_specs.rotary import Rotary

LAW = (
    "**A KV cache must be unobservable.** For every program of cached steps, each sequence's outputs are what the "
    "cache-less definition gives on that sequence's tokens, within a bound derived from the arithmetic, and no step "
    "changes what another sequence will see."
)


def page() -> str:
    """The whole spec as Markdown: ``docs/spec.md``."""
    parts = [
        "# The spec of kvconform",
        f"Suite {SUITE_VERSION}: {len(BY_NAME)} clauses in {len(EVERY)} chapters. Written by "
        "`kvconform spec --write docs/spec.md` from `specs/kvconform_specs/`; change it there. "
        "`kvconform spec CLAUSE` explains one clause and shows a program that tries it.",
        f"## The law\n\n> {LAW}",
        "Each clause is one part of this law, isolated so that its failure identifies one mistake. A backend that "
        "violates a **must** is not conformant. A **should** is a guarantee that is measured and reported, and not "
        "required. Conformance in a profile needs a pass on each of its **core** clauses. A clause that needs "
        "something that a backend does not claim is *unsupported* there, which is not a pass.",
        "\n".join(f"- [{name}](#{name}): {_line(words)}" for name, words in EVERY.items()),
        "[Configs](#configs) · [Programs](#programs) · [Claims](#claims) · [The definition](#the-definition) · "
        "[Bounds](#bounds) · [Relations](#relations) · [Settled ambiguities](#settled-ambiguities) · "
        "[Table of configs](#table-of-configs) · [Versions](#versions)",
        *_definitions(),
        *(part for chapter in CHAPTERS for part in _chapter(chapter)),
        *engines.chapter(),
        *_tables(),
        f"## Versions\n\nThis is suite {SUITE_VERSION}; every results file names its suite. A change that can turn a "
        "conformant backend red raises the version and is marked **red** in the [changelog](../CHANGELOG.md). The name "
        "of a clause never changes.",
    ]
    return "\n\n".join(parts) + "\n"


def _definitions() -> Iterator[str]:
    """Configs, programs, claims, the definition, its bounds, and the relations."""
    prose, texts = documented(Config)
    meanings = {
        "profile": f"{_codes(PROFILES)}: q, k, v to the output of one layer, or token ids to logits.",
        "heads": "Query heads, `h`.",
        "kv_heads": "KV heads, `g`; they divide the query heads.",
        "head_dim": "Head dim, `d`.",
        "layers": "Layers, `l`; 1 in the attention profile.",
        "vocabulary": "Number of token ids, `V`; read by the decoder only.",
        "positions": f"{_codes(POSITIONS)}; {texts['positions']}",
        "dtype": f"{_codes(DTYPES)}.",
        "seed": "Seed of the weights.",
        "init_std": "Standard deviation of the weights.",
    }
    yield f"## Configs\n\n{prose}"
    yield (
        "Axes, everywhere: `b` batch, `h` query heads, `g` KV heads, `t` new tokens, `s` cached + new tokens, `d` head "
        "dim, `l` layers, `V` vocabulary. The suite uses a [closed table](#table-of-configs) of configs."
    )
    yield _table(("field", "default", "meaning"), _fields(Config, {**texts, **meanings}))
    yield f"## Programs\n\n{_marked(program.__doc__)}"
    for op, kind in OPS.items():
        prose, texts = documented(kind)
        yield "\n".join([f"**{op}.** {prose}", "", *(f"- {names}: {text}" for names, text in _grouped(texts))]).rstrip()
    yield (
        f"Layouts: {_codes(LAYOUTS)}. Poisons: {_codes(POISONS)}. Distributions: {_codes(DISTRIBUTIONS)}. What can be "
        "wrong with an append: "
        + "; ".join(f"{_codes(wrong)} in the {profile} profile" for profile, wrong in MALFORMED.items())
        + "."
    )
    prose, texts = documented(Claims)
    texts |= documented(Precision)[1] | {
        "profiles": f"{_codes(PROFILES)}.",
        "abilities": "See below.",
        "dtypes": f"{_codes(DTYPES)}.",
        "devices": "`cpu`, `cuda`.",
    }
    yield f"## Claims\n\n{prose}"
    yield _table(("claim", "default", "meaning"), _fields(Claims, texts))
    yield "The names in `abilities`, and the other needs of clauses:"
    needed = {need: [c.name for c in ALL if need in (*c.needs, *c.needs_any)] for need in (*ABILITIES, *DERIVED)}
    rows = [(f"`{name}`", words, _linked(needed[name])) for name, words in ABILITIES.items()]
    rows += [(name, f"claims, for example, {_claimed(name)}", _linked(needed[name])) for name in DERIVED]
    yield _table(("ability", "the backend", "needed by"), rows)
    yield f"## The definition\n\n{_marked(definition.__doc__)}"
    yield (
        "Scores pass through **scale → softcap → bias → mask → sink → softmax**: they are multiplied by the scale; the "
        "softcap is applied; alibi's bias is added; a key is visible if causality, window and the caller's mask all "
        "allow it; the sink is added to the denominator, neither scaled nor capped; the weights multiply the values. "
        "A query that sees no key gives exactly 0."
    )
    yield f"## Bounds\n\n{_marked(bounds.__doc__)}"
    yield (
        "## Relations\n\nWhat a clause can require of a case's programs is a closed list. With every relation, each "
        "legal step must run, each reject step must be refused, and each output must have its shape."
    )
    yield _table(("relation", "holds if"), [(named(relation), relation.value) for relation in Relation])


def _chapter(chapter: str) -> Iterator[str]:
    yield f"## {chapter}\n\n{_line(CHAPTERS[chapter])}"
    for clause in (c for c in ALL if c.chapter == chapter):
        facts = [f"- **{clause.level.value}**{', **core**' if clause.core else ''}; {scope(clause)}"]
        if clause.needs or clause.needs_any:
            facts.append(f"- needs {needs(clause)}")
        facts += [f"- {named(relation)}: {relation.value}" for relation in clause.relations]
        facts.append(f"- each cell that can, tries: {'; '.join(one.words for one in clause.situations)}")
        settled = [f"[{a.id}](#{a.id.lower()})" for a in AMBIGUITIES if clause.name in a.by]
        if settled:
            facts.append(f"- settles {', '.join(settled)}")
        facts.append(f"- stops {', '.join(f'[{_short(link)}]({link})' for link in clause.why)}")
        yield f"### {clause.name}\n\n{clause.text}\n\n" + "\n".join(facts)


def _tables() -> Iterator[str]:
    yield (
        "## Settled ambiguities\n\nImplementations differ on these questions. For each, a clause states the answer, or "
        "a claim lets the backend choose it and a clause checks the claim, or no program raises the question."
    )
    yield _table(
        ("", "question", "answer", "by", "without a claim"),
        [(f'<a id="{a.id.lower()}"></a>{a.id}', a.question, a.settled, _linked(a.by), a.default) for a in AMBIGUITIES],
    )
    sizes = ("profile", "heads", "kv_heads", "head_dim", "layers", "capacity")
    standard = {f.name: f.default for f in fields(Config)}
    rows = []
    for name, config in CONFIGS.items():
        own = {field: getattr(config, field) for field in standard if getattr(config, field) != standard[field]}
        told = {field: value.kind if isinstance(value, Rotary) else value for field, value in own.items()}
        rest = [f"{field} {value}" for field, value in told.items() if field not in sizes]
        rows.append((name, *(str(getattr(config, size)) for size in sizes), ", ".join(rest)))
    yield "## Table of configs\n\nEvery backend is tested on these, in float32 or in the dtypes of the run."
    yield _table(("config", "profile", "h", "g", "d", "l", "capacity", "other fields"), rows)


# --- words and Markdown ---
def documented(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """A dataclass's docstring: its first part, and the text of each field."""
    either = "|".join(field.name for field in fields(kind))
    prose, *rest = re.split(
        rf"(?:^|\s)((?:{either})(?:, (?:{either}))*)(?= ``\w+``:\s|:\s)", inspect.getdoc(kind) or ""
    )
    texts: dict[str, str] = {}
    for names, text in zip(rest[::2], rest[1::2], strict=True):
        texts |= dict.fromkeys(names.split(", "), _line(text.removeprefix(":")))
    return _marked(prose), texts


def _grouped(texts: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Neighbouring fields with the same text, as one."""
    for text, names in groupby(texts, key=lambda name: texts[name]):
        yield ", ".join(f"`{name}`" for name in names), text


def _fields(kind: type[Any], texts: dict[str, str]) -> list[tuple[str, ...]]:
    """Name, default and meaning of each field, in the order of the class."""
    standard = {f.name: "" if f.default is MISSING else f"`{f.default!r}`" for f in fields(kind)}
    return [
        (names, _line(", ".join(dict.fromkeys(standard[name] for name in names.replace("`", "").split(", ")))), text)
        for names, text in _grouped({name: texts[name] for name in standard})
    ]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _linked(names: Iterable[str]) -> str:
    """Links to clauses, claims, abilities, fields of configs, steps and methods."""
    places = {"claims": "#claims", "ability": "#claims", "config": "#configs", "program": "#programs"}
    links = []
    for name in names:
        kind = name.partition(".")[0]
        place = (
            "../harness/kvconform/backend.py" if kind == "backend" else places.get(kind, f"#{name.replace('.', '')}")
        )
        links.append(f"[{name}]({place})")
    return ", ".join(links)


def _claimed(need: str) -> str:
    """``page=4``: claims from which a derived need follows."""
    return ", ".join(f"`{name}={value!r}`" for name, value in ENOUGH[need].items())


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _short(link: str) -> str:
    """``owner/name#123`` for an issue or pull request."""
    owner, name, _kind, number = link.split("/")[-4:]
    return f"{owner}/{name}#{number}"


def _line(words: str) -> str:
    return " ".join(words.replace("``", "`").split())


def _marked(doc: str | None) -> str:
    """A docstring as Markdown."""
    return inspect.cleandoc(doc or "").replace("``", "`").strip()
