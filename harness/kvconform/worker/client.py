"""The parent's side of a backend: a worker process that is started, asked, watched and, when it dies, replaced."""

from __future__ import annotations

import json
import mmap
import os
import selectors
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvconform.errors import BackendUnavailable, Exit, InvalidBackend, Raised, Unavailable, WorkerDied, WorkerTimeout
from kvconform.host import gpu, oom_kills
from kvconform.worker.forwards import Forwards
from kvconform.worker.process import exit_of
from kvconform.worker.protocol import LENGTHS, PROGRESS, Header, Traces, send, unpack
from kvconform.worker.spec import DEVICES as DEVICES
from kvconform.worker.spec import STEP_TIMEOUT as STEP_TIMEOUT
from kvconform.worker.spec import WorkerSpec as WorkerSpec
from kvconform.worker.start import Launch, Process, started
from kvconform_specs.claims import Claims
from kvconform_specs.clause import Case
from kvconform_specs.config import Config
from kvconform_specs.describe import describe
from kvconform_specs.program import Program

BUILD_TIMEOUT = 900.0
"""Seconds that a build may take: exports and first compilations are slow, and stand outside the step timeout."""
BUILDS = 3
"""How often a start or a build is tried that a signal from outside ends."""
LOG_LENGTH = 512
"""How many messages a worker's log remembers, for failures that need what ran before."""


RAISED = {kind.__name__: kind for kind in (InvalidBackend, Unavailable, BackendUnavailable)}
"""The errors that a worker hands on to its parent, by the name in the header."""


def unproven(runtime_info: Mapping[str, Any], device: str) -> str:
    """Why it is not known what ran, or nothing: runtime_info() failed, or on a GPU does not report the device."""
    if "failed" in runtime_info:
        return f"cannot verify what ran: runtime_info() failed: {runtime_info['failed']}"
    if device == "cpu" or str(runtime_info.get("device")).startswith(device):
        return ""
    return f"{device} was requested, but runtime_info() does not report the device that ran"


class WorkerClient(Forwards):
    """One backend in a worker. Builds are kept by config; ``log`` is what the live worker has run, oldest first."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.log: deque[tuple[Program, tuple[int, ...]]] = deque(maxlen=LOG_LENGTH)
        self.starts = 0
        self.leaks = 0  # how many failures have needed what ran before
        self.raised: dict[tuple[Config, tuple[str, str]], Case] = {}  # the smallest case of each error that was raised
        self._built: set[Config] = set()
        self._failed: dict[Config, WorkerDied] = {}  # a build that failed once is not tried for every cell
        self._process: Process | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="kvconform-")
        self._stderr = Path(self._scratch.name) / "stderr"
        try:
            description = self._start()
            self.claims = Claims.from_json(description["claims"])
            self.environment: dict[str, str] = description["environment"]
            self.environment |= gpu() if spec.device == "cuda" else {}
            self.target: dict[str, Any] | None = description["target"]
            self.parameters: int = 0 if self.target is None else self.target.pop("parameters")
        except BaseException:
            self.close()  # a worker that is of no use must not live on, nor its folder
            raise
        self._imported: dict[str, str] = {}
        self._measured = False  # how a black box's own forward rounds
        if spec.device not in self.claims.devices:
            self.close()
            known = ", ".join(self.claims.devices)
            raise Unavailable(f"backend {spec.address!r} does not run on {spec.device}; it claims: {known}")
        if self.reference_address:
            try:
                self._pair(self.reference_address)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._close_reference()
        self._kill()
        self._scratch.cleanup()

    def fresh(self) -> None:
        """Replaces the worker by a new process: whatever a program may have left behind is gone."""
        self._kill()
        self._start()

    def build(self, config: Config) -> str | None:
        """Builds the backend for a config, once a worker. Returns the reason where the backend refuses it.

        Raises BackendUnavailable where the machine lacks something, WorkerDied where building fails or ends the worker.
        """
        if config in self._failed:
            raise self._failed[config]
        if config in self._built and self._process is not None:
            return None
        header = self._tried_build(config)
        if "error" in header:
            self._failed[config] = WorkerDied("build", Raised(*header["error"]))
            raise self._failed[config]
        if "refused" in header:
            return str(header["refused"])
        self._built.add(config)
        if self.target is not None and not self._measured:
            self._measured = True
            self._measure(config)
        return None

    def _tried_build(self, config: Config, tries: int = BUILDS) -> Header:
        """The answer to a build. One that a signal from outside ends is tried again. Raises WorkerDied."""
        try:
            return self._ask({"op": "build", "config": config.to_json()}, BUILD_TIMEOUT)[0]
        except WorkerDied as death:
            if tries > 1 and death.from_outside:
                return self._tried_build(config, tries - 1)
            self._failed[config] = type(death)("build", ended=death.ended)
            raise self._failed[config] from None

    def run(self, program: Program, indices: Sequence[int]) -> Traces:
        self.send(program, indices)
        return self.receive(program)

    def send(self, program: Program, indices: Sequence[int]) -> None:
        """Sends a program; the worker runs it while the caller computes what must come out."""
        self.build(program.config)
        self.log.append((program, tuple(indices)))
        self._post({"op": "run", "program": program.to_json(), "indices": list(indices)})

    def receive(self, program: Program) -> Traces:
        """The traces of the program sent last. Raises WorkerDied."""
        try:
            header, blob = self._reply(self.spec.step_timeout)
        except WorkerDied as death:
            known = 0 <= death.step < len(program.steps)
            call = describe(program, death.step) if known else ""
            raise type(death)("step", None, death.ended, death.variant, death.step, call) from None
        if "error" in header:  # recording failed, not a step: nothing the backend could cause by raising
            self._kill()  # it may owe other replies
            raise WorkerDied("message", Raised(*header["error"]))
        return unpack(header, blob)

    def discard(self, programs: Sequence[Program]) -> None:
        """Waits for the traces of programs that were sent, and forgets them; a dead worker owes none."""
        for program in programs:
            if self._process is not None:
                with suppress(WorkerDied):
                    self.receive(program)

    def runtime_info(self, config: Config) -> dict[str, Any]:
        """What really ran. Where that is another device than was requested, it counts as a fallback."""
        if config not in self._built or self._process is None:
            return {}
        try:
            reply = self._ask({"op": "runtime_info", "config": config.to_json()}, self.spec.step_timeout)[0]
        except WorkerDied as death:
            return {"failed": str(death)}
        if "error" in reply:
            return {"failed": str(Raised(*reply["error"]))}
        runtime_info: dict[str, Any] = reply["runtime_info"]
        told = str(runtime_info.get("device"))
        if told.partition(":")[0] in {"cpu", "cuda"} - {self.spec.device}:
            runtime_info.setdefault("fallback", f"{self.spec.device} was requested, but {told} ran")
        return runtime_info

    def imported(self) -> dict[str, str]:
        """The versions of all distributions that this worker and those before it have been seen to import."""
        if self._process is not None:
            with suppress(WorkerDied, BackendUnavailable):
                self._imported |= self.ask({"op": "imported"}, self.spec.step_timeout)["versions"]
        return self._imported

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """The versions of these distributions under the worker's interpreter; what is not installed is left out."""
        with suppress(WorkerDied):
            return dict(self.ask({"op": "versions", "names": list(names)}, self.spec.step_timeout)["versions"])
        return {}

    def script(self, config: Config, programs: Sequence[tuple[Program, str]]) -> tuple[str, list[str]] | None:
        """How to build the black box, and each program with the tag of its names, as Python source; None where it
        writes none. Raises WorkerDied where writing fails."""
        self.build(config)
        asked = [[program.to_json(), tag] for program, tag in programs]
        message = {"op": "script", "config": config.to_json(), "programs": asked}
        header = self.ask(message, self.spec.step_timeout)
        return None if header["setup"] is None else (header["setup"], header["sources"])

    def ask(self, message: Header, timeout: float) -> Header:
        """The answer to any message; ``timeout`` in seconds. Raises WorkerDied if it ends or reports an error."""
        header, _ = self._ask(message, timeout)
        if "error" in header:
            raise WorkerDied("message", Raised(*header["error"]))
        return header

    @property
    def process(self) -> int | None:
        """The number of the live worker's process."""
        return None if self._process is None else self._process.pid

    # --- the process ---
    def _start(self, tries: int = BUILDS) -> Header:
        self._built.clear()
        self.log.clear()
        self._early = bytearray()
        self.starts += 1
        self._oom_kills = oom_kills()
        path = Path(self._scratch.name) / f"progress-{self.starts}"
        path.write_bytes(bytes(PROGRESS.size))
        with path.open("r+b") as file:
            self._progress = mmap.mmap(file.fileno(), PROGRESS.size)
        spec = self.spec
        try:
            launch = Launch(
                spec.python, spec.module, (spec.address, spec.device, str(path)), spec.environment, spec.cpus
            )
            with self._stderr.open("wb") as stderr:
                self._process, self.started = started(launch, stderr, BUILD_TIMEOUT, spec.start_method)
        except OSError as error:
            raise BackendUnavailable(f"interpreter {spec.python!r} cannot be started: {error.strerror}") from error
        try:
            description = self._ask({"op": "describe"}, BUILD_TIMEOUT)[0]
        except WorkerDied as death:
            if tries > 1 and death.from_outside:
                return self._start(tries - 1)
            raise BackendUnavailable(f"the worker of {spec.address!r} did not start: {death}") from death
        if "error" in description:
            raise BackendUnavailable(
                f"backend {spec.address!r} is installed but failed to load: {Raised(*description['error'])}"
            )
        return description

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # the worker may have died with a message still in the pipe
                    pipe.close()
            self._progress.close()
            self._process = None

    def _ask(self, message: Header, timeout: float, blob: bytes = b"") -> tuple[Header, bytes]:
        self._post(message, blob)
        header, blob = self._reply(timeout)
        if "raised" in header:
            raise RAISED[header["raised"]](*header["words"])
        return header, blob

    def _post(self, message: Header, blob: bytes = b"") -> None:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead then: reading its reply says how
            send(self._process.stdin, message, blob)

    def _reply(self, timeout: float) -> tuple[Header, bytes]:
        """The next frame. Raises WorkerDied when the worker ends, or makes no progress for ``timeout`` seconds."""
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        data, self._early = self._early, bytearray()
        wanted = LENGTHS.size
        lengths: tuple[int, int] | None = None
        seen, since = self._step(), time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                if lengths is None and len(data) >= LENGTHS.size:
                    lengths = LENGTHS.unpack_from(data)
                    wanted = LENGTHS.size + sum(lengths)
                if len(data) >= wanted:
                    break
                if selector.select(min(timeout, 0.5)):
                    piece = os.read(pipe, 1 << 20)
                    if not piece:
                        raise self._death()
                    data += piece
                    since = time.monotonic()
                elif self._step() != seen:
                    seen, since = self._step(), time.monotonic()
                elif time.monotonic() - since > timeout:
                    raise self._death(timeout)
        assert lengths is not None
        middle = LENGTHS.size + lengths[0]
        self._early = data[wanted:]  # of the next frame: two may be under way
        return json.loads(data[LENGTHS.size : middle]), bytes(data[middle:wanted])

    def _step(self) -> tuple[int, int, int]:
        count, variant, step = PROGRESS.unpack_from(self._progress, 0)
        return count, variant, step

    def _death(self, timeout: float | None = None) -> WorkerDied:
        """How the process ended, or that it was killed after ``timeout`` seconds without progress."""
        assert self._process is not None
        _count, variant, step = self._step()
        if timeout is not None:
            self._kill()
            return WorkerTimeout("step", ended=Exit(timeout=timeout), variant=variant, step=step)
        end = exit_of(self._process.wait(), self._last_words(), self._oom_kills)
        self._kill()
        return WorkerDied("step", ended=end, variant=variant, step=step)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._stderr.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""
