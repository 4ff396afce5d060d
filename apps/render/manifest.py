"""The manifest: a file with one JSON line for the outcome of each job of an output folder.

The last line of a job counts. Each line is written whole and synced before the next job begins, so a process that is killed at
any moment loses only the job under way. Half a line at the end, after a power cut, is dropped. One process at a time holds the
folder, by a lock that the operating system releases when the process ends.
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
    """The last record of every job, oldest first; empty if there is no manifest. Broken lines are skipped."""
    records: dict[str, dict[str, Any]] = {}
    try:
        # -sig: an editor may have put a byte order mark in front
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
    """Context manager: holds a folder, and creates it if missing. `append` and `publish` restore a folder that was removed.

    Raises UserError if another process holds the folder or it cannot be written.
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
            # links are not followed: the file must lie in this folder
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
        """Remove the lock file while the lock is held (a waiting process notices), and the folder if it is new and empty."""
        if self.lock.is_locked:
            (self.folder / LOCK).unlink(missing_ok=True)
            self.lock.release()
        if self.new and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def append(self, record: dict[str, Any]) -> None:
        """Append the record of a job. Raises OSError, for example when the disk is full; the manifest is then unharmed."""
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
        """If the folder was removed or moved while a job ran, create it again with the records so far."""
        try:
            there = os.stat(self.folder / FILE, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (os.fstat(self.file).st_dev, os.fstat(self.file).st_ino):
                return
        except OSError:
            pass  # it is missing: restored below
        print(f"fastdit: {self.folder} was removed or replaced under way: going on in a new one", file=sys.stderr)
        known = self.records
        os.close(self.file)
        self.lock.release()
        self.__enter__()
        self._write([record for key, record in known.items() if key not in self.records])
        self.records = known | self.records

    def finished(self, job: str, name: str) -> dict[str, Any] | None:
        """The record of a job whose clip exists, or None. A job that was killed before its line was written gets it now."""
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
        """The name for a job's files in this folder; it never takes that of another job."""
        if (record := self.records.get(job)) is not None and "name" in record:
            return str(record["name"])
        taken = any(record.get("name") == name for record in self.records.values())
        return f"{name}-{job[:8]}" if taken else name

    def check(self, job: str, name: str, suffixes: Iterable[str], overwrite: bool = False) -> None:
        """Raise UserError if a file that is not this job's has the name of one of its files."""
        if overwrite or (self._sidecar(name) or {}).get("job") == job:
            return
        for suffix in suffixes:
            if os.path.lexists(path := self.folder / (name + suffix)):
                raise UserError(f"{path} is in the way: move it, choose another --out, or say --overwrite")

    def publish(self, job: str, name: str, files: Mapping[str, bytes], overwrite: bool = False) -> None:
        """Write the files `name` + suffix, the sidecar first and the clip last. Raises UserError as `check`."""
        self._mend()
        self.check(job, name, files, overwrite)
        with Outputs(self.folder, *(name + suffix for suffix in files)) as out:
            for suffix, content in files.items():
                out[name + suffix].write_bytes(content)
            out.publish()
