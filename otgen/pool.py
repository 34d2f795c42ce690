"""Worker processes that may hang, crash or be killed without harm: one task each, a time limit, a fresh worker after a loss.

`concurrent.futures` cannot end one overdue task, and a compiler that segfaults breaks its whole pool; this one reports both.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

CONTEXT = multiprocessing.get_context("spawn")

Status = Literal["ok", "error", "timeout", "crashed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task: its `value` when ok, the exception when it raised one, else a sentence in `message`."""

    key: Any
    status: Status
    value: Any = None
    error: BaseException | None = None
    message: str = ""
    seconds: float = 0.0


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    key: Any = None
    busy: bool = False
    started: float = field(default=0.0)


def _serve(pipe: Connection, environment: Mapping[str, str | None]) -> None:
    """A worker's life: apply the environment before anything heavy is imported, then call what comes through the pipe.

    Its stderr is closed: a compiler that aborts prints pages there, and the parent reports the loss in one line.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            reply: tuple[bool, Any] = True, function(*arguments)
        except Exception as error:
            reply = False, error
        try:
            pipe.send(reply)
        except Exception as error:  # a reply that cannot be pickled is the task's failure, not the worker's
            pipe.send((False, RuntimeError(f"{type(error).__name__}: {error}")))


class Pool:
    """`workers` spawned processes that run tasks under `limit` seconds each.

    environment  variables set (or, with None, removed) in each worker before it imports anything
    """

    def __init__(self, workers: int, limit: float, environment: Mapping[str, str | None] | None = None) -> None:
        self._limit = limit
        self._environment = dict(environment or {})
        self._waiting: deque[tuple[Any, Callable[..., Any], tuple[Any, ...]]] = deque()
        self._workers = [self._spawn() for _ in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            self._kill(worker)

    def __len__(self) -> int:
        """Tasks submitted and not yet reported."""
        return len(self._waiting) + sum(worker.busy for worker in self._workers)

    def submit(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """Queues ``function(*arguments)``; its outcome carries `key`. The function must be importable by name."""
        self._waiting.append((key, function, arguments))
        self._feed()

    def outcomes(self) -> Iterator[Outcome]:
        """Outcomes as they come, until nothing is queued or running; tasks may be submitted meanwhile."""
        while len(self):
            yield self.next()

    def next(self) -> Outcome:
        """The next outcome; waits for it."""
        while True:
            self._feed()
            busy = {worker.pipe: worker for worker in self._workers if worker.busy}
            deadline = min(worker.started for worker in busy.values()) + self._limit
            for pipe in wait(list(busy), timeout=max(0.0, deadline - time.monotonic())):
                return self._receive(busy[pipe])  # type: ignore[index]
            for index, worker in enumerate(self._workers):
                if worker.busy and time.monotonic() - worker.started >= self._limit:
                    return self._lose(index, "timeout", f"took longer than {self._limit:g} s")

    def _feed(self) -> None:
        for worker in self._workers:
            if self._waiting and not worker.busy:
                key, function, arguments = self._waiting.popleft()
                worker.key, worker.busy, worker.started = key, True, time.monotonic()
                worker.pipe.send((function, arguments))

    def _receive(self, worker: _Worker) -> Outcome:
        seconds = time.monotonic() - worker.started
        try:
            fine, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            return self._lose(self._workers.index(worker), "crashed", f"worker ended with code {worker.process.exitcode}")
        worker.busy = False
        if fine:
            return Outcome(worker.key, "ok", value=value, seconds=seconds)
        return Outcome(worker.key, "error", error=value, message=f"{type(value).__name__}: {value}", seconds=seconds)

    def _lose(self, index: int, status: Literal["timeout", "crashed"], message: str) -> Outcome:
        worker = self._workers[index]
        self._kill(worker)
        self._workers[index] = self._spawn()
        return Outcome(worker.key, status, message=message, seconds=time.monotonic() - worker.started)

    def _spawn(self) -> _Worker:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(theirs, self._environment), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    @staticmethod
    def _kill(worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
