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
from kvconform.serving.registry import split
from kvconform_specs.serving.clauses import BY_NAME
from kvconform_specs.serving.program import Ask, Own, Program, Reset, stream

WIDTH = 110
ATTEMPTS = 5
"""How often the file tries: what depends on token ids or on other requests in time does not show each time."""
CHECKS = {
    Kind.LOG_PROBABILITY: "numbers",
    Kind.CHOICE: "numbers",
    Kind.COUNT: "counts",
    Kind.REFUSED: "refused",
    Kind.SERVED: "served",
}


def script(found: ServingCounterexample, mismatch: Mismatch, engine: Engine, model: str = "") -> str:
    """The file. ``mismatch``: what breaks now. ``model``: the address of the weights that the engine serves; to compare
    with them, the file needs transformers. Raises NotImplementedError where the engine has no source for it, or
    the weights are no directory."""
    facts = engine.describe()
    by_model = mismatch.reference == "model"
    if by_model and not model.startswith("hf:"):
        raise NotImplementedError(f"a script compares with a directory of transformers, not with {model}")
    programs = [*found.before, found.program][: mismatch.earlier_programs + 1]
    resets = any(isinstance(step, Reset) for program in programs for step in program.steps)
    first = sum(len(program.steps) for program in programs[:-1])
    body = "\n".join([*_steps(programs, facts), *_check(mismatch, first)])
    parts = [
        _head(found, mismatch, facts),
        f"import random\nimport sys\n\nVOCABULARY = {facts.vocabulary}\nATTEMPTS = {ATTEMPTS}",
        engine.source(),
        *([engine.reset_source()] if resets else []),
        *([MODEL.format(directory=split(model.removeprefix("hf:"))[0])] if by_model else []),
        FUNCTIONS,
        'def attempt():\n    """Whether the bug shows."""\n    asked.clear()\n    answers.clear()\n'
        + textwrap.indent(body, "    "),
        "sys.exit(any(attempt() for _ in range(ATTEMPTS)))",
    ]
    return "\n\n\n".join(part.strip() for part in parts) + "\n"


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


MODEL = '''
def model(ids):
    """Log-probabilities by token id of what follows each of the tokens, by the weights without an engine."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        made = AutoModelForCausalLM.from_pretrained({directory!r}, local_files_only=True)
        rows = made(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return [dict(enumerate(row)) for row in rows.tolist()]
'''
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


asked, answers, names = [], [], []


def renamed():
    """New token ids, which no cache holds."""
    names[:] = random.sample(range(VOCABULARY), VOCABULARY)
'''


def _steps(programs: Sequence[Program], facts: Description) -> Iterator[str]:
    first = 0
    for number, program in enumerate(programs):
        yield f"# program {number}" if len(programs) > 1 else "# the requests"
        yield "renamed()"
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
    if ask.salt is not None:
        own = f'f"{number}-{ask.salt}-{{names}}"[:64]'
        options.append(f"salt={facts.adapters[0]!r}" if ask.salt < 0 and facts.adapters else f"salt={own}")
    if ask.adapter is not None and facts.adapters:
        options.append(f"adapter={facts.adapters[ask.adapter % len(facts.adapters)]!r}")
    options += ["score=True"] * ask.score
    return f"request({', '.join([' + '.join(pieces), str(ask.tokens), *options])})"


def _check(mismatch: Mismatch, first: int) -> Iterator[str]:
    """``first``: index in the file of the first step of the program that shows it."""
    kind, step = CHECKS.get(mismatch.kind), first + (mismatch.step or 0)
    yield f"got, one = answers[{step}][{mismatch.row}], asked[{step}][{mismatch.row}]"
    if kind in ("numbers", "refused"):
        yield "alone = dict(one, cached=False, n=1, abort_after=None, salt=None)  # the same, without the prefix cache"
    if kind == "numbers":
        yield from _numbers(mismatch)
    elif kind == "counts":
        what = COUNTS[mismatch.counted]
        want, wrong = (mismatch.want_max, ">") if mismatch.want is None else (mismatch.want, "!=")
        yield f'print("got: {mismatch.counted}", {what}, "want:", {want!r})'
        yield f"return {what} {wrong} {want!r}"
    elif kind == "refused":
        yield "want = send([alone])[0]"
        yield 'print("got:", got["error"] or "served", "alone:", want["error"] or "served")'
        yield 'return got["error"] is not None and want["error"] is None'
    else:
        yield 'print("got:", got["error"] or "served", "want: refused, since it exceeds the context")'
        yield 'return got["error"] is None'


COUNTS = {
    "cached": 'got["cached"]',
    "prompt": 'got["prompt_tokens"]',
    "generated": 'got["completion_tokens"]',
    "completions": 'len(got["completions"])',
    "scored": 'len(got["prompt_logprobs"])',
}


def _numbers(mismatch: Mismatch) -> Iterator[str]:
    """Compares the two rows of log-probabilities, of each completion where there are several."""
    place = mismatch.position or 0
    yield f"bound = {mismatch.bound or 0.0!r}  # a larger difference of log-probabilities is an error"
    if mismatch.reference == "model":
        if mismatch.part == "prompt":
            yield f'pairs = [(got["prompt_logprobs"][{place - 1}], model(one["prompt"])[{place - 1}])]'
        else:
            yield f'texts = [(c, one["prompt"] + list(c["ids"][:{place}])) for c in got["completions"]]'
            yield f'pairs = [(c["logprobs"][{place}], model(ids)[-1]) for c, ids in texts if len(c["ids"]) > {place}]'
    elif mismatch.part == "prompt":
        yield "want = send([alone])[0]"
        yield f'pairs = [(got["prompt_logprobs"][{place - 1}], want["prompt_logprobs"][{place - 1}])]'
    elif mismatch.reference == "prefill":
        yield 'first = got["completions"][0]'
        yield f'longer = dict(alone, prompt=one["prompt"] + list(first["ids"][:{place}]), tokens=1)'
        yield f'pairs = [(first["logprobs"][{place}], send([longer])[0]["completions"][0]["logprobs"][0])]'
    else:
        yield 'right = send([alone])[0]["completions"][0]'
        yield from ["got = send([alone])[0]"] * (mismatch.reference == "repeated")
        yield f'same = [c for c in got["completions"] if c["ids"][:{place}] == right["ids"][:{place}]]'
        yield f'pairs = [(c["logprobs"][{place}], right["logprobs"][{place}]) for c in same if len(c["ids"]) > {place}]'
    yield "for mine, theirs in pairs:"
    yield "    both = {t: (mine[t], theirs[t]) for t in mine.keys() & theirs.keys()}"
    yield "    off = {t: (a, b) for t, (a, b) in both.items() if not (a == b or abs(a - b) <= bound)}"
    yield "    best, want = max(mine, key=mine.get), max(theirs, key=theirs.get)"
    yield "    lead = theirs[want] - theirs.get(best, min(theirs.values()))"
    yield "    if off or lead > 2 * bound:"
    yield '        print("got: the likeliest token", best, "want:", want)'
    yield '        print("log-probabilities by token id, as answered and as they must be:", off)'
    yield "        return True"
    yield 'print("got: what must come")'
    yield "return False"
