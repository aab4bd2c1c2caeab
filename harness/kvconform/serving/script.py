"""A counterexample as one Python file, which needs nothing but the standard library and the server.

The file renames the token ids each time it runs, so that nothing is in the cache when it starts.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from kvconform.judging.mismatch import Kind, Mismatch
from kvconform.judging.render import render
from kvconform.serving.counterexample import ServingCounterexample
from kvconform.serving.engine import Description, Engine
from kvconform_specs.serving.clauses import BY_NAME
from kvconform_specs.serving.program import Ask, Own, Program, Reset, stream

WIDTH = 110
CHECKS = {
    Kind.LOG_PROBABILITY: "numbers",
    Kind.CHOICE: "numbers",
    Kind.COUNT: "counts",
    Kind.REFUSED: "refused",
    Kind.SERVED: "served",
}


def script(found: ServingCounterexample, mismatch: Mismatch, engine: Engine) -> str:
    """The file. ``mismatch``: what breaks now. Raises NotImplementedError where the engine has no source for it."""
    facts = engine.describe()
    programs = [*found.before, found.program][: mismatch.earlier_programs + 1]
    resets = any(isinstance(step, Reset) for program in programs for step in program.steps)
    parts = [
        _head(found, mismatch, facts),
        "import random\nimport sys",
        engine.source().strip(),
        *([engine.reset_source().strip()] if resets else []),
        FUNCTIONS.strip(),
        "\n".join(_steps(programs, facts)),
        _check(mismatch, sum(len(program.steps) for program in programs[:-1])),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _head(found: ServingCounterexample, mismatch: Mismatch, facts: Description) -> str:
    clause = BY_NAME[found.clause]
    paragraphs = [
        f"{render(mismatch)}.",
        f"This breaks {clause.name}: {clause.text}",
        f"Engine: {facts.engine} {facts.version}, model {facts.model}. It exits with 1 while the bug is there, with 0 "
        "once it is gone.",
    ]
    text = "\n\n".join("\n".join(textwrap.wrap(p, WIDTH, break_long_words=False)) for p in paragraphs)
    return '"""' + text.replace("\\", "\\\\").replace('"""', "'''") + '\n"""'


FUNCTIONS = '''
def request(prompt, tokens, cached=True, n=1, abort_after=None, salt=None, adapter=None, score=False):
    return {
        "prompt": prompt,
        "tokens": tokens,
        "cached": cached,
        "n": n,
        "abort_after": abort_after,
        "salt": salt,
        "adapter": adapter,
        "score": score,
    }


def ids(*tokens):
    return [names[token] for token in tokens]


def own(step, number, start, stop):
    """Tokens that an earlier request has generated."""
    return list(answers[step][number]["completions"][0]["ids"][start:stop])


def together(*requests):
    """Sends them at the same time."""
    asked.append(requests)
    answers.append(send(list(requests)))


asked, answers = [], []
'''


def _steps(programs: Sequence[Program], facts: Description) -> Iterator[str]:
    first = 0
    for number, program in enumerate(programs):
        yield f"# program {number}" if len(programs) > 1 else "# the requests"
        yield f"names = random.sample(range({facts.vocabulary}), {facts.vocabulary})  # token ids that no cache holds"
        for step in program.steps:
            if isinstance(step, Reset):
                yield "reset()\ntogether()"
            else:
                asks = [_ask(ask, first, number, facts) for ask in step.asks]
                yield f"together({asks[0]})" if len(asks) == 1 else "together(\n    " + ",\n    ".join(asks) + ",\n)"
        first += len(program.steps)


def _ask(ask: Ask, first: int, number: int, facts: Description) -> str:
    """``first``: index of the program's first step in the file."""
    pieces: list[str] = []
    run: list[int] = []

    def close() -> None:
        pieces.extend([f"ids({', '.join(map(str, run))})"] if run else [])
        run.clear()

    for piece in ask.prompt:
        if isinstance(piece, Own):
            close()
            pieces.append(f"own({first + piece.step}, {piece.request}, {piece.start}, {piece.stop})")
        else:
            tokens = stream(piece.seed, piece.stop, facts.vocabulary)[piece.start :]
            run += [(token + piece.add) % facts.vocabulary for token in tokens]
    if ask.too_long:
        run += stream(1, max(facts.context + 1 - ask.length, 0), facts.vocabulary)
    close()
    options = [f"cached={ask.cached}"] * (not ask.cached) + [f"n={ask.n}"] * (ask.n > 1)
    options += [] if ask.abort_after is None else [f"abort_after={ask.abort_after}"]
    options += [] if ask.salt is None else [f'salt=f"{number}-{ask.salt}-{{names}}"[:64]']
    if ask.adapter is not None and facts.adapters:
        options.append(f"adapter={facts.adapters[ask.adapter % len(facts.adapters)]!r}")
    options += ["score=True"] * ask.score
    return f"request({', '.join([' + '.join(pieces), str(ask.tokens), *options])})"


def _check(mismatch: Mismatch, first: int) -> str:
    kind, step = CHECKS.get(mismatch.kind), first + (mismatch.step or 0)
    lines = [
        f"got, one = answers[{step}][{mismatch.row}], asked[{step}][{mismatch.row}]",
        "alone = dict(one, cached=False, n=1, abort_after=None, salt=None)  # the same, without the prefix cache",
    ]
    if kind == "numbers":
        lines += _numbers(mismatch)
    elif kind == "counts":
        lines += _counts(mismatch)
    elif kind == "refused":
        lines += ["want = send([alone])[0]", 'print("refused:", got["error"], "alone:", want["error"])']
        lines += ['sys.exit(got["error"] is not None and want["error"] is None)']
    else:
        lines += ['print("refused:", got["error"], "(it exceeds the context)")', 'sys.exit(got["error"] is None)']
    return "\n".join(lines)


def _numbers(mismatch: Mismatch) -> Sequence[str]:
    place = mismatch.position or 0
    if mismatch.part == "prompt":
        rows = ["want = send([alone])[0]", f'rows = [answer["prompt_logprobs"][{place - 1}] for answer in (got, want)]']
    elif mismatch.reference == "prefill":
        rows = [
            'first = got["completions"][0]',
            f'longer = dict(alone, prompt=one["prompt"] + first["ids"][:{place}], tokens=1)',
            "want = send([longer])[0]",
            f'rows = [first["logprobs"][{place}], want["completions"][0]["logprobs"][0]]',
        ]
    else:
        again = "send([alone])[0]" if mismatch.reference == "repeated" else "got"
        rows = [
            "want = send([alone])[0]",
            *([f"got = {again}"] if again != "got" else []),
            'right = want["completions"][0]',
            "rows = [{}, {}]",
            'for completion in got["completions"]:',
            f'    if completion["ids"][:{place}] == right["ids"][:{place}]:',
            f'        rows = [completion["logprobs"][{place}], right["logprobs"][{place}]]',
            "        if any(abs(rows[0][t] - rows[1][t]) > BOUND for t in rows[0].keys() & rows[1].keys()):",
            "            break",
        ]
    return [
        f"BOUND = {mismatch.bound or 0.0!r}  # a larger difference is an error",
        *rows,
        "off = {token: (rows[0][token], rows[1][token]) for token in rows[0].keys() & rows[1].keys()",
        "       if not abs(rows[0][token] - rows[1][token]) <= BOUND}",
        'print("log-probabilities by token id, as answered and as they must be:", off or "equal")',
        "best = [max(row, key=row.get, default=None) for row in rows]",
        'print("most likely token:", best[0], "must be:", best[1])',
        "sys.exit(bool(off))",
    ]


def _counts(mismatch: Mismatch) -> Sequence[str]:
    what = {
        "cached": 'got["cached"]',
        "prompt": 'got["prompt_tokens"]',
        "generated": 'got["completion_tokens"]',
        "completions": 'len(got["completions"])',
        "scored": 'len(got["prompt_logprobs"])',
    }[mismatch.counted]
    want = mismatch.want_max if mismatch.want is None else mismatch.want
    wrong = ">" if mismatch.want is None else "!="
    return [f'print("{mismatch.counted}:", {what}, "want", {want!r})', f"sys.exit({what} {wrong} {want!r})"]
