"""Clips as files: H.264 through ffmpeg, other formats through Pillow, contact sheets, and names for them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdit.apps.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

SLUG_LENGTH = 60  # characters; most file systems allow 255 bytes


def slug(text: str, length: int = SLUG_LENGTH) -> str:
    """A readable file name of at most `length` characters: words of ASCII letters and digits, joined by hyphens."""
    spaced = re.sub(r"\s", " ", text)  # U+2028 and others separate words too, and are not ASCII
    plain = unicodedata.normalize("NFKD", spaced).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(name) > length:
        name = name[: length + 1].rpartition("-")[0] or name[:length]
    return name or "clip"


def digest(settings: dict[str, Any], digits: int = 8) -> str:
    """A hash of settings, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:digits]


def ffmpeg() -> str:
    """Path of the ffmpeg executable (IMAGEIO_FFMPEG_EXE, or imageio-ffmpeg's own). Raises UserError if it does not run."""
    named = os.environ.get("IMAGEIO_FFMPEG_EXE")
    try:
        return _ffmpeg(named)
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        cause = f"IMAGEIO_FFMPEG_EXE={named} does not run: unset it" if named else "pip install imageio-ffmpeg"
        raise UserError(f"no ffmpeg to write the video with: {cause}, or point IMAGEIO_FFMPEG_EXE at one") from None


@functools.cache
def _ffmpeg(named: str | None) -> str:
    import imageio_ffmpeg

    path: str = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([path, "-version"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return path


def to_uint8(frames: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """[F, H, W, 3] in [0, 1] -> 0 … 255, rounded."""
    import numpy as np

    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def encode(frames: NDArray[np.floating[Any]], kind: str, fps: int, crf: int, comment: dict[str, Any]) -> dict[str, bytes]:
    """The files {suffix: content} of a clip [F, H, W, 3] in [0, 1]. kind: mp4, webp, gif, or png (a file for each frame)."""
    from PIL import Image

    if kind == "mp4":
        with tempfile.TemporaryDirectory(prefix="fastdit-") as folder:
            path = Path(folder) / "clip.mp4"
            write_mp4(path, frames, fps, comment, crf)
            return {".mp4": path.read_bytes()}
    pictures = [Image.fromarray(frame) for frame in to_uint8(frames)]
    if kind == "png":
        suffixes = [".png"] if len(pictures) == 1 else [f"-{number:04d}.png" for number in range(len(pictures))]
        return {suffix: png(picture, comment) for suffix, picture in zip(suffixes, pictures, strict=True)}
    stream = io.BytesIO()
    more: dict[str, Any] = {"quality": 90, "method": 4} if kind == "webp" else {"optimize": True}
    pictures[0].save(
        stream, kind.upper(), save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, **more
    )
    return {f".{kind}": stream.getvalue()}


def write_mp4(path: Path, frames: NDArray[np.floating[Any]], fps: int, comment: dict[str, Any], crf: int = 18) -> None:
    """Write frames [F, H, W, 3] in [0, 1] as H.264 in yuv420p, with the index in front and `comment` as JSON in a tag.

    Chroma is stored for every second pixel, so height and width must be even. Raises UserError if ffmpeg fails.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UserError(f"H.264 needs an even height and width, got {height} x {width}")
    command = [ffmpeg(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "-", "-an", "-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p"]
    command += ["-movflags", "+faststart", "-metadata", f"comment={json.dumps(comment)}", "-f", "mp4", str(path)]
    # In a session of its own: Ctrl-C reaches only Python, which then kills ffmpeg and removes its file.
    done = subprocess.run(command, input=to_uint8(frames).tobytes(), capture_output=True, start_new_session=True)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"ffmpeg could not encode the video ({last}): is the disk full, or ffmpeg built without libx264?")


def contact_sheet(
    rows: Sequence[tuple[str, NDArray[np.floating[Any]]]], columns: int = 8, lines: int = 1, width: int = 160
) -> Image:
    """A picture with evenly spaced frames of each (title, clip [F, H, W, 3]), in `lines` lines for each clip.

    width: pixels of one frame on the sheet; small frames are enlarged by a whole factor, so that their pixels stay square.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    gap, head = 4, 16
    _, height, wide, _ = rows[0][1].shape
    factor = max(1, width // wide) if wide <= width else width / wide
    size = (round(wide * factor), round(height * factor))
    block = head + lines * (size[1] + gap)
    sheet = Image.new("RGB", (columns * (size[0] + gap) + gap, len(rows) * block + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (title, clip) in enumerate(rows):
        count = min(len(clip), columns * lines)
        draw.text((gap, row * block + 2), title, fill="black")
        for place, index in enumerate(np.linspace(0, len(clip) - 1, count).round().astype(int)):
            picture = Image.fromarray(to_uint8(clip[index]))
            picture = picture.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS)
            line, column = divmod(place, columns)
            sheet.paste(picture, (gap + column * (size[0] + gap), row * block + head + line * (size[1] + gap)))
    return sheet


def png(picture: Image, settings: dict[str, Any]) -> bytes:
    """A picture as a PNG file, with the settings as JSON in its iTXt chunk "fastdit"."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("fastdit", json.dumps(settings, ensure_ascii=False))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()
