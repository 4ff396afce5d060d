"""Writing clips: H.264 files through ffmpeg, contact sheets, and output files that appear whole or not at all."""

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
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

SLUG_LENGTH = 60  # characters: a file name may have 255 bytes on most file systems


class UserError(Exception):
    """What the user can mend, in a line: the thing and the remedy. code: exit status, 1 while running, 2 for usage."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def slug(text: str, length: int = SLUG_LENGTH) -> str:
    """A readable file name of at most `length` characters: words in ASCII letters and digits, joined by hyphens."""
    spaced = re.sub(r"\s", " ", text)  # U+2028 and others part words too, and are not ASCII
    plain = unicodedata.normalize("NFKD", spaced).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(name) > length:
        name = name[: length + 1].rpartition("-")[0] or name[:length]
    return name or "clip"


def digest(settings: dict[str, Any], digits: int = 8) -> str:
    """Hexadecimal digits that tell settings apart."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:digits]


class Outputs:
    """Files of one folder that are written under temporary names and get their own together, at `publish`.

    ``with Outputs(folder, "a.json", "a.mp4") as out: write(out["a.json"]); …; out.publish()``. Without `publish`, by an
    exception or a signal, nothing is left, nor the folder if it was new. The last name appears last: where it exists,
    all do. Raises UserError where the folder cannot be written.
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
        """Remove what a killed run left of the same file."""
        for part in self.folder.glob(f".{glob_escape(name)}.*.part"):
            number = part.name.split(".")[-2]
            if number.isdigit() and not _alive(int(number)):
                part.unlink(missing_ok=True)

    def publish(self) -> None:
        """Give the files their names, replacing what has them."""
        for name in self.names:
            with open(self[name], "rb+") as file:
                os.fsync(file.fileno())
        for name in self.names:
            os.replace(self[name], self.folder / name)
        if hasattr(os, "O_DIRECTORY"):  # or a power cut could take the names back
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
                return  # the folder is no folder, or not ours: nothing was written there
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


def ffmpeg() -> str:
    """The ffmpeg executable (of imageio-ffmpeg, or IMAGEIO_FFMPEG_EXE). Raises UserError if there is none that runs."""
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
    """A clip, frames [F, H, W, 3] in [0, 1], as files: {suffix: content}. kind: mp4, webp, gif, or png (a file a frame)."""
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
    """Encode frames [F, H, W, 3] in [0, 1], fps a second, as H.264 in yuv420p, index first, `comment` as JSON in a tag.

    Chroma is kept for every second pixel, so height and width must be even. Raises UserError if ffmpeg fails.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UserError(f"H.264 needs an even height and width, got {height} x {width}")
    command = [ffmpeg(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "-", "-an", "-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p"]
    command += ["-movflags", "+faststart", "-metadata", f"comment={json.dumps(comment)}", "-f", "mp4", str(path)]
    # A session of its own: Ctrl-C reaches Python alone, which then kills ffmpeg and removes its file.
    done = subprocess.run(command, input=to_uint8(frames).tobytes(), capture_output=True, start_new_session=True)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"ffmpeg could not encode the video ({last}): is the disk full, or ffmpeg built without libx264?")


def contact_sheet(
    rows: Sequence[tuple[str, NDArray[np.floating[Any]]]], columns: int = 8, lines: int = 1, width: int = 160
) -> Image:
    """Frames of each (title, clip [F, H, W, 3]) spread evenly over it, in time order; each clip takes `lines` lines.

    width: of one frame on the sheet, in pixels; small frames grow by whole numbers only, so that pixels stay pixels.
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


def to_json(content: dict[str, Any]) -> bytes:
    """UTF-8, indented; what JSON cannot say (an infinite PSNR) must have been made None."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(to_json(content))
