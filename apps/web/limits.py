"""The operator's limits on one clip, one user and the queue."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastdit.apps.errors import UserError
from fastdit.apps.render.settings import Settings


@dataclass(frozen=True)
class Limits:
    """The most that is allowed. each: clips that one user may have waiting; upload: a picture to start from."""

    frames: int = 241
    pixels: int = 1280 * 720
    steps: int = 100
    each: int = 4
    queue: int = 100
    upload_mb: int = 20
    upload_pixels: int = 16_000_000

    def check(self, settings: Settings) -> None:
        """Raise UserError for a clip that is larger than this page allows."""
        for what, size, most in (
            ("frames", settings.frames, self.frames),
            ("steps", settings.steps, self.steps),
            ("height x width, in pixels,", settings.height * settings.width, self.pixels),
        ):
            if size > most:
                raise UserError(f"{what} may be {most:,} at most on this page, got {size:,}")

    def check_picture(self, path: str) -> None:
        """Raise UserError for a file that is not a picture, or is too large. Only the head of the file is read."""
        from PIL import Image, UnidentifiedImageError

        if os.path.getsize(path) > self.upload_mb * 2**20:
            raise UserError(f"the picture is larger than {self.upload_mb} MB")
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
                pixels = picture.width * picture.height
        except Image.DecompressionBombError:
            pixels = -1
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
            raise UserError("the picture is not a PNG, JPEG or WebP file") from None
        if not 0 <= pixels <= self.upload_pixels:
            raise UserError(f"the picture has more than {self.upload_pixels / 1e6:.0f} million pixels")
