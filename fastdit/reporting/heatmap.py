"""Heatmaps of numbers on a grid, with a legend, in a colour map that is safe for colour-blind readers (viridis)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

VIRIDIS = ((68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
           (173, 220, 48), (253, 231, 37))  # fmt: skip
"""Nine samples of matplotlib's viridis, dark to light."""
EMPTY = (225, 225, 225)
MEASURES = ("density", "error", "seconds")
CELL, EDGE, LEGEND, TITLE = 14, 56, 90, 270


def colour(share: float) -> tuple[int, int, int]:
    """0 … 1 -> RGB, linear between the samples."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    a, b = VIRIDIS[low], VIRIDIS[low + 1]
    r, g, blue = (round(x + (y - x) * (place - low)) for x, y in zip(a, b, strict=True))
    return r, g, blue


def of_calls(calls: Iterable[tuple[int, Any]], what: str, sites: int) -> Image.Image:
    """Heatmap of one of `MEASURES` over calls (site, `CallRecord`). Raises ValueError for any other `what`."""
    if what not in MEASURES:
        raise ValueError(f"a heatmap shows one of {', '.join(MEASURES)}, not {what!r}")
    return draw([(ran.step, site, getattr(ran, what)) for site, ran in calls], what, sites)


def draw(points: Sequence[tuple[int, int, float | None]], what: str, sites: int) -> Image.Image:
    """Points (step, site, value) -> one cell per step and site, with the mean of its values; light gray without any."""
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    for step, site, value in points:
        if value is not None:
            cells[step, site].append(value)
    means = {place: sum(values) / len(values) for place, values in cells.items()}
    steps = 1 + max((step for step, _, _ in points), default=0)
    top = 1.0 if what == "density" else max(means.values(), default=0.0) or 1.0
    width, height = EDGE + max(steps * CELL + LEGEND, TITLE), EDGE + max(sites, 8) * CELL
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    pen.text((EDGE, 6), f"{what} by step (right) and attention layer (down)", "black", font)
    for step in range(steps):
        x = EDGE + step * CELL
        if step % 5 == 0:
            pen.text((x, EDGE - 16), str(step), "black", font)
        for site in range(sites):
            y = EDGE + site * CELL
            value = means.get((step, site))
            pen.rectangle((x, y, x + CELL - 2, y + CELL - 2), EMPTY if value is None else colour(value / top))
    for site in range(0, sites, max(1, sites // 8)):
        pen.text((EDGE - 24, EDGE + site * CELL), str(site), "black", font)
    x, ticks = EDGE + steps * CELL + 12, 8
    for i in range(ticks + 1):
        y = EDGE + (ticks - i) * CELL * max(sites, 8) // (ticks + 1)
        pen.rectangle((x, y, x + 12, y + CELL), colour(i / ticks))
        if i % 2 == 0:
            pen.text((x + 18, y), f"{top * i / ticks:.3g}", "black", font)
    return image
