"""`fastdit compare FIRST SECOND`: two files, or the files of two folders by name, in numbers and pictures of the difference."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastdit.apps.errors import UserError
from fastdit.apps.render.media import contact_sheet, png, write_mp4
from fastdit.apps.render.outputs import Outputs, to_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
PICTURES = (".gif", ".webp", ".png")
NUMBERED = re.compile(r"(.+)-\d{4}\.png")
"""File name of one frame of a clip that `render --format png` wrote."""
COLUMNS = {"psnr_db": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "flicker_db": "flicker", "lpips": "LPIPS"}


@dataclass(frozen=True)
class Film:
    """frames uint8 [F, H, W, 3]; fps: frames a second."""

    frames: NDArray[np.uint8]
    fps: float


def compare_files(first: Path, second: Path, out: Path | None, as_json: bool, overwrite: bool) -> int:
    """Compare two clips, or two folders of clips; returns the exit status.

    Prints PSNR, SSIM, MS-SSIM and flicker (PSNR of the changes from frame to frame), and LPIPS if its weights are here. Two
    clips of one seed drift apart the longer they are denoised: the numbers say how close they are, not which one is better.
    """
    matched, failed = pairs(first, second)
    rows = []
    if not as_json:
        typer.echo("  ".join([*(title.rjust(9) for title in COLUMNS.values()), "clip"]))
    for name, (left, right) in matched.items():
        try:
            row = one(name, left, right, out, overwrite)
        except UserError as problem:
            failed.append(str(problem))
            continue
        rows.append(row)
        typer.echo(json.dumps(row, ensure_ascii=False) if as_json else line(row))
    if not as_json and rows:
        if len(rows) > 1:
            typer.echo(line(mean(rows)))
        scales = sorted({row["ms_ssim_scales"] for row in rows})
        typer.echo(f"PSNR and flicker in dB; MS-SSIM of {' and '.join(map(str, scales))} scales")
        for why in sorted({row["lpips_missing"] for row in rows if row["lpips_missing"]}):
            typer.echo(f"no LPIPS: {why}")
    for why in failed:
        print(f"fastdit: {' '.join(why.split())}", file=sys.stderr)
    return 1 if failed else 0


def pairs(first: Path, second: Path) -> tuple[dict[str, tuple[list[Path], list[Path]]], list[str]]:
    """({name: (first files, second files)}, errors for clips without a partner). Raises UserError if there are no pairs."""
    for path in (first, second):
        if not path.exists():
            raise UserError(f"no such file or folder: {path}", 2)
    if first.is_dir() != second.is_dir():
        raise UserError("give two files or two folders, not one of each", 2)
    if not first.is_dir():
        return {first.stem: ([first], [second])}, []
    left, right = clips(first), clips(second)
    if not left.keys() & right.keys():
        raise UserError(f"{first} and {second} have no clip of the same name ({', '.join((*VIDEOS, *PICTURES))})")
    both = {name: (left[name], right[name]) for name in left if name in right}
    alone = [(name, second) for name in left if name not in right] + [(name, first) for name in right if name not in left]
    return both, [f"{name} is missing in {folder}" for name, folder in alone]


def clips(folder: Path) -> dict[str, list[Path]]:
    """{name: its file, or its frames} of the clips in a folder, sorted; contact sheets are left out."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (*VIDEOS, *PICTURES) and not path.name.endswith("-sheet.png") and path.name[0] != ".":
            frame = NUMBERED.fullmatch(path.name)
            found.setdefault(f"{frame[1]}.png" if frame else path.name, []).append(path)
    return found


def read(files: list[Path]) -> Film:
    """Read a video, an animation, a picture, or the frames of a clip. Raises UserError."""
    import imageio.v3 as imageio
    import numpy as np
    from PIL import Image, ImageSequence

    fps = 8.0
    try:
        if files[0].suffix.lower() not in PICTURES:
            frames = imageio.imread(files[0], plugin="FFMPEG")
            return Film(frames, float(imageio.immeta(files[0], plugin="FFMPEG").get("fps", fps)))
        stack = []
        for path in files:
            with Image.open(path) as image:
                stack += [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
                duration = image.info.get("duration", 0)  # milliseconds of the last frame
        return Film(np.stack(stack), 1000 / duration if duration else fps)
    except Exception as error:  # ffmpeg, Pillow and imageio raise many kinds
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"cannot read {files[0]} as a clip ({cause})") from None


def one(name: str, left: list[Path], right: list[Path], out: Path | None, overwrite: bool) -> dict[str, Any]:
    """The numbers of a pair; its pictures go into a folder, if one is given. Raises UserError."""
    a, b = read(left), read(right)
    if a.frames.shape != b.frames.shape:
        shapes = [f"{path} has {len(x.frames)} frames of {x.frames.shape[2]} x {x.frames.shape[1]}"
                  for path, x in ((left[0], a), (right[0], b))]  # fmt: skip
        raise UserError(f"{shapes[0]}, {shapes[1]}: they cannot be compared frame by frame")
    row = {"clip": name, "first": str(left[0]), "second": str(right[0]), "frames": len(a.frames)} | numbers(a, b)
    if out is not None:
        picture(Path(name).stem, a, b, row, out, overwrite)
    return row


def numbers(a: Film, b: Film) -> dict[str, Any]:
    """The metrics; None for one that is infinite, because the clips are equal, or not available."""
    import torch

    from fastdit.apps.compare import metrics

    x, y = (torch.from_numpy(film.frames) / 255 for film in (a, b))
    try:
        score, scales = metrics.ms_ssim(x, y)
        values = {"psnr_db": metrics.psnr(x, y), "ssim": metrics.ssim(x, y), "ms_ssim": score}
    except ValueError as error:
        raise UserError(str(error)) from None
    flicker = metrics.flicker(x, y)
    lpips, why = metrics.lpips(x, y)
    values |= {"flicker_db": math.nan if flicker is None else flicker, "lpips": math.nan if lpips is None else lpips}
    kept = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return {"identical": math.isinf(values["psnr_db"])} | kept | {"ms_ssim_scales": scales, "lpips_missing": why}


def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over the pairs that have it."""
    found: dict[str, Any] = {"clip": f"mean of {len(rows)}", "identical": all(row["identical"] for row in rows)}
    for key in COLUMNS:
        values = [row[key] for row in rows if row[key] is not None]
        found[key] = sum(values) / len(values) if values else None
    return found


def line(row: dict[str, Any]) -> str:
    cells = []
    for key in COLUMNS:
        value = row[key]
        digits = 2 if key.endswith("_db") else 4
        equal = row["identical"] and key.endswith("_db")
        cells.append(("equal" if equal else "-" if value is None else f"{value:.{digits}f}").rjust(9))
    return "  ".join([*cells, str(row["clip"])])


def picture(name: str, a: Film, b: Film, row: dict[str, Any], out: Path, overwrite: bool) -> None:
    """Write NAME-side.mp4 (first, second, difference), NAME-difference.png (over all frames), NAME-sheet.png, NAME.json."""
    import numpy as np
    from PIL import Image

    from fastdit.reporting.heatmap import colour

    x, y = (film.frames.astype(np.float32) / 255 for film in (a, b))
    off = np.abs(x - y).mean(-1)
    peak, whole = float(off.max()) or 1.0, off.mean(0)
    shades = np.array([colour(i / 255) for i in range(256)], np.float32) / 255
    heat = shades[(off / peak * 255).astype(np.uint8)]
    still = shades[(whole / (float(whole.max()) or 1.0) * 255).astype(np.uint8)]
    row |= {"difference_peak": float(off.max()), "difference_mean_peak": float(whole.max())}
    names = [f"{name}.json", f"{name}-sheet.png", f"{name}-difference.png", f"{name}-side.mp4"]
    for path in (out / each for each in names):
        if not overwrite and path.exists():
            raise UserError(f"{path} exists already: choose another --out, or say --overwrite")
    titles = ("first", "second", f"difference: the lightest is {peak:.3f} of the range")
    with Outputs(out, *names) as files:
        sheet = contact_sheet(list(zip(titles, (x, y, heat), strict=True)))
        files[names[1]].write_bytes(png(sheet, row))
        files[names[2]].write_bytes(png(Image.fromarray((still * 255).round().astype(np.uint8)), row))
        side = np.concatenate((x, y, heat), axis=2)
        side = np.pad(side, ((0, 0), (0, side.shape[1] % 2), (0, side.shape[2] % 2), (0, 0)))  # H.264 needs even sides
        write_mp4(files[names[3]], side, max(1, round(a.fps)), row)
        files[names[0]].write_bytes(to_json(row))
        files.publish()
