"""``kvconform spec``, ``backends`` and ``schema``: what there is to judge, and by what."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from kvconform.cli.options import Json, print_json, say
from kvconform.cli.schemas import FILES, json_schema
from kvconform.errors import BackendUnavailable, BadArgument, InvalidBackend, Unavailable, UnknownClause
from kvconform.files import write_atomically
from kvconform.judging.every_clause import BY_NAME, CHAPTERS, ENGINES
from kvconform.serving.registry import HTTP, engines
from kvconform.spec_docs import clause as clause_docs
from kvconform.spec_docs import engines as engine_docs
from kvconform.spec_docs import page
from kvconform.worker.client import WorkerClient, WorkerSpec
from kvconform.worker.registry import installed
from kvconform_specs import SUITE_VERSION, clauses
from kvconform_specs.clause import Clause
from kvconform_specs.serving.clauses import CONFIG, ServingClause


def backends(as_json: Json = False) -> None:
    """Lists the installed backends, and why one is not ready; and the serving engines that can be started."""
    records: list[dict[str, Any]] = []
    for name in installed():
        record: dict[str, Any] = {"name": name, "kind": "backend", "state": "ready", "sentence": "", "claims": None}
        try:
            with WorkerClient(WorkerSpec(name)) as client:
                claims = client.claims
                record["claims"] = claims.to_json()
                line = f"ready ({', '.join(claims.profiles)}; {', '.join(claims.dtypes)})"
        except (BackendUnavailable, InvalidBackend) as error:
            record["state"], record["sentence"] = "absent" if isinstance(error, Unavailable) else "broken", str(error)
            line = str(error)
        records.append(record)
        if not as_json:
            say(f"{name}: {line}")
    for name in (name for name in engines() if name != HTTP):
        line = f"serving engine; kvconform run -b {name} starts it on a tiny model"
        records.append({"name": name, "kind": "engine", "state": "not tried", "sentence": line, "claims": None})
        if not as_json:
            say(f"{name}: {line}")
    if as_json:
        print_json(records)


def spec(
    clause: Annotated[str, typer.Argument(help="A clause or a chapter; default: all.")] = "",
    write: Annotated[
        Path | None,
        typer.Option(help="Write the spec as Markdown; with a clause, write its example as a file for replay."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prints the spec, or explains a clause with an example."""
    known = (*CHAPTERS, *BY_NAME)
    if clause and clause not in known:
        near = get_close_matches(clause, known) or [name for name in known if clause in name]
        hint = f"did you mean {' or '.join(near)}?" if near else f"chapters: {', '.join(CHAPTERS)}"
        raise UnknownClause("clause", clause, known, f"no clause or chapter named {clause!r}; {hint}")
    if write and clause in CHAPTERS:
        words = f"--write: {clause} is a chapter; name a clause, or nothing for the whole spec"
        raise BadArgument("write", clause, BY_NAME, words)
    selected = [one for one in BY_NAME.values() if clause in ("", one.name, one.chapter)]
    if write:
        if clause in ENGINES:
            raise BadArgument(
                "write", clause, (), f"--write: {clause} is about serving engines; it has no example file"
            )
        write_atomically(write, clause_docs.as_file(clauses.BY_NAME[clause]) if clause else page.page().encode())
    if as_json:
        print_json([_record(one) for one in selected])
    elif write:
        say(f"example: kvconform replay {write} -b BACKEND" if clause else f"spec: {write}")
    elif clause in ENGINES:
        say(engine_docs.explained(ENGINES[clause]))
    elif clause in BY_NAME:
        say(clause_docs.explained(clauses.BY_NAME[clause]))
    else:
        say(f"kvconform spec {SUITE_VERSION}: a KV cache must be unobservable")
        for chapter in [clause] if clause else CHAPTERS:
            say(f"\n{chapter}: {CHAPTERS[chapter]}")
            for one in (c for c in selected if c.chapter == chapter):
                say(f"\n  {one.name} ({one.level.value}{', core' if one.core else ''})\n    {one.text}")


def _record(clause: Clause | ServingClause) -> dict[str, Any]:
    return {
        "name": clause.name,
        "chapter": clause.chapter,
        "level": clause.level.value,
        "core": clause.core,
        "text": clause.text,
        "why": clause.why,
        "profiles": (CONFIG,) if isinstance(clause, ServingClause) else clause.profiles,
        "needs": clause.needs,
        "needs_any": clause.needs_any,
        "relations": [relation.name.lower() for relation in clause.relations],
    }


def schema(kind: Annotated[str, typer.Argument(help=f"{', '.join(FILES)}.")] = "results") -> None:
    """Prints the JSON Schema of a kind of file."""
    if kind not in FILES:
        raise BadArgument("kind of file", kind, FILES)
    print_json(json_schema(kind))
