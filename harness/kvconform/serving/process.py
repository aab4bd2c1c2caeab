"""An engine in a process of its own: what ends that process is a result, and the next request starts it again.

This file is both ends of the pipe: ``EngineProcess`` in the parent, ``main`` in the child.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Any, cast

from kvconform.errors import BackendUnavailable, BadArgument, Exit, InvalidBackend, KvconformError, Raised, Unavailable
from kvconform.host import oom_kills
from kvconform.serving.engine import Answer, Description, Engine
from kvconform.serving.registry import is_url, open_engine
from kvconform.worker.process import exit_of
from kvconform_specs.serving.requests import Request

ANSWER_SECONDS, START_SECONDS, CLOSE_SECONDS = 600.0, 900.0, 10.0
"""Seconds without an answer, until the engine is there, or until it has closed, after which the process is killed."""
ANSWER, RAISED = "answer", "raised"
"""What a message of the child is, unless it is the name of an error that is handed on."""
STARTS = 40
"""How often an engine is started in all: each death costs a start."""
HANDED_ON: dict[str, Callable[..., Exception]] = {
    kind.__name__: kind for kind in (BackendUnavailable, InvalidBackend, NotImplementedError, Unavailable)
}
"""The errors that the child hands on as they are, by name; they are made of a sentence."""


class EngineDied(Exception):
    """The engine raised, its process ended, or it cannot be reached any more."""

    def __init__(self, error: Raised | None, ended: Exit | None = None) -> None:
        super().__init__(str(error or ended))
        self.error, self.ended = error, ended


class EngineGone(EngineDied):
    """It has died so often that it is not started again."""


@contextlib.contextmanager
def guarded(*passing: type[Exception]) -> Iterator[None]:
    """The one place that catches what an engine raises, in this process or because it cannot be reached any more.
    ``passing``: errors that are no death."""
    try:
        yield
    except EngineDied:
        raise
    except passing:
        raise
    except Exception as error:
        raise EngineDied(Raised.of(error)) from error


def opened(address: str) -> Engine:
    """The engine at an address, in a process of its own where it would run in this one. Raises as ``open_engine``."""
    return open_engine(address) if is_url(address) else EngineProcess(address)


class EngineProcess(Engine):
    """Hands every call on to the child. Raises EngineDied where it raises or ends there."""

    def __init__(self, address: str) -> None:
        self.address, self.starts = address, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        if self.starts == STARTS:
            raise EngineGone(Raised("EngineGone", f"its process has ended {STARTS} times"))
        self.starts += 1
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), self.address]
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self._kills = oom_kills()
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths},
            )
        try:
            self.weights = str(self._received(START_SECONDS))
        except BaseException:
            self.close()
            raise

    def _ask(self, method: str, *arguments: object) -> Any:
        if self._process is None:
            self._start()
        with contextlib.suppress(OSError):  # it has ended: reading says how
            self._pipe.send((method, arguments))
        return self._received(ANSWER_SECONDS)

    def _received(self, seconds: float) -> Any:
        assert self._process is not None
        try:
            if not self._pipe.poll(seconds):
                self._process.kill()
                self.close()
                raise EngineDied(None, Exit(timeout=seconds))
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            ended = exit_of(self._ended(), self._last_words(), self._kills)
            self.close()
            raise EngineDied(None, ended) from None
        if kind == ANSWER:
            return value
        if kind == RAISED:
            self.close()  # what it was doing may have left it useless: the next request starts it again
            raise EngineDied(value)
        raise BadArgument(*value) if kind == "BadArgument" else HANDED_ON[kind](*value)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    # --- the engine's methods ---
    def describe(self) -> Description:
        return cast(Description, self._ask("describe"))

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return cast("list[Answer]", self._ask("answer", list(requests)))

    def reset(self) -> None:
        self._ask("reset")

    def preemptions(self) -> int:
        return cast(int, self._ask("preemptions"))

    def source(self) -> str:
        return cast(str, self._ask("source"))

    def reset_source(self) -> str:
        return cast(str, self._ask("reset_source"))

    def close(self) -> None:
        """The child closes the engine when the pipe ends; it is killed if that takes long."""
        if self._process is None:
            return
        self._pipe.close()
        self._ended()
        self._log.close()
        self._process = None

    def _ended(self) -> int:
        """The return code of the child, which is killed if it does not end by itself: it may have closed the pipe and
        live on."""
        assert self._process is not None
        try:
            return self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def main() -> None:
    """The child. Arguments: the file descriptor of its end of the pipe, and the address."""
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    kind, engine = _reply(partial(open_engine, sys.argv[2]))
    pipe.send((kind, engine.weights if kind == ANSWER else engine))
    if kind != ANSWER:
        return
    try:
        while True:
            method, arguments = pipe.recv()
            pipe.send(_reply(partial(getattr(engine, method), *arguments)))
    except EOFError:
        engine.close()


def _reply(call: Callable[[], Any]) -> tuple[str, Any]:
    """What a call gives, or its error as data."""
    try:
        with guarded(KvconformError, NotImplementedError):
            return ANSWER, call()
    except EngineDied as death:
        return RAISED, death.error
    except BadArgument as error:
        return "BadArgument", (error.argument, error.value, error.known, str(error))
    except (KvconformError, NotImplementedError) as error:
        name = type(error).__name__
        return (name, (str(error),)) if name in HANDED_ON else (RAISED, Raised.of(error))


if __name__ == "__main__":
    main()
