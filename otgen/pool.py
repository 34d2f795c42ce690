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


@dataclass(frozen=True)
class Role:
    """A kind of worker: how many there are, the seconds a task may take, and what their environment differs in.

    environment        variables set (or, with None, removed) in each worker before it imports anything
    fresh_after_error  replace a worker whose task raised: after a CUDA error every later task of its process would fail too
    """

    workers: int
    limit: float
    environment: Mapping[str, str | None] = field(default_factory=dict)
    fresh_after_error: bool = False


@dataclass
class _Worker:
    role: str
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
    """Spawned processes that run tasks, each task in a worker of the role it asks for: ``Pool(compile=Role(2, limit=60))``."""

    def __init__(self, **roles: Role) -> None:
        self._roles = roles
        self._waiting: dict[str, deque[tuple[Any, Callable[..., Any], tuple[Any, ...]]]] = {role: deque() for role in roles}
        self._workers = [self._spawn(name) for name, role in roles.items() for _ in range(role.workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            self._kill(worker)

    def __len__(self) -> int:
        """Tasks submitted and not yet reported."""
        return sum(map(len, self._waiting.values())) + sum(worker.busy for worker in self._workers)

    def submit(self, role: str, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """Queues ``function(*arguments)`` for `role`; its outcome carries `key`. The function must be importable by name."""
        self._waiting[role].append((key, function, arguments))
        self._feed()

    def outcomes(self) -> Iterator[Outcome]:
        """Outcomes as they come, until nothing is queued or running; tasks may be submitted meanwhile."""
        while len(self):
            yield self.next()

    def next(self) -> Outcome:
        """The next outcome; waits for it. Something must have been submitted."""
        while True:
            self._feed()
            busy = {worker.pipe: worker for worker in self._workers if worker.busy}
            soonest = min(self._deadline(worker) for worker in busy.values())
            for pipe in wait(list(busy), timeout=max(0.0, soonest - time.monotonic())):
                return self._receive(busy[pipe])  # type: ignore[index]
            for worker in busy.values():
                if time.monotonic() >= self._deadline(worker):
                    return self._lose(worker, "timeout", f"took longer than {self._roles[worker.role].limit:g} s")

    def _deadline(self, worker: _Worker) -> float:
        return worker.started + self._roles[worker.role].limit

    def _feed(self) -> None:
        for worker in self._workers:
            waiting = self._waiting[worker.role]
            if waiting and not worker.busy:
                key, function, arguments = waiting.popleft()
                worker.key, worker.busy, worker.started = key, True, time.monotonic()
                worker.pipe.send((function, arguments))

    def _receive(self, worker: _Worker) -> Outcome:
        seconds = time.monotonic() - worker.started
        try:
            fine, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            return self._lose(worker, "crashed", f"worker ended with code {worker.process.exitcode}")
        worker.busy = False
        if fine:
            return Outcome(worker.key, "ok", value=value, seconds=seconds)
        if self._roles[worker.role].fresh_after_error:
            self._replace(worker)
        return Outcome(worker.key, "error", error=value, message=f"{type(value).__name__}: {value}", seconds=seconds)

    def _lose(self, worker: _Worker, status: Literal["timeout", "crashed"], message: str) -> Outcome:
        self._replace(worker)
        return Outcome(worker.key, status, message=message, seconds=time.monotonic() - worker.started)

    def _replace(self, worker: _Worker) -> None:
        self._kill(worker)
        self._workers[self._workers.index(worker)] = self._spawn(worker.role)

    def _spawn(self, role: str) -> _Worker:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(theirs, dict(self._roles[role].environment)), daemon=True)
        process.start()
        theirs.close()
        return _Worker(role, process, ours)

    @staticmethod
    def _kill(worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
