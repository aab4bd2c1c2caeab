"""Planted slowdowns add their share exactly, and the collection of samples survives an interrupt."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from timing import collect as collection
from timing import page, slowed
from timing.analyse import NEEDED
from timing.collect import ADDRESSES, PLANTED, busy_processes, collect, read
from timing.rules import RULES
from timing.slowed import Slowed

from kvconform_backends.numpy.cache import NumpyCache
from kvconform_specs.config import Config
from kvconform_specs.tensors import weights

SMALL = Config("decoder", heads=2, kv_heads=1, head_dim=8, layers=1, width=16, mlp=16, vocabulary=32, positions="rope")


# --- planted slowdowns ---
def stepped(backend: NumpyCache, steps: int) -> list[np.ndarray]:
    cache, outputs = backend.start(1), []
    for token in range(steps):
        output, cache = backend.step(cache, np.array([[token]]))
        outputs.append(output)
    return outputs


def planted(share: float) -> type[Slowed]:
    found: type[Slowed] = getattr(slowed, ADDRESSES[share].partition(":")[2])
    return found


@pytest.mark.parametrize("share", ADDRESSES)
def test_a_slowed_decoder_gives_the_outputs_of_its_base_class(share: float) -> None:
    got = stepped(planted(share)(SMALL, weights(SMALL), "cpu"), 4)
    want = stepped(NumpyCache(SMALL, weights(SMALL), "cpu"), 4)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


class Ticks:
    """A clock that advances by ``tick`` with each reading."""

    def __init__(self, tick: int) -> None:
        self.now, self.tick = 0, tick

    def __call__(self) -> int:
        self.now += self.tick
        return self.now


@pytest.mark.parametrize("share", ADDRESSES)
def test_a_planted_share_is_exact_up_to_one_reading_of_the_clock(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = planted(share)(SMALL, weights(SMALL), "cpu")
    clock = Ticks(7)
    monkeypatch.setattr(time, "thread_time_ns", clock)
    work = NumpyCache.step

    def step(self: NumpyCache, *given: object, **keywords: object) -> object:
        clock.now += 1000
        return work(self, *given, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(NumpyCache, "step", step)
    stepped(backend, 20)
    info = backend.runtime_info()
    assert info["own_ns"] == 20 * 1007
    assert 0 <= info["extra_ns"] - share * info["own_ns"] < 7


def test_a_planted_share_is_added_on_the_clock_of_this_machine() -> None:
    backend = planted(0.20)(SMALL, weights(SMALL), "cpu")
    began = time.thread_time_ns()
    stepped(backend, 20)
    taken = time.thread_time_ns() - began
    assert 0.20 * backend.own_ns <= backend.extra_ns
    assert backend.own_ns + backend.extra_ns <= taken


# --- samples ---
@pytest.mark.slow
def test_an_interrupted_collection_keeps_its_samples_leaves_no_process_and_gives_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("busy 1/2"):
            raise KeyboardInterrupt
        assert line == "interrupted: the samples so far are kept"

    beside: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def watched(count: int) -> Iterator[None]:
        assert count == 1
        with busy_processes(count) as started:
            beside.extend(started)
            yield

    monkeypatch.setattr(collection, "busy_processes", watched)
    monkeypatch.setattr(collection, "WARM", 2)
    out = tmp_path / "samples.json.gz"
    collect(out, restarts=2, rounds=12, alone=10, conditions=("busy",), log=interrupt)
    assert [process.poll() is None for process in beside] == [False]
    study = read(out)
    assert [(one.condition, one.number) for one in study.restarts] == [("busy", 0)]
    (one,) = study.restarts
    assert [series.arm for series in one.series] == list(PLANTED)
    for series in one.series:
        assert (len(series.rounds), len(series.alone)) == (12, 10)
        assert min(series.rounds + series.alone) > 0
        assert series.slowdown >= 1 + PLANTED[series.arm]
    assert study.software["numpy"] == np.__version__
    study.restarts *= NEEDED  # a page of a small sample; to collect that many restarts would take minutes
    rendered = page.render(study)[""]
    assert f"Restarts: {NEEDED} busy" in rendered
    assert all(f"| {rule.name} | " in rendered for rule in RULES)


def test_busy_processes_end_with_their_block() -> None:
    with busy_processes(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)
