"""What to render: every setting of a clip, and what can be told of it without a model."""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdit.apps.errors import UserError
from fastdit.apps.render.text import blank, control, half_pair

if TYPE_CHECKING:
    from fastdit import Config

LONGEST_PROMPT = 4000  # characters; no text encoder of diffusers' models reads half of that
OFFLOADS = ("none", "model", "group")
FORMATS = ("mp4", "webp", "gif", "png")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Settings:
    """All that decides a clip and how it is run; where nothing is said, what suits the embedded model.

    model: folder or Hub id, None: embedded. custom: replaces the preset. height, width: pixels; fps: frames a second; image: a
    file to start from; lora: folder, file or Hub id, with @scale if it is not 1 (`split_lora`). format, crf: of the video file.
    What follows changes speed and memory only; ulysses, ring: processes that share a video.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    model: str | None = None
    preset: str = "balanced"
    frames: int = 33
    height: int = 128
    width: int = 128
    steps: int = 20
    guidance: float = 3.0
    fps: int = 8
    device: str = "auto"
    dtype: str = "auto"
    custom: Config | None = None
    image: str | None = None
    lora: str | None = None
    format: str = "mp4"
    crf: int = 18
    cpu_offload: str = "none"
    compile: bool = False
    vae_tiling: bool = False
    ulysses: int = 1
    ring: int = 1

    def config(self) -> Config:
        """The preset's configuration. Raises UserError listing the presets."""
        from fastdit import preset

        if self.custom is not None:
            return self.custom
        try:
            return preset(self.preset)
        except ValueError as error:
            raise UserError(str(error), 2) from None

    def check(self) -> None:
        """Everything that can be told without the model. Raises UserError."""
        for name, said in vars(self).items():
            if isinstance(said, str):
                # a prompt may have any character that JSON can say, as in the pipeline's own call; no name of a file has those
                odd = half_pair(said) or (None if name in ("prompt", "negative") else control(said))
                if odd is not None:
                    raise UserError(f"the {name} has {odd!r} in it: leave that out", 2)
        self.config()
        if blank(self.prompt):
            raise UserError('the prompt is empty: say what to draw, such as "a red circle moving right"', 2)
        if self.steps < 1:
            raise UserError(f"--steps must be at least 1, got {self.steps}", 2)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}", 2)
        if not 1 <= self.fps <= 240:
            raise UserError(f"--fps must be from 1 to 240, got {self.fps}", 2)
        if len(self.prompt) > LONGEST_PROMPT or len(self.negative) > LONGEST_PROMPT:
            count = max(len(self.prompt), len(self.negative))
            raise UserError(f"the prompt has {count} characters: the longest allowed has {LONGEST_PROMPT}", 2)
        for name, size in (("frames", self.frames), ("height", self.height), ("width", self.width)):
            if size < 0:
                raise UserError(f"--{name} must be positive, got {size}", 2)
        for name, size in (("ulysses", self.ulysses), ("ring", self.ring)):
            if size < 1:
                raise UserError(f"--{name} must be at least 1, got {size}", 2)
        if self.format not in FORMATS:
            raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {self.format!r}", 2)
        if not 0 <= self.crf <= 51:
            raise UserError(f"--crf must be from 0 (lossless) to 51, got {self.crf}", 2)
        if self.cpu_offload not in OFFLOADS:
            raise UserError(f"--cpu-offload must be one of {', '.join(OFFLOADS)}, got {self.cpu_offload!r}", 2)
        if self.image is not None and not os.path.isfile(local(self.image)):
            raise UserError(f"--image: no file {self.image}", 2)
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise UserError(f"--guidance must be a number of at least 0 (1 and below: off), got {self.guidance}", 2)

    def to_dict(self) -> dict[str, Any]:
        """As recorded beside the clip, the preset spelled out."""
        fields = asdict(self)
        if fields.pop("custom") is not None:
            fields["preset"] = "custom"
        return fields | {"config": self.config().to_dict()}

    @property
    def pipeline(self) -> tuple[Any, ...]:
        """What the loaded pipeline depends on."""
        return (
            self.model,
            self.device,
            self.dtype,
            self.lora,
            self.cpu_offload,
            self.compile,
            self.vae_tiling,
            self.ulysses,
            self.ring,
        )


def local(path: str) -> Path:
    """~ is home, as in the shell; of a user who is none it is a name like any other."""
    return Path(os.path.expanduser(path))


def here(path: str) -> bool:
    """Whether that is a file or folder; a path that cannot be one (too long) is none."""
    return os.path.exists(local(path))


def hub_id(said: str) -> bool:
    """Whether it can be an id of the Hub, owner/name."""
    return bool(HUB_ID.fullmatch(said)) and not said.startswith(".")


def split_lora(said: str) -> tuple[str, str]:
    """PATH@SCALE or PATH -> where it is, and its scale as it was written.

    What is a file or folder by its whole name is that, whatever is in the name; elsewhere a number behind the last @ is the
    scale, and anything else there is part of the path.
    """
    path, _, scale = said.rpartition("@")
    return (path, scale) if path and _finite(scale) and not here(said) else (said, "1")


def _finite(said: str) -> bool:
    try:
        return math.isfinite(float(said))
    except ValueError:
        return False


def content(path: str) -> str:
    """Digest of a file's content, or the path as it is where that is no file here: a folder, an id of the Hub.

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
    """Read once as long as time and size are the same, however many jobs have the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
