"""The manifest: what has become of every job of an output folder, a JSON line each, appended as it happens.

The last line of a job counts. Lines are written whole and synced before the next job begins, so that a process killed at any
moment loses the job under way and nothing else; half a line at the end (a power cut) is dropped. One process at a time holds
the folder, by a lock that the operating system releases with the process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from fastdit.apps.errors import UserError
from fastdit.apps.render.outputs import Outputs

FILE, LOCK = "manifest.jsonl", ".fastdit.lock"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The last record of every job, oldest job first; empty where there is no manifest. Broken lines are skipped."""
    records: dict[str, dict[str, Any]] = {}
    try:
        # -sig: an editor that somebody looked at it with may have put a mark of byte order in front
        lines = (folder / FILE).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError:
        return {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(job := record.get("job"), str) and "state" in record:
            records.pop(job, None)
            records[job] = record
    return records


class Manifest:
    """Context manager: holds a folder, made if missing. `append` and `publish` mend a folder that was removed under way.

    Raises UserError where another process holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Manifest:
        self.new = not self.folder.exists()
        self.lock = FileLock(self.folder / LOCK, timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            # no link is followed: what is written here lands here
            self.file = os.open(self.folder / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except Timeout:
            raise UserError(f"another fastdit is writing into {self.folder}: wait for it, or choose another --out") from None
        except OSError as error:
            self._leave()
            raise UserError(f"cannot write into {self.folder} ({error.strerror}): choose another folder with --out") from None
        self.records = read(self.folder)
        self._drop_half_a_line()
        return self

    def _drop_half_a_line(self) -> None:
        content = (self.folder / FILE).read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self.file, whole)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        empty = os.fstat(self.file).st_size == 0
        os.close(self.file)
        if empty:
            (self.folder / FILE).unlink(missing_ok=True)
        self._leave()

    def _leave(self) -> None:
        """Take the lock's file away while it is held (who waits for it notices), and a new folder without anything in it."""
        if self.lock.is_locked:
            (self.folder / LOCK).unlink(missing_ok=True)
            self.lock.release()
        if self.new and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def append(self, record: dict[str, Any]) -> None:
        """Record what became of a job. Raises OSError (disk full), the manifest unharmed."""
        self._mend()
        self.records.pop(record["job"], None)
        self.records[record["job"]] = record
        self._write([record])

    def _write(self, records: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
        before = os.fstat(self.file).st_size
        try:
            while text:
                text = text[os.write(self.file, text) :]
            os.fsync(self.file)
        except BaseException:
            os.ftruncate(self.file, before)
            raise

    def _mend(self) -> None:
        """The folder may have been removed, or moved, while a job ran: make it again, with the records so far."""
        try:
            there = os.stat(self.folder / FILE, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (os.fstat(self.file).st_dev, os.fstat(self.file).st_ino):
                return
        except OSError:
            pass  # not there, which is what is mended here
        print(f"fastdit: {self.folder} was removed or replaced under way: going on in a new one", file=sys.stderr)
        known = self.records
        os.close(self.file)
        self.lock.release()
        self.__enter__()
        self._write([record for key, record in known.items() if key not in self.records])
        self.records = known | self.records

    def finished(self, job: str, name: str) -> dict[str, Any] | None:
        """The record of a job whose clip is there. One that was killed between its files and its line gets its line now."""
        record = self.records.get(job)
        if record is not None and record["state"] == "done" and (self.folder / record["file"]).is_file():
            return record
        beside = self._sidecar(name)
        if beside is not None and beside.get("job") == job and (self.folder / str(beside.get("file"))).is_file():
            del beside["report"]
            self.append(beside)
            return beside
        return None

    def _sidecar(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def name(self, job: str, name: str) -> str:
        """The name of a job's files in this folder: another one's of the same name stay."""
        if (record := self.records.get(job)) is not None and "name" in record:
            return str(record["name"])
        taken = any(record.get("name") == name for record in self.records.values())
        return f"{name}-{job[:8]}" if taken else name

    def check(self, job: str, name: str, suffixes: Iterable[str], overwrite: bool = False) -> None:
        """Raises UserError where a file of somebody else has the name of a job's."""
        if overwrite or (self._sidecar(name) or {}).get("job") == job:
            return
        for suffix in suffixes:
            if os.path.lexists(path := self.folder / (name + suffix)):
                raise UserError(f"{path} is in the way: move it, choose another --out, or say --overwrite")

    def publish(self, job: str, name: str, files: Mapping[str, bytes], overwrite: bool = False) -> None:
        """Write files `name` + suffix, the sidecar first and the clip last. Raises UserError for a file of somebody else."""
        self._mend()
        self.check(job, name, files, overwrite)
        with Outputs(self.folder, *(name + suffix for suffix in files)) as out:
            for suffix, content in files.items():
                out[name + suffix].write_bytes(content)
            out.publish()
