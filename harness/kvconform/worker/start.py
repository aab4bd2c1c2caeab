"""How the process of a worker is started: as a new one, or forked from one that has imported the frameworks.

Both give the same worker. A fork (Linux, on the CPU) takes some 10 ms, where a new process imports torch in one to
three seconds, and a failure asks for several fresh processes.
"""

from __future__ import annotations

import ast
import atexit
import importlib.util
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Protocol

from kvconform.worker.process import OWN, TASKS, pinned, variables
from kvconform.worker.registry import sources

SPAWN, FORK = START_METHODS = ("spawn", "fork")
WORKER = "kvconform.worker.server"
"""What an interpreter runs as a worker that is not timed."""
IDLE = 2
"""How many servers without a worker are kept."""
FRAMEWORKS = {
    "torch": ("torch",),
    "transformers": ("torch", "transformers", "transformers.modeling_utils", "transformers.generation"),
    "onnx": ("onnx",),
}
"""What a server imports for a backend whose source names a framework: importing these starts no thread and touches no
device. (Importing onnxruntime starts one; it takes less than 0.1 s.)"""


class Process(Protocol):
    """What a client needs of a worker's process (``subprocess.Popen``)."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None

    def kill(self) -> None: ...

    def wait(self) -> int: ...


@dataclass(frozen=True)
class Launch:
    """What a worker is started with. arguments: address, device, progress file. cpus: see ``client.WorkerSpec``."""

    python: str
    module: str
    arguments: tuple[str, str, str]
    environment: Mapping[str, str]
    cpus: tuple[int, ...] | None

    @property
    def variables(self) -> dict[str, str]:
        return {**os.environ, **variables(), **self.environment}


class CannotFork(Exception):
    """Why a worker has to be a new process."""


def started(launch: Launch, stderr: IO[bytes], timeout: float, method: str = FORK) -> tuple[Process, str]:
    """The process, and how it was started, in words. ``timeout``: seconds for the imports of a server. Raises OSError
    where the interpreter cannot be started."""
    try:
        if method == SPAWN:
            raise CannotFork("as requested")
        if launch.module != WORKER:
            raise CannotFork("it is timed")
        if not TASKS.is_dir():
            raise CannotFork("only Linux tells what a fork would lack")
        if launch.arguments[1] != "cpu":
            raise CannotFork(f"{launch.arguments[1]} cannot be used after a fork")
        return _server(launch).fork(launch, stderr, timeout), FORK
    except CannotFork as reason:
        return spawned(launch, stderr), f"{SPAWN}: {reason}"


def spawned(launch: Launch, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    with pinned(launch.cpus):
        return subprocess.Popen(
            [launch.python, "-m", launch.module, *launch.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=launch.variables,
        )


# --- the fork server, seen from its parent ---
class Forked:
    """A worker that a server has forked. ``line``: the socket to the server: its end kills the worker; the
    server sends how the worker ended."""

    def __init__(self, pid: int, stdin: int, stdout: int, line: socket.socket) -> None:
        self.pid, self._line = pid, line
        self.stdin: IO[bytes] | None = os.fdopen(stdin, "wb")
        self.stdout: IO[bytes] | None = os.fdopen(stdout, "rb")
        self._code: int | None = None

    @property
    def running(self) -> bool:
        return self._code is None

    def kill(self) -> None:
        if self.running:
            with suppress(OSError):
                self._line.shutdown(socket.SHUT_WR)

    def wait(self) -> int:
        """How it ended, as ``subprocess.Popen.wait``. A worker ends with its server."""
        if self._code is None:
            text = b""
            with suppress(ConnectionResetError):
                text = self._line.recv(1 << 10)
            self._code = json.loads(text)["code"] if text else -signal.SIGKILL
            self._line.close()
        return self._code


class ForkServer:
    """One server: for one interpreter, environment, folder and set of processors, and one set of frameworks."""

    def __init__(self, launch: Launch, modules: tuple[str, ...]) -> None:
        self.reason = ""  # why it forks no more
        self.workers: list[Forked] = []
        self._control, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with end, pinned(launch.cpus):
                self._process = subprocess.Popen(
                    [launch.python, "-m", "kvconform.worker.fork_server", *modules],
                    stdin=end.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=launch.variables,
                )
        except OSError:
            self._control.close()
            raise

    @property
    def idle(self) -> bool:
        self.workers = [worker for worker in self.workers if worker.running]
        return not self.workers

    def fork(self, launch: Launch, stderr: IO[bytes], timeout: float) -> Forked:
        """Raises CannotFork."""
        if self.reason:
            raise CannotFork(self.reason)
        own = {name: value for name, value in launch.variables.items() if name.startswith(OWN)}
        message = json.dumps({"arguments": launch.arguments, "variables": own}).encode()
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, suppress(OSError):  # it may have ended: then nothing answers
            socket.send_fds(self._control, [message], [theirs_in, theirs_out, stderr.fileno(), theirs.fileno()])
        os.close(theirs_in)
        os.close(theirs_out)
        ours.settimeout(timeout)
        answer = {}
        with suppress(OSError):
            answer = json.loads(ours.recv(1 << 10) or "{}")
        ours.settimeout(None)
        if "process" in answer:
            self.workers.append(Forked(answer["process"], ours_in, ours_out, ours))
            return self.workers[-1]
        ours.close()
        os.close(ours_in)
        os.close(ours_out)
        self.reason = answer.get("refused", "the process that imports frameworks ended")
        raise CannotFork(self.reason)

    def close(self) -> None:
        """Ends it and all of its workers."""
        self._control.close()
        self._process.wait()


_servers: dict[tuple[object, ...], ForkServer] = {}
"""Of this process, the one that was used last at the end."""


def _server(launch: Launch) -> ForkServer:
    modules = frameworks(launch.arguments[0])
    shared = tuple(sorted(item for item in launch.variables.items() if not item[0].startswith(OWN)))
    key = (os.getpid(), launch.python, launch.module, shared, os.getcwd(), launch.cpus, modules)
    for idle in [one for one in _servers if one != key and one[0] == os.getpid() and _servers[one].idle][:-IDLE]:
        _servers.pop(idle).close()
    _servers[key] = _servers.pop(key) if key in _servers else ForkServer(launch, modules)
    return _servers[key]


@atexit.register
def _close_all() -> None:
    for key, server in _servers.items():
        if key[0] == os.getpid():  # not those of a process that this one was forked from
            server.close()
    _servers.clear()


@cache
def frameworks(address: str) -> tuple[str, ...]:
    """The modules that a server imports for a backend: those of the frameworks that its source imports, and the source
    of what opens it, or other modules of their packages."""
    named, looked_at = set[str](), set[str]()
    left = sources(address)
    while left:
        module = left.pop()
        looked_at.add(module)
        found = set(_imports(module))
        named |= {name.partition(".")[0] for name in found}
        own = module.partition(".")[0] + "."
        left += [name for name in found - looked_at if name.startswith(own) and not module.endswith(".py")]
    return tuple(dict.fromkeys(module for name in FRAMEWORKS if name in named for module in FRAMEWORKS[name]))


def _imports(module: str) -> Iterator[str]:
    """The modules that a module imports, as its source says; none where there is no source to read."""
    file = _source(module)
    with suppress(OSError, SyntaxError, ValueError):
        for node in ast.walk(ast.parse(file.read_bytes())) if file is not None else ():
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module


def _source(module: str) -> Path | None:
    """Where the source of a module is, a file or a dotted name; nothing is imported. None where there is none."""
    if module.endswith(".py"):
        return Path(module)
    top, *rest = module.split(".")
    with suppress(ImportError, ValueError):
        found = importlib.util.find_spec(top)
        if found is not None and found.origin is not None:
            place = Path(found.origin)
            return place.parent.joinpath(*rest).with_suffix(".py") if rest else place
    return None
