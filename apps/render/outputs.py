"""Output files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdit.apps.errors import UserError


class Outputs:
    """Files of one folder that are written under temporary names and renamed together by `publish`.

    ``with Outputs(folder, "a.json", "a.mp4") as out: write(out["a.json"]); …; out.publish()``. If `publish` is not reached, the
    files are removed, and so is the folder if it was new. The last name appears last: if it exists, all do. Raises UserError
    if the folder cannot be written.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.names = names

    def __getitem__(self, name: str) -> Path:
        return self.folder / f".{name}.{os.getpid()}.part"

    def __enter__(self) -> Outputs:
        self.new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in self.names:
                self._sweep(name)
                self[name].touch()
        except OSError as error:
            self._clear()
            raise UserError(f"cannot write into {self.folder} ({error.strerror}): choose another folder with --out") from None
        return self

    def _sweep(self, name: str) -> None:
        """Remove temporary files of the same name that a killed process left."""
        for part in self.folder.glob(f".{glob_escape(name)}.*.part"):
            number = part.name.split(".")[-2]
            if number.isdigit() and not _alive(int(number)):
                part.unlink(missing_ok=True)

    def publish(self) -> None:
        """Rename the files; existing files of these names are replaced."""
        for name in self.names:
            with open(self[name], "rb+") as file:
                os.fsync(file.fileno())
        for name in self.names:
            os.replace(self[name], self.folder / name)
        if hasattr(os, "O_DIRECTORY"):  # otherwise a power cut could undo the renaming
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _clear(self) -> None:
        for name in self.names:
            try:
                self[name].unlink(missing_ok=True)
            except OSError:
                return  # not a folder, or not writable: nothing was written there
        if self.new and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear()


def glob_escape(name: str) -> str:
    """The name with glob's own characters taken literally."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def to_json(content: Any) -> bytes:
    """UTF-8, indented. Raises ValueError for infinity and NaN, which JSON lacks: write None instead."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all; a missing folder is created. Raises UserError if it cannot be written."""
    write_bytes(path, to_json(content))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; a missing folder is created. Raises UserError if it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another file with --out") from None
