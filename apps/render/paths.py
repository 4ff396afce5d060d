"""Paths and ids as people write them: of models, LoRAs and pictures."""

from __future__ import annotations

import hashlib
import math
import os
import re
from functools import lru_cache
from pathlib import Path

from fastdit.apps.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local(path: str) -> Path:
    """Expand ~ and ~user as the shell does; ~name of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))


def here(path: str) -> bool:
    """Whether a file or folder exists there; False also for a path that is too long."""
    return os.path.exists(local(path))


def hub_id(said: str) -> bool:
    """Whether the text has the form of a Hub id, owner/name."""
    return bool(HUB_ID.fullmatch(said)) and not said.startswith(".")


def split_lora(said: str) -> tuple[str, str]:
    """Split PATH@SCALE or PATH into the path and the scale as written.

    If the whole text names an existing file or folder, all of it is the path. Otherwise a number after the last @ is the scale,
    and anything else there belongs to the path.
    """
    path, _, scale = said.rpartition("@")
    return (path, scale) if path and _finite(scale) and not here(said) else (said, "1")


def _finite(said: str) -> bool:
    try:
        return math.isfinite(float(said))
    except ValueError:
        return False


def content(path: str) -> str:
    """A hash of a file's content; for anything but a file (a folder, a Hub id) the text itself.

    Raises UserError for a file that cannot be read.
    """
    try:
        file = local(path)
        if not os.path.isfile(file):
            return path
        found = file.stat()
        return _sha256(str(file), found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", 2) from None


@lru_cache(maxsize=4096)
def _sha256(path: str, modified: int, size: int) -> str:
    """Cached by time and size, so that a file is read once however many jobs use it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
