"""The sentences: what each kind of mismatch reads like. No other test, and no code, looks at their words."""

from __future__ import annotations

import pytest
from mismatches import DIED, TIMED_OUT, WRONG
from msgspec.structs import replace

from kvconform.errors import Exit, Raised
from kvconform.judging.mismatch import Kind, Mismatch, Place
from kvconform.judging.render import WORDS, render
from kvconform_specs.configs import CONFIGS
from kvconform_specs.describe import describe, outline
from kvconform_specs.program import Append, Program, Reject, Truncate

STEP = Mismatch(kind=Kind.RAISED, program=0, step=2, call="append 1 to a")
OUTPUT = replace(WRONG, program=0, step=1)
BASE = Place(program=0, step=0, call="uncached_forward 2 to a", row=0, position=1, column=1)
READ = replace(STEP, call="read_cache a", row=1, position=3, layer=0, head=1, element=2)
ANSWER = Mismatch(kind=Kind.COUNT, program=0, step=1, call="a request of 9 tokens", row=0, position=2, reference="cold")

SENTENCES = [
    (
        OUTPUT,
        "step 1 (append 1 to a of 2 rows), row 1, position 7, head 3: "
        "got -0.4482, want -0.4266 ± 7.4e-07 (2.92e+04x the bound)",
    ),
    (
        replace(OUTPUT, kind=Kind.AGREEMENT, part="logit", element=5, other=BASE),
        "step 1 (append 1 to a of 2 rows), row 1, position 7, logit 5: got -0.4482, but -0.4266 in "
        "step 0 (uncached_forward 2 to a) of the program it must agree with, ± 7.4e-07 (2.92e+04x the bound)",
    ),
    (
        replace(OUTPUT, kind=Kind.BITWISE, part="channel", element=5, other=BASE, got=1 / 3),
        "step 1 (append 1 to a of 2 rows), row 1, position 7, channel 5: got 0.333333333, but -0.4266 in "
        "step 0 (uncached_forward 2 to a), and must be the same bit for bit",
    ),
    (
        replace(OUTPUT, kind=Kind.INSENSITIVE, change="token", changed_row=0, changed_position=9),
        "step 1 (append 1 to a of 2 rows), row 1, position 7, head 3: changing the token at row 0, position 9 "
        "must not be seen here, but the output moved from -0.4266 to -0.4482",
    ),
    (
        replace(OUTPUT, kind=Kind.INSENSITIVE, change="nan", got="nan"),
        "step 1 (append 1 to a of 2 rows), row 1, position 7, head 3: the NaN of other tokens "
        "must not be seen here, but the output moved from -0.4266 to nan",
    ),
    (
        replace(OUTPUT, kind=Kind.INSENSITIVE, change="reused"),
        "step 1 (append 1 to a of 2 rows), row 1, position 7, head 3: what the caller writes over the inputs of "
        "earlier steps must not be seen here, but the output moved from -0.4266 to -0.4482",
    ),
    (
        replace(STEP, kind=Kind.INPUTS, array="query", where="inside", index=(0, 1, 2), got=0.0, want=0.5),
        "step 2 (append 1 to a): overwrote number [0, 1, 2] of its input query: was 0.5, is 0",
    ),
    (
        replace(STEP, kind=Kind.INPUTS, array="key", where="inside", index=(0,), got=0.0, want=0.5, later=True),
        "step 2 (append 1 to a): a later step overwrote number [0] of its input key: was 0.5, is 0",
    ),
    (
        replace(STEP, kind=Kind.INPUTS, array="mask", where="behind", distance=1),
        "step 2 (append 1 to a): wrote into memory that it was not given: number 1 behind the last of its input mask",
    ),
    (
        replace(STEP, kind=Kind.INPUTS, array="value", where="between"),
        "step 2 (append 1 to a): wrote between the numbers of its input value, which is a view of a larger array",
    ),
    (
        replace(STEP, kind=Kind.OUTPUTS, array="output", where="inside", index=(0, 4), got=0.25, want=0.5),
        "step 2 (append 1 to a): number [0, 4] of the output was overwritten after it was returned: "
        "was 0.5, is 0.25 at the end of the program",
    ),
    (
        replace(OUTPUT, kind=Kind.SENSITIVE, change="padding", want=0.5, got=0.0, bound=1e-6),
        "step 1 (append 1 to a of 2 rows), row 1, position 7, head 3: what fills the columns without a token "
        "must move the output by 0.5 ± 1e-06, but it moved by 0",
    ),
    (
        replace(OUTPUT, kind=Kind.FINITE, got="inf"),
        "step 1 (append 1 to a of 2 rows), row 1, position 7, head 3: got inf from finite inputs",
    ),
    (
        replace(OUTPUT, kind=Kind.SAME_TOKEN, part="logit", element=4, got=4, want=9, lead=0.25),
        "step 1 (append 1 to a of 2 rows), row 1, position 7, logit 4: "
        "is the largest, but it must be logit 9 by a lead of 0.25",
    ),
    (
        replace(STEP, kind=Kind.GENERATED, row=0, position=4, got=2, want=7, lead=0.5, bound=0.25),
        "step 2 (append 1 to a), row 0, position 4: got token 2, want 7, whose logit leads by 0.5 ± 0.25",
    ),
    (
        replace(STEP, kind=Kind.LENGTHS, got=(4, 5), want=(4, 4)),
        "step 2 (append 1 to a): reports that its rows hold [4, 5] tokens, want [4, 4]",
    ),
    (
        replace(STEP, kind=Kind.FREE_SLOTS, got=(34,), want=(33,)),
        "step 2 (append 1 to a): reports that its rows take [34] more tokens, want [33]",
    ),
    (
        replace(READ, kind=Kind.CONTENTS, part="key", got=0.5, want=0.25, bound=0.0),
        "step 2 (read_cache a), row 1, position 3, layer 0, key of KV head 1: holds 0.5, want 0.25",
    ),
    (
        replace(READ, kind=Kind.CONTENTS, part="value", got="nan", want=0.25, bound=0.125),
        "step 2 (read_cache a), row 1, position 3, layer 0, value of KV head 1: holds nan, want 0.25 ± 0.12",
    ),
    (
        replace(READ, kind=Kind.QUANTISED, part="key", got=0.5, want=0.25, bound=0.125),
        "step 2 (read_cache a), row 1, position 3, layer 0, key of KV head 1: "
        "holds 0.5, want a multiple of its head's step, such as 0.25 ± 0.12",
    ),
    (
        replace(READ, kind=Kind.STABLE_CONTENTS, part="key", got=0.5, want=0.25, other=BASE),
        "step 2 (read_cache a), row 1, position 3, layer 0, key of KV head 1: holds 0.5, and held 0.25 at step 0",
    ),
    (
        replace(STEP, kind=Kind.RETAINED_COUNT, row=1, got=3, want=4, want_max=9),
        "step 2 (append 1 to a), row 1: shows 3 tokens, want 4 to 9",
    ),
    (
        replace(STEP, kind=Kind.GRAPH_COUNT, got=3, want_max=2),
        "step 2 (append 1 to a): has compiled 3 graphs, but claims at most 2",
    ),
    (
        replace(STEP, kind=Kind.BYTES, got=10, want=20),
        "step 2 (append 1 to a): reports that it takes 10 bytes, want 20",
    ),
    (
        replace(STEP, kind=Kind.BYTES, got=10, want=20, want_max=30),
        "step 2 (append 1 to a): reports that it takes 10 bytes, want 20 to 30",
    ),
    (
        replace(STEP, kind=Kind.POSITIONS, got=40, want=10, want_max=20, new_tokens=2, depths=(8,)),
        "step 2 (append 1 to a): took 40 multiply-adds for 2 new tokens of 8, want 10 to 20, as for 4 new tokens",
    ),
    (
        replace(STEP, kind=Kind.LINEAR_COST, got=(1, 2, 4), want_max=3, steps=(0, 1, 2), depths=(2, 4, 6)),
        "step 2 (append 1 to a): equal steps took 1, 2, 4 multiply-adds at the depths 2, 4, 6: "
        "not a line of slope 3 at most",
    ),
    (replace(STEP, error=Raised("KeyError", "'a'")), "step 2 (append 1 to a): raised KeyError: 'a'"),
    (replace(STEP, kind=Kind.ACCEPTED), "step 2 (append 1 to a): was accepted, but must be refused"),
    (replace(STEP, kind=Kind.NO_OUTPUT), "step 2 (append 1 to a): gave no output"),
    (replace(STEP, kind=Kind.NOT_NUMERIC, got="dict"), "step 2 (append 1 to a): gave dict, want an array of numbers"),
    (
        replace(STEP, kind=Kind.SHAPE, part="output", got=(1, 2), want=(1, 3)),
        "step 2 (append 1 to a): the output has the shape (1, 2), want (1, 3)",
    ),
    (
        replace(STEP, kind=Kind.SHAPE, part="read", got=(12,), want=(24,)),
        "step 2 (append 1 to a): shows 12 numbers for each token, want 24",
    ),
    (
        replace(STEP, kind=Kind.DTYPE, part="token ids", got="int32", want="int64"),
        "step 2 (append 1 to a): the generated token ids have the dtype int32, want int64",
    ),
    (
        replace(STEP, kind=Kind.TOKEN_ID, got=-1, want=0, want_max=9),
        "step 2 (append 1 to a): generated token -1, want ids of 0 to 9",
    ),
    (
        replace(ANSWER, kind=Kind.LOG_PROBABILITY, part="answer", token=7, got=-1.5, want=-1.0, bound=0.001),
        "step 1 (a request of 9 tokens), row 0, position 2: the log-probability of token 7 is -1.5, but -1 alone and "
        "without the prefix cache, ± 0.001 (500x the bound)",
    ),
    (
        replace(ANSWER, kind=Kind.LOG_PROBABILITY, part="prompt", token=7, got=-1.5, want=-1.0, bound=0.0),
        "step 1 (a request of 9 tokens), row 0, position 2: the log-probability of the prompt's own token 7 is -1.5, "
        "but -1 alone and without the prefix cache, and must be the same bit for bit",
    ),
    (
        replace(ANSWER, kind=Kind.CHOICE, got=7, want=5, lead=0.25, bound=0.002, reference="prefill"),
        "step 1 (a request of 9 tokens), row 0, position 2: token 7 was generated, but 5 where the text up to it is "
        "the prompt, whose log-probability leads by at least 0.25 ± 0.002",
    ),
    (
        replace(ANSWER, position=None, kind=Kind.COUNT, counted="cached", got=16, want_max=9),
        "step 1 (a request of 9 tokens), row 0: the answer has 16 cached tokens, want at most 9, which its prompt "
        "shares with what was asked before",
    ),
    (
        replace(ANSWER, position=None, kind=Kind.REFUSED, error=Raised("refused", "HTTP 500: no slot")),
        "step 1 (a request of 9 tokens), row 0: was refused, though it is served alone: HTTP 500: no slot",
    ),
    (
        replace(ANSWER, position=None, kind=Kind.SERVED),
        "step 1 (a request of 9 tokens), row 0: was served, though prompt and answer exceed the context",
    ),
    (
        Mismatch(kind=Kind.NO_ANSWER, error=Raised("ConnectionError", "refused")),
        "the engine gave no answer: ConnectionError: refused",
    ),
    (DIED, "step 3 (reset a): the process died of SIGSEGV"),
    (
        Mismatch(kind=Kind.DIED, ended=Exit(7, stderr="no such file")),
        "before the first step: the process ended with exit status 7 (no such file)",
    ),
    (TIMED_OUT, "step 2 (append 1 to a): no answer within 30 s"),
    (
        Mismatch(kind=Kind.NOT_BUILT, error=Raised("RuntimeError", "no weights")),
        "could not be built: RuntimeError: no weights",
    ),
    (
        Mismatch(kind=Kind.REFERENCE_FAILED, ended=Exit(signal="SIGABRT")),
        "its own uncached forward failed: the process died of SIGABRT",
    ),
    (
        Mismatch(kind=Kind.WORKER_FAILED, error=Raised("MemoryError", "no message")),
        "the worker failed: MemoryError: no message",
    ),
    (
        replace(DIED, earlier_programs=1),
        "step 3 (reset a): the process died of SIGSEGV (only after 1 earlier program in the same process: "
        "state leaked)",
    ),
]


@pytest.mark.parametrize(("mismatch", "sentence"), SENTENCES, ids=[m.kind.value for m, _ in SENTENCES])
def test_a_mismatch_reads(mismatch: Mismatch, sentence: str) -> None:
    assert render(mismatch) == sentence


def test_every_kind_that_can_be_found_is_shown_here() -> None:
    assert set(WORDS) == set(Kind) == {mismatch.kind for mismatch, _ in SENTENCES}


def test_an_outline_joins_equal_steps_and_names_the_sizes_that_they_meet() -> None:
    config = CONFIGS["attention-window"]
    decode = Append("a", (1,), 0)
    program = Program(config, (Append("a", (17,), 0), decode, decode, decode, Truncate("a", 9), decode))
    assert outline(program) == (
        f"append 17 to a, append 1 to a (3 times), truncate a to 9, append 1 to a (window {config.window})"
    )
    assert outline(program, 1) == f"append 17 to a (window {config.window})"
    plain = CONFIGS["attention-gqa"]
    filled = Program(plain, (Append("a", (plain.capacity,), 0), Reject(Append("a", (1,), 0))))
    assert outline(filled) == f"append {plain.capacity} to a, reject append 1 to a (capacity {plain.capacity})"
    assert outline(filled, 0) == ""


def test_a_malformed_call_says_what_is_malformed() -> None:
    program = Program(CONFIGS["attention-gqa"], (Append("a", (1,), 0), Reject(Append("a", (1,), 0), "head dim")))
    assert describe(program, 1) == "reject append 1 to a, with a head dim that is one too small"
