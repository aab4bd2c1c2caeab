"""Pages are only addresses: outputs do not depend on where pages lie, where they end or which sequences share them."""

from __future__ import annotations

from hypothesis import strategies as st

from kvconform_specs import situations as reach
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case, Clause, Relation
from kvconform_specs.clip import clipped
from kvconform_specs.config import Config
from kvconform_specs.program import Append, Close, Fork, Step, Truncate
from kvconform_specs.strategies import Draw, appends, at_once, batches, counts, seeds, splits


@st.composite
def _scattered(draw: Draw, config: Config, claims: Claims) -> Case:
    """Other sequences first take and return pages, so that the pages of a sequence are out of order; then it grows."""
    page, batch, seed = claims.page or 1, draw(batches(claims)), draw(seeds)
    steps: list[Step] = []
    for number in range(draw(st.integers(1, 3))):
        for name in "bc":
            steps.append(Append(name, (min(page, claims.max_chunk or page),) * batch, seed + 77 + number))
    steps.append(Close(("b", "c")[draw(st.integers(0, 1))]))
    sizes: tuple[int, ...] = draw(splits(config, claims, least=2))
    return Case((clipped(config, (*steps, *appends("a", sizes, batch, seed))),))


@st.composite
def _ending(draw: Draw, config: Config, claims: Claims) -> Case:
    """Lengths around the end of a page, by prompt, chunk, decode or truncation."""
    page, batch, seed = claims.page or 1, draw(batches(claims)), draw(seeds)
    steps: list[Step] = []
    length = mark = 0
    for number in range(draw(st.integers(1, 3))):
        ahead = [n for n in range(length + 1, config.capacity + 1) if (n + 1) % page in (0, 1, 2 % page)]
        if not ahead:
            break
        end = ahead[draw(st.integers(0, min(len(ahead) - 1, 5)))]
        steps += appends("a", at_once(end - length, claims), batch, seed + 17 * number)
        length = end
        mark = max(mark, length)
        back = [n for n in range(max(claims.keeps(mark), 1), length) if (n + 1) % page in (0, 1, 2 % page)]
        if back and claims.can("truncate") and draw(st.integers(0, 2)) == 2:
            length = back[draw(st.integers(0, len(back) - 1))]
            steps.append(Truncate("a", length))
    if length < config.capacity:
        steps.append(Append("a", (1,) * batch, seed + 77))
    return Case((clipped(config, tuple(steps)),))


@st.composite
def _sharing(draw: Draw, config: Config, claims: Claims) -> Case:
    """Two or three sequences with one prefix, whose last page may be half full, each going on with other tokens."""
    prefix, batch, seed = draw(st.integers(1, 3 * (claims.page or 1))), draw(batches(claims)), draw(seeds)
    steps: list[Step] = [*appends("a", at_once(max(min(prefix, config.capacity - 20), 1), claims), batch, seed)]
    names = "abc"[: min(draw(st.integers(2, 3)), claims.max_sequences or 3)]
    steps += [Fork("a", name) for name in names[1:]]
    for number in range(draw(st.integers(1, 2))):
        for name in draw(st.permutations(names)):
            steps.append(Append(name, (draw(counts(claims, 6)),) * batch, seed + 77 + 17 * ord(name) + number))
        if draw(st.booleans()) and len(names) > 1:
            steps.append(Close(names[-1]))
            names = names[:-1]
    for name in names:  # far enough to need a page that the others returned
        steps += appends(name, at_once(5, claims), batch, seed + 7)
    return Case((clipped(config, tuple(steps)),))


def _whole(more: int) -> reach.Situation:
    def found(visit: reach.Visit) -> bool:
        page = visit.claims.page or 1
        return visit.longest > more and (visit.longest - more) % page == 0

    def possible(config: Config, claims: Claims) -> bool:
        return config.capacity >= (claims.page or 1) + more

    return reach.append("a length of whole pages" + " and one token" * more, found, possible)


CLAUSES = (
    Clause(
        name="paging.placement",
        text="A sequence's pages may lie anywhere in the pool and in any order: outputs do not depend on it, not even "
        "for a chunk that begins in the middle of a page.",
        why=(
            "https://github.com/GeeeekExplorer/nano-vllm/issues/212",
            "https://github.com/vllm-project/vllm/pull/36580",
            "https://github.com/golang-design/accel/issues/10",
        ),
        strategy=_scattered,
        relations=(Relation.PARITY,),
        needs=("pages", "two sequences"),
        situations=(reach.step("a page that goes back to the pool", lambda v: isinstance(v.step, Close)), reach.DECODE),
    ),
    Clause(
        name="paging.boundary",
        text="A length of whole pages, of one token less or of one more is like any other.",
        why=(
            "https://github.com/vllm-project/vllm/pull/7380",
            "https://github.com/sgl-project/sglang/issues/22819",
            "https://github.com/pytorch/pytorch/pull/160861",
        ),
        strategy=_ending,
        relations=(Relation.PARITY, Relation.LENGTHS),
        needs=("pages",),
        situations=(_whole(0), _whole(1)),
    ),
    Clause(
        name="paging.copy-on-write",
        text="Sequences with a common prefix may share its pages until one of them writes: none reads what another "
        "wrote, and no page is returned to the pool while one still reads it.",
        why=(
            "https://github.com/ggml-org/llama.cpp/issues/3802",
            "https://github.com/ovg-project/kvcached/issues/446",
            "https://github.com/vllm-project/vllm/issues/44701",
        ),
        strategy=_sharing,
        relations=(Relation.PARITY,),
        needs=("pages", "fork", "two sequences"),
        situations=(reach.FORK, reach.after_a(Fork, "an append behind a fork", lambda v: True, reach.holds(2))),
    ),
)
