"""A process that has imported frameworks and forks workers: ``python -m kvconform.worker.fork_server MODULE...``.

A fork has what it would import otherwise, and nothing that another worker has done. The server runs no code but
imports: it touches no device, runs no thread and imports no backend. Its standard input is a socket, on which each
message asks for one worker (``start.ForkServer``). It ends, with all of its workers, when its parent does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kvconform.worker.process import OWN, TASKS
from kvconform.worker.registry import installed, openers
from kvconform.worker.server import main as work

MESSAGE = 1 << 17
"""The most bytes of a message."""
PR_SET_PDEATHSIG = 1


class ForkServer:
    """The server's side: its running workers, by process number, each with the socket that reports its end."""

    def __init__(self, control: socket.socket) -> None:
        self.control, self.workers = control, dict[int, socket.socket]()
        self.number = os.getpid()
        self.selector = selectors.DefaultSelector()
        self.wakes = os.pipe()
        os.set_blocking(self.wakes[1], False)
        self.selector.register(control, selectors.EVENT_READ)
        self.selector.register(self.wakes[0], selectors.EVENT_READ)
        signal.set_wakeup_fd(self.wakes[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over

    def serve(self) -> list[str]:
        """Answers until the parent has gone. Returns in a worker only: its arguments."""
        while True:
            for key, _events in self.selector.select():
                if key.fileobj is self.control:
                    arguments = self.fork()
                    if arguments:
                        return arguments
                elif isinstance(key.fileobj, socket.socket):  # closed: the worker is not wanted any more
                    self.selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
                else:
                    os.read(self.wakes[0], 1 << 10)
            self.reap()

    def fork(self) -> list[str]:
        """Forks the worker that the next message asks for, and returns its arguments there; nothing in the server."""
        text, files, _flags, _address = socket.recv_fds(self.control, MESSAGE, 4)
        if not text:
            self.end()
        asked, line = json.loads(text), socket.socket(fileno=files[3])
        reason = unsafe()
        number = -1 if reason else os.fork()
        if number == 0:
            self.become_worker(asked, files, line)
            return ["fork", *asked["arguments"]]
        for file in files[:3]:
            os.close(file)
        with suppress(OSError):  # the parent may have gone
            line.send(json.dumps({"refused": reason} if reason else {"process": number}).encode())
        if reason:
            line.close()
        else:
            self.workers[number] = line
            self.selector.register(line, selectors.EVENT_READ, number)
        return []

    def become_worker(self, asked: dict[str, Any], files: Sequence[int], line: socket.socket) -> None:
        """Makes this process what a new one would be."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, self.interrupted)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.number:
            os._exit(1)  # the server ended before it was asked for
        self.selector.close()
        for other in (line, self.control, *self.workers.values()):
            other.close()
        for file in self.wakes:
            os.close(file)
        for number, file in enumerate(files[:3]):
            os.dup2(file, number)
            os.close(file)
        for name in [name for name in os.environ if name.startswith(OWN)]:  # the others are those of the server
            del os.environ[name]
        os.environ.update(asked["variables"])
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()  # two new processes would differ; ``random`` does this by itself

    def reap(self) -> None:
        """Tells how the workers ended that have ended."""
        for number, line in list(self.workers.items()):
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                del self.workers[number]
                with suppress(KeyError):
                    self.selector.unregister(line)
                with suppress(OSError):
                    line.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
                line.close()

    def end(self) -> None:
        for number in self.workers:
            os.kill(number, signal.SIGKILL)
        for number in self.workers:
            os.waitpid(number, 0)
        os._exit(0)


def unsafe() -> str:
    """Why this process must not be forked now, or nothing."""
    threads = len(os.listdir(TASKS))
    if threads > 1:
        return f"importing frameworks started {threads - 1} thread{'s' * (threads > 2)}, which a fork would not have"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "importing frameworks opened a CUDA device, which a fork cannot use"
    return ""


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for module in sys.argv[1:]:
        with suppress(ImportError):  # the backend's own import says it better
            importlib.import_module(module)
    installed(), openers()  # a worker looks them up
    sys.argv = ForkServer(control).serve()
    work()


if __name__ == "__main__":
    main()
