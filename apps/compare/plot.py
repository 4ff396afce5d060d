"""Error against speed, as a picture: one point a configuration, dense at 1 × and no error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fastdit.reporting.heatmap import colour
from fastdit.reporting.report import short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 420, 70, 130, 56, 50
RADIUS = 5


def ticks(most: float) -> list[float]:
    """Four to ten round numbers from 0 to the first that is not below `most`, which is above 0."""
    step = 10.0 ** math.floor(math.log10(most))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0) if most / (step * part) <= 10)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def error_against_speed(points: Sequence[tuple[str, float, float]], title: str) -> Image.Image:
    """points: (name, how many times as fast as dense, velocity error). Best is low and to the right."""
    across, up = ticks(max([1.0, *(ratio for _, ratio, _ in points)])), ticks(max([0.01, *(error for _, _, error in points)]))
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default()

    def place(ratio: float, error: float) -> tuple[float, float]:
        return (
            LEFT + ratio / across[-1] * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - error / up[-1] * (HEIGHT - TOP - BOTTOM),
        )

    def centred(x: float, y: float, said: str) -> None:
        pen.text((x - pen.textlength(said, font) / 2, y), said, "black", font)

    pen.text((8, 8), title, "black", font)
    for value in across:
        x, bottom = place(value, 0)
        pen.line((x, TOP, x, bottom), (225, 225, 225))
        centred(x, bottom + 6, f"{value:.3g}")
    for value in up:
        left, y = place(0, value)
        pen.line((left, y, WIDTH - RIGHT, y), (225, 225, 225))
        pen.text((left - 8 - pen.textlength(short(value), font), y - 6), short(value), "black", font)
    centred((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22, "times as fast as dense (denoising)")
    pen.text((8, TOP - 26), "velocity error, worst phase", "black", font)
    drawn = [("dense", 1.0, 0.0), *points]
    for index, (name, ratio, error) in enumerate(drawn):
        x, y = place(ratio, error)
        pen.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), colour(index / max(1, len(drawn) - 1) * 0.85), "black")
        pen.text((x + RADIUS + 4, y - 6 - 12 * (index % 2)), name, "black", font)
    return picture
