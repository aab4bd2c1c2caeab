"""A worker that also times and counts: ``python -m kvconform.bench.worker.server ADDRESS DEVICE PROGRESS_FILE``."""

from __future__ import annotations

from functools import partial
from typing import Any

from kvconform.bench.worker.ceilings import Ceiling
from kvconform.bench.worker.collect import Tally
from kvconform.bench.worker.gpu import Gpu
from kvconform.bench.worker.timer import Timer, tokens
from kvconform.worker.protocol import Header
from kvconform.worker.server import Handler, Reply, Worker, main
from kvconform_specs.config import Config


class TimingWorker(Worker):
    """A conformance worker with the messages of the bench."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.timers: dict[tuple[Config, Config, int], Timer] = {}

    def handlers(self, blob: bytes) -> dict[str, Handler]:
        return {
            **super().handlers(blob),
            "time": self.time,
            "device": self.device_times,
            "memory": self.memory,
            "count": self.count,
        }

    def run(self, message: Header) -> Reply:
        """Kept caches are dropped first: some backends hold one sequence at a time."""
        config = Config.from_json(message["program"]["config"])
        for (built, *_), timer in self.timers.items():
            if built == config:
                timer.drop()
        return super().run(message)

    def time(self, message: Header) -> Reply:
        """Times blocks of calls: see ``Timer.blocks``."""
        timer = self.timer(message)
        blocks = timer.blocks(*(message[name] for name in ("phase", "depth", "steps", "count", "batch", "new")))
        return {"blocks": [block._asdict() for block in blocks], "digest": timer.digest}, b""

    def device_times(self, message: Header) -> Reply:
        return {
            "ns": self.timer(message).device(*(message[n] for n in ("phase", "depth", "steps", "count", "batch")))
        }, b""

    def memory(self, message: Header) -> Reply:
        return {"memory": self.timer(message).memory(message["depth"], message["batch"])}, b""

    def timer(self, message: Header) -> Timer:
        """The timer of a built backend. ``timed``: the config that the tokens are made for, which for a black box is
        not its own."""
        config, timed = Config.from_json(message["config"]), Config.from_json(message["timed"])
        key = config, timed, message["seed"]
        if key not in self.timers:
            gpu = Gpu.open() if self.device == "cuda" else None
            ids = tokens(timed, message["seed"])
            self.timers[key] = Timer(self.backends[config], ids, partial(Ceiling.of, timed), gpu)
        return self.timers[key]

    def count(self, message: Header) -> Reply:
        """Counts what one call of a phase does (``Tally``). ``by``: the versions that the counts depend on."""
        config = Config.from_json(message["config"])
        backend = self.backends[config]
        counts = Tally(backend, config).count(message["phase"], message["depth"])
        return {"counts": counts, "by": dict(backend.counted_by())}, b""


if __name__ == "__main__":
    main(TimingWorker)
