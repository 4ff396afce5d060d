"""Render many jobs into one folder.

Jobs that the manifest lists as done are skipped. A pool renders the others, and each result is written as soon as it comes
back. A job that fails does not stop the others.
"""

from __future__ import annotations

import datetime
import errno
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fastdit.apps.errors import UserError
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.manifest import Manifest
from fastdit.apps.render.outputs import to_json
from fastdit.apps.render.renderer import Result
from fastdit.apps.workers.pool import Failure, Outcome

FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Summary:
    """done: rendered now; skipped: rendered earlier; failed: (where, why); left: not started, because of an interruption."""

    done: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left: int = 0

    def __str__(self) -> str:
        counts = [(len(self.done), "rendered"), (len(self.skipped), "there already"), (len(self.failed), "failed")]
        line = ", ".join(f"{count} {what}" for count, what in [*counts, (self.left, "left")] if count)
        return "\n".join([line or "nothing to do", *(f"  {where}: {why}" for where, why in self.failed)])


class Stop:
    """Context manager: it is true after the first Ctrl-C; the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def _signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfastdit: stopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def __enter__(self) -> Stop:
        self.before = signal.signal(signal.SIGINT, self._signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)


class Watcher(Protocol):
    """Is told about the progress of a batch."""

    def begin(self, jobs: int) -> None: ...

    def done(self, record: dict[str, Any], text: str) -> None: ...

    def failed(self, record: dict[str, Any]) -> None: ...


Pool = Callable[[list[Job], Callable[[], bool]], Iterable[tuple[Job, Outcome]]]


def run(
    jobs: list[Job],
    folder: Path,
    pool: Pool,
    watcher: Watcher,
    stop: Callable[[], bool],
    again: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Render jobs into a folder.

    again: also render the jobs that are done already; overwrite: also replace files that fastdit did not write. The error of a
    single job is raised and leaves no trace in the folder; among several jobs it is recorded. Raises UserError if the folder
    can no longer be written.
    """  # fmt: skip
    alone = len(jobs) == 1
    with Manifest(folder) as manifest:
        summary, todo, names = Summary(), list[Job](), dict[str, str]()
        for job in jobs:
            names[job.hash] = name = manifest.name(job.hash, job.name)
            if not again and (record := manifest.finished(job.hash, name)) is not None:
                summary.skipped.append(record)
            else:
                todo.append(job)
        watcher.begin(len(todo))

        def fail(job: Job, failure: Failure) -> None:
            if alone:
                print(failure.trace or "", end="", file=sys.stderr)
                raise UserError(failure.error, failure.code)
            summary.failed.append((job.where, failure.error))
            record = {
                "job": job.hash, "state": "failed", "index": job.index, "where": job.where, "name": names[job.hash],
                "error": failure.error, "trace": failure.trace, "settings": job.settings().to_dict(), "finished": _now(),
            }  # fmt: skip
            manifest.append(record)
            watcher.failed(record)

        for job in list(todo):
            try:
                manifest.check(job.hash, names[job.hash], (".json", f".{job.settings().format}"), overwrite)
            except UserError as error:
                todo.remove(job)
                fail(job, Failure(str(error), error.code))
        try:
            for job, outcome in pool(todo, stop):
                if isinstance(outcome, Failure):
                    fail(job, outcome)
                    continue
                try:
                    record = _publish(manifest, job, names[job.hash], outcome, overwrite)
                except UserError as error:
                    fail(job, Failure(str(error), error.code))
                    continue
                summary.done.append(record)
                watcher.done(record, outcome.text)
        except OSError as error:
            if error.errno not in FULL:
                raise UserError(f"cannot write into {folder} ({error.strerror})") from None
            raise UserError(
                f"the disk of {folder} is full: {len(todo) - len(summary.done)} of {len(todo)} clips are left; make room and "
                "run the same command again, it goes on from here"
            ) from None
        summary.left = len(jobs) - len(summary.done) - len(summary.skipped) - len(summary.failed)
        return summary


def _publish(manifest: Manifest, job: Job, name: str, result: Result, overwrite: bool) -> dict[str, Any]:
    """Write the files of a job, then its line in the manifest."""
    files = [name + suffix for suffix in result.files]
    record = {"job": job.hash, "state": "done", "file": files[-1], "files": files, "name": name, "finished": _now()}
    record |= result.record
    beside = to_json(record | {"report": result.report.to_dict()})
    manifest.publish(job.hash, name, {".json": beside} | result.files, overwrite)
    manifest.append(record)
    return record


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
