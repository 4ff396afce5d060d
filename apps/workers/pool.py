"""The workers that render: this process, child processes, or Ray actors (`ray_cluster.py`). All take jobs from one queue.

A worker holds one pipeline and renders one job at a time. Results come back as bytes, and only the driver writes files. If a
worker dies, its job goes to another one, and fails after `ATTEMPTS` deaths. A clip depends only on its seed and settings, so it
does not matter which worker renders it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol

import torch

from fastdit.apps.compare.runs import both
from fastdit.apps.errors import UserError
from fastdit.apps.render.generate import Stopped
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.renderer import Renderer, Result

ATTEMPTS = 3
POLL = 0.2  # seconds between two checks whether to stop


@dataclass
class Failure:
    """Why a job gave no clip. code: exit status if there is no other job; trace: the traceback, unless it was a UserError."""

    error: str
    code: int = 1
    trace: str | None = None
    unforeseen: bool = False


class Died(Exception):  # noqa: N818
    """The worker died, and its job was lost."""


Outcome = Result | Failure


def attempt(renderer: Renderer, job: Job, on_step: Callable[[int, Any], None] = lambda step, latents: None) -> Outcome:
    """Render a job; an error becomes a Failure. Raises Stopped if `on_step` does."""
    try:
        return both(renderer, job, on_step) if job.repeats else renderer.render(job, on_step)
    except UserError as error:
        return Failure(str(error), error.code)
    except Stopped:
        raise
    except MemoryError:
        return Failure("out of memory: render something smaller", unforeseen=True)
    except Exception as error:
        with contextlib.suppress(Exception):
            renderer.close()  # the pipeline may be in any state
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return Failure(f"{type(error).__name__}: {text}", 1, traceback.format_exc(), unforeseen=True)


def here(jobs: Iterable[Job], stop: Callable[[], bool], show: bool = True) -> Iterator[tuple[Job, Outcome]]:
    """Render in this process, in order, until `stop`."""
    renderer = Renderer(show)

    def on_step(step: int, latents: Any) -> None:
        if stop():
            raise Stopped

    for job in jobs:
        if stop():
            return
        try:
            outcome = attempt(renderer, job, on_step)
        except Stopped:
            return
        yield job, outcome


class Team(Protocol):
    """Numbered workers."""

    size: int

    def start(self, worker: int, job: Job) -> None: ...

    def wait(self) -> list[tuple[int, Outcome | Died]]:
        """Outcomes since the last call, after at most `POLL` seconds; Died is also reported for an idle worker."""
        ...

    def close(self) -> None:
        """End all workers, even in the middle of a job."""
        ...


def elsewhere(jobs: Iterable[Job], stop: Callable[[], bool], team: Team) -> Iterator[tuple[Job, Outcome]]:
    """Render with a team until `stop`, and yield results as they come. Jobs under way at `stop` are abandoned."""
    queue, died = deque(jobs), Counter[str]()
    busy: dict[int, Job] = {}
    try:
        while (queue or busy) and not stop():
            for worker in range(team.size):
                if worker not in busy and queue:
                    busy[worker] = queue.popleft()
                    team.start(worker, busy[worker])
            for worker, outcome in team.wait():
                job = busy.pop(worker, None)
                if job is None:
                    continue  # the worker died while idle
                if not isinstance(outcome, Died):
                    yield job, outcome
                    continue
                died[job.hash] += 1
                if died[job.hash] < ATTEMPTS:
                    print(f"fastdit: the worker of {job.where} died ({outcome}): trying again", file=sys.stderr)
                    queue.appendleft(job)
                else:
                    yield job, Failure(f"its worker died {ATTEMPTS} times ({outcome}): out of memory?")
    finally:
        team.close()


class Processes:
    """One spawned process for each GPU, or `size` of them on the CPU. threads: of PyTorch, in each process.

    A dead worker is None in `workers` and is replaced only when there is a job for it. Otherwise whatever kills idle workers
    would kill their replacements too, without end.
    """

    def __init__(self, size: int, gpus: bool = False, threads: int | None = None) -> None:
        self.size, self.gpus = size, gpus
        self.threads = threads
        self.workers: list[tuple[Any, Any] | None] = [self._spawn(number) for number in range(size)]

    def _spawn(self, number: int) -> tuple[Any, Any]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, number if self.gpus else None, self.threads), daemon=True, name=f"fastdit-{number}"
        )
        process.start()
        theirs.close()  # otherwise this process would not notice the other's end
        return process, ours

    def start(self, worker: int, job: Job) -> None:
        self.workers[worker] = found = self.workers[worker] or self._spawn(worker)
        with contextlib.suppress(OSError):  # the worker died while idle: `wait` notices
            found[1].send(job)

    def wait(self) -> list[tuple[int, Outcome | Died]]:
        alive = [(number, *each) for number, each in enumerate(self.workers) if each is not None]
        ready = wait([connection for _, _, connection in alive], POLL)
        found: list[tuple[int, Outcome | Died]] = []
        for number, process, connection in alive:
            if connection in ready:
                try:
                    found.append((number, connection.recv()))
                except (EOFError, OSError):
                    process.join()
                    found.append((number, Died(f"exit status {process.exitcode}")))
                    connection.close()
                    self.workers[number] = None
        return found

    def close(self) -> None:
        alive = [each for each in self.workers if each is not None]
        for process, connection in alive:
            connection.close()
            process.terminate()
        for process, _ in alive:
            process.join(10)
            process.kill()


def _serve(connection: Any, gpu: int | None, threads: int | None) -> None:
    """What a worker does: receive jobs and send outcomes, until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the driver decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds the stack, so that temporary files are removed
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    set_threads(threads)
    renderer = Renderer(show=False)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # leaving already: there is nothing to unwind
            return
        connection.send(attempt(renderer, job))


def set_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)
