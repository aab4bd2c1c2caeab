"""The chapter about serving engines, as documentation: a part of the page, or one clause with a program."""

from __future__ import annotations

from collections.abc import Iterator

from kvconform.judging.every_clause import CHAPTERS
from kvconform_specs.serving.clauses import CHAPTER, CLAUSES, Served, ServingClause
from kvconform_specs.serving.program import described
from kvconform_specs.serving.strategies import Sizes
from kvconform_specs.strategies import drawn

DRAWS = 12
EXAMPLE = Sizes(
    block=16,
    context=256,
    adapters=2,
    cache_tokens=512,
    abilities=frozenset({"n", "abort", "salt", "adapter", "score", "reset", "preemptions", "concurrent"}),
)
"""The engine that an example is drawn for."""
EVIDENCE = {"hit": "a token that was read from the cache", "preemption": "a preemption"}
INTRODUCTION = (
    "A serving engine is reached by requests: token ids in, token ids and log-probabilities out. Its reference is its "
    "own answer to the same request alone and without the prefix cache. The bound lies between two measured numbers: "
    "what decode and prefill differ by without the cache, and what one changed token of the prompt moves; where they "
    "do not separate, the verdict is *inconclusive*. Tokens are compared where the lead exceeds the bound, and after a "
    "legal tie no further. A clause is *not exercised* unless the engine itself reports what the clause is about, and "
    "an answer without the cache that was read from it all the same is void."
)


def chapter() -> Iterator[str]:
    """The parts of the page."""
    yield f"## {CHAPTER}\n\n{CHAPTERS[CHAPTER]}\n\n{INTRODUCTION}"
    for clause in CLAUSES:
        links = ", ".join(f"[{_short(link)}]({link})" for link in clause.why)
        facts = [f"- **{clause.level.value}**{', **core**' if clause.core else ''}"]
        facts += [f"- needs {needs(clause)}"] if needs(clause) else []
        facts += [f"- {named(relation)}: {relation.value}" for relation in clause.relations]
        facts += [f"- the engine must report {EVIDENCE[kind]}" for kind in clause.evidence]
        tried = "; ".join(words for words, _ in clause.situations)
        facts += [f"- each run that can, tries: {tried}"] if tried else []
        yield f"### {clause.name}\n\n{clause.text}\n\n" + "\n".join([*facts, f"- stops {links}"])


def explained(clause: ServingClause) -> str:
    """The text of ``kvconform spec CLAUSE``."""
    programs = drawn(clause.strategy(EXAMPLE), DRAWS)
    typical = sorted(programs, key=lambda program: program.size)[len(programs) // 2]
    lines = [f"{clause.name} ({clause.level.value}{', core' if clause.core else ''})", clause.text, ""]
    lines += [f"holds if: {relation.value} ({named(relation)})" for relation in clause.relations]
    lines += [f"needs: {needs(clause) or 'nothing'}".replace("`", "")]
    lines += [f"the engine must report: {EVIDENCE[kind]}" for kind in clause.evidence]
    lines += [f"real bug: {link}" for link in clause.why]
    lines += ["", f"for example, with blocks of {EXAMPLE.block} tokens (s1[0:16]: tokens 0 to 15 of stream 1):"]
    lines += [f"  {described(typical)}", "", f"on an engine: kvconform run -b ENGINE --clause {clause.name}"]
    return "\n  ".join(lines).replace("\n  \n", "\n\n")


def named(relation: Served) -> str:
    return relation.name.lower()


def needs(clause: ServingClause) -> str:
    any_of = f"one of {', '.join(f'`{need}`' for need in clause.needs_any)}" if clause.needs_any else ""
    return ", ".join(filter(None, (*(f"`{need}`" for need in clause.needs), any_of)))


def _short(link: str) -> str:
    owner, repository, _, number = link.removeprefix("https://github.com/").split("/")
    return f"{owner}/{repository}#{number}"
