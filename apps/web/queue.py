"""The queue: one thread draws for everybody, in order of arrival, within the operator's limits.

A `Turn` is an entry of the queue. A `Ticket` is a turn with a clip to draw and its progress. The thread calls `batch.run`, as
the command line does, so files and manifest are the same. Nothing here knows Gradio.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdit.apps.errors import UserError
from fastdit.apps.render import batch, jobs
from fastdit.apps.render.generate import Stopped
from fastdit.apps.render.paths import local
from fastdit.apps.render.renderer import Renderer
from fastdit.apps.render.settings import SETTINGS, Settings
from fastdit.apps.web import estimate
from fastdit.apps.web.limits import Limits
from fastdit.apps.workers.pool import attempt
from fastdit.pipelines import embedded

EMBEDDED = "embedded model"
HEARTBEAT = 1.0  # seconds until a closed tab is noticed
KEPT, KEPT_IN_ALL = 20, 500  # clips that are over and still listed: of one user, of all
KEYS = tuple(name for name, about in SETTINGS.items() if about.page)
"""The settings that a visitor may give; the operator decides the others."""


@dataclass
class Turn:
    """stop: set when it is no longer wanted; listeners: called when something about it has changed."""

    user: str
    stop: threading.Event = field(default_factory=threading.Event, kw_only=True)
    listeners: set[Callable[[], Any]] = field(default_factory=set, kw_only=True)

    def notify(self) -> None:
        for call in list(self.listeners):
            call()


@dataclass
class Ticket(Turn):
    """state: waiting, starting, denoising, finishing, then done, stopped or failed. steps: total number of steps.

    latents: after the last step; record: the manifest's; report: the run's; error: a sentence; key: its name on the
    page; said: what the visitor gave.
    """

    job: jobs.Job
    folder: Path
    steps: int
    state: str = "waiting"
    step: int = 0
    marks: list[float] = field(default_factory=list)
    latents: Any = None
    record: dict[str, Any] | None = None
    report: Any = None
    error: str = ""
    key: str = field(default_factory=lambda: secrets.token_hex(8))
    future: Future[None] | None = None
    said: dict[str, Any] = field(default_factory=dict)

    def become(self, state: str) -> None:
        self.state = state
        self.notify()

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds of denoising left, by the mean of the steps after the first."""
        if len(self.marks) < 2 or self.step >= self.steps:
            return None
        return (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1) * (self.steps - self.step)

    # called by `batch.run`
    def begin(self, jobs: int) -> None:
        self.become("starting")

    def on_step(self, step: int, latents: Any) -> None:
        if self.stop.is_set():
            raise Stopped
        if step == 0:  # a comparison measures errors
            self.become("finishing")
            return
        self.step += 1
        self.marks.append(time.perf_counter())
        self.latents = latents
        self.become("denoising" if self.step < self.steps else "finishing")

    def done(self, record: dict[str, Any], text: str) -> None:
        self.record = record

    def failed(self, record: dict[str, Any]) -> None:
        self.error = str(record["error"])


class Studio:
    """models: {name on the page: folder or Hub id, None for the embedded model}. fixed: settings of every clip."""

    def __init__(self, out: Path, models: dict[str, str | None], limits: Limits, fixed: dict[str, Any] | None = None) -> None:
        self.out, self.models, self.limits, self.fixed = out, models, limits, fixed or {}
        self.worker = ThreadPoolExecutor(1, "fastdit-render")
        self.renderer = Renderer(show=False)
        self.facts: dict[str | None, estimate.PipelineFacts] = {}
        self.queue: list[Turn] = []
        self.tickets: list[Ticket] = []
        self.lock = threading.Lock()
        self.warm = self.worker.submit(self._load, Settings(prompt="x", model=next(iter(models.values())), **self.fixed))

    def _load(self, settings: Settings) -> None:
        self.facts[settings.model] = estimate.facts(self.renderer.load(settings))

    def unknown_words(self, model: str, prompt: str) -> list[str]:
        """The words of a prompt that a model on the page says it does not know."""
        source = self.models.get(model)
        return embedded.unknown_words(prompt, source if source is None else local(source))

    def job(self, said: dict[str, Any], custom: Any = None, repeats: int = 0) -> jobs.Job:
        """Make a job of what a visitor gave, with the checks of the command line. Raises UserError."""
        given = {key: value for key, value in said.items() if value is not None and value != ""}
        if unknown := set(given) - set(KEYS):
            raise UserError(f"unknown setting {sorted(unknown)[0]!r}: known are {', '.join(KEYS)}")
        name = given.pop("model", next(iter(self.models)))
        if name not in self.models:
            raise UserError(f"no model {str(name)[:80]!r} here: choose one of {', '.join(self.models)}")
        base = self.fixed | {"seed": 0} | ({} if self.models[name] is None else {"model": self.models[name]})
        if custom is not None:
            base["custom"] = custom
            given.pop("preset", None)
        made = jobs.make([("the web page", given)], base, repeats=repeats)
        if made.errors:
            raise UserError(made.errors[0][1])
        settings = made.jobs[0].settings()
        self.limits.check(settings)
        if settings.image is not None:
            self.limits.check_picture(settings.image)
        return made.jobs[0]

    def enter(self, turn: Turn) -> int:
        """Join the end of the queue; returns how many come first. Raises UserError if the queue or the user's share is full."""
        with self.lock:
            if sum(other.user == turn.user for other in self.queue) >= self.limits.each:
                raise UserError(f"you have {self.limits.each} clips waiting already: wait for one of them, or stop it")
            if len(self.queue) >= self.limits.queue:
                raise UserError("too many people are waiting: try again in a few minutes")
            self.queue.append(turn)
            return len(self.queue) - 1

    def ahead(self, ticket: Turn) -> int:
        """How many come first."""
        with self.lock:
            return self.queue.index(ticket) if ticket in self.queue else 0

    def stop(self, user: str) -> None:
        """Stop this user's clips, within one denoising step."""
        with self.lock:
            turns = [turn for turn in self.queue if turn.user == user]
        for turn in turns:
            self.halt(turn)

    def halt(self, turn: Turn) -> None:
        """Stop one turn: before it begins, or within one denoising step."""
        turn.stop.set()
        if isinstance(turn, Ticket) and turn.future is not None and turn.future.cancel():
            self._leave(turn)
            turn.become("stopped")

    def submit(self, user: str, job: jobs.Job, folder: Path, said: dict[str, Any] | None = None) -> Ticket:
        """Draw, whoever watches. said: what the visitor gave. Raises as `enter`."""
        ticket = Ticket(user, job, folder, job.settings().steps * max(1, 2 * job.repeats), said=said or {})
        self.enter(ticket)
        with self.lock:
            over = [old for old in self.tickets if old.over]
            mine = [old for old in over if old.user == user]
            gone = {old.key for old in [*over[: len(over) + 1 - KEPT_IN_ALL], *mine[: len(mine) + 1 - KEPT]]}
            self.tickets = [*(old for old in self.tickets if old.key not in gone), ticket]
            ticket.future = self.worker.submit(self._draw, ticket)
        return ticket

    def tickets_of(self, user: str) -> list[Ticket]:
        """The clips that this user asked for since the server started, newest first; of old ones that are over, the last."""
        with self.lock:
            return [ticket for ticket in reversed(self.tickets) if ticket.user == user]

    def remove(self, ticket: Ticket) -> None:
        """Stop a clip if it is not over, and forget it. Files of a finished one stay."""
        self.halt(ticket)
        with self.lock:
            self.tickets = [other for other in self.tickets if other is not ticket]

    async def watch(self, ticket: Ticket) -> AsyncGenerator[Ticket, None]:
        """Yield the ticket at every change, and at least every `HEARTBEAT` seconds, until it is over."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        listener = functools.partial(loop.call_soon_threadsafe, changed.set)
        ticket.listeners.add(listener)
        try:
            while True:
                changed.clear()
                over = ticket.over  # read before the yield: the state may change during it
                yield ticket
                if over:
                    return
                await _either(changed, HEARTBEAT)
        finally:
            ticket.listeners.discard(listener)

    async def follow(self, user: str, job: jobs.Job, folder: Path) -> AsyncGenerator[Ticket, None]:
        """`submit` and `watch`. Closing this stops the clip."""
        ticket = self.submit(user, job, folder)
        try:
            async with contextlib.aclosing(self.watch(ticket)) as states:
                async for each in states:
                    yield each
        finally:
            self.remove(ticket)

    def _leave(self, ticket: Turn) -> None:
        with self.lock:
            if ticket in self.queue:
                self.queue.remove(ticket)

    def _draw(self, ticket: Ticket) -> None:
        try:
            ticket.become(self._drawn(ticket))
        except UserError as error:
            ticket.error = str(error)
            ticket.become("failed")
        except BaseException as error:
            traceback.print_exc()
            ticket.error = f"something went wrong in the server ({type(error).__name__}): its log says more"
            ticket.become("failed")
            raise
        finally:
            ticket.latents = None
            self._leave(ticket)

    def _drawn(self, ticket: Ticket) -> str:
        def pool(todo: list[jobs.Job], stop: Callable[[], bool]) -> Any:
            for job in todo:
                try:
                    outcome = attempt(self.renderer, job, ticket.on_step)
                except Stopped:
                    return
                ticket.report = getattr(outcome, "report", None)
                yield job, outcome

        summary = batch.run([ticket.job], ticket.folder, pool, ticket, ticket.stop.is_set)
        for record in summary.skipped:  # drawn before
            ticket.record = record
        if self.renderer.pipe is not None:
            model = ticket.job.settings().model
            self.facts.setdefault(model, estimate.facts(self.renderer.pipe))
        return "stopped" if summary.left else "done"

    def close(self) -> None:
        """Stop the current clip within one denoising step, and drop those that wait."""
        with self.lock:
            for ticket in self.queue:
                ticket.stop.set()
        self.worker.shutdown(cancel_futures=True)

    def call(self, user: str, function: Callable[[], Any]) -> tuple[Future[Any], int]:
        """Queue a function that needs the model or the cores; returns its future and how many come first. Raises as `enter`."""
        turn = Turn(user)
        ahead = self.enter(turn)

        def run() -> Any:
            if turn.stop.is_set():
                raise UserError("stopped before its turn")
            return function()

        future = self.worker.submit(run)
        future.add_done_callback(lambda _: self._leave(turn))  # also when it is cancelled
        return future, ahead


async def _either(changed: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(changed.wait(), seconds)
    except TimeoutError:
        return
