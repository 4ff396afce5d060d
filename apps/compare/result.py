"""What a comparison found: a verdict, rows, a sheet and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdit.apps.bench.markdown import cpu_name
from fastdit.apps.compare import plot
from fastdit.apps.compare.machine import BUSY
from fastdit.apps.compare.recorded import worst
from fastdit.apps.compare.timed import Comparison, Timed, Variant, finite
from fastdit.apps.render.media import contact_sheet, png
from fastdit.apps.render.outputs import Outputs, to_json
from fastdit.config import Config
from fastdit.reporting.report import short, table

if TYPE_CHECKING:
    from PIL.Image import Image

FILES = {"sheet": "compare-sheet.png", "plot": "compare-plot.png", "json": "compare.json"}
ROUGH = 0.25
"""Runs whose times differ by more give a rough factor."""
HEADS = (
    "",
    "best s",
    "median s",
    "spread",
    "speed",
    "whole s",
    "peak GB",
    "density",
    "velocity error",
    "PSNR",
    "SSIM",
    "flicker",
)


@dataclass
class ComparisonResult:
    """What `fastdit.compare` found. Printed, it begins with a verdict of one sentence.

    comparisons: one a call, with the clips and the report of each configuration (`.variants["fast"].report`). calls: their
    arguments, as JSON. configs: what was compared, by name. machine: versions and device. files: paths of "sheet", "plot" and
    "json", where they were written.
    """

    configs: dict[str, Config]
    repeats: int
    machine: dict[str, Any]
    calls: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Dense, then each configuration that was measured, over all calls.

        seconds, median_s: of the denoising loop, best and median run, summed over calls; whole_s: of the whole call; spread:
        (slowest − fastest) / fastest run, the widest, None for a single run; ratio: dense seconds over its own. peak_bytes: the
        most, of a GPU what PyTorch allocated, on a CPU the process's resident memory. density: share of all pairs of tokens.
        velocity_error: teacher-forced relative L2 of the worst phase, mean over calls; velocity: of each phase. psnr_db (None:
        equal to dense, or no frames), ssim, flicker (mean |x[f+1] − x[f]| minus dense's, for a range of 1), latent_error
        (relative L2 of the last latents): mean over calls. stayed_dense: why nothing was sparse, or None. runs: the fewest of a
        call. calls: number of them.
        """
        return rows_of(self.comparisons, self.configs)

    @property
    def verdict(self) -> str:
        """Speed and error of each configuration, in one sentence."""
        rows = self.rows[1:]
        if not rows:
            return "nothing was compared"
        reasons = {row["stayed_dense"] for row in rows}
        if len(reasons) == 1 and None not in reasons:
            return f"nothing was accelerated: {reasons.pop()}"
        return "; ".join(_said(row, self.rows[0]) for row in rows)

    @property
    def busy(self) -> str | None:
        """What to know if other processes took much of the processors' time; None if they did not."""
        most = max((share for each in self.comparisons for share in each.others), default=0.0)
        return f"busy machine: other processes took up to {most:.0%} of its processors' time" if most > BUSY else None

    def __str__(self) -> str:
        rows = self.rows
        if len(rows) < 2:
            return self.verdict
        dense = self.comparisons[0]
        tokens = "" if dense.tokens is None else f"{dense.tokens:,} tokens; "
        many = "" if len(self.comparisons) == 1 else f"{len(self.comparisons)} calls, seconds summed; "
        notes = [f"{many}{tokens}dense: stock diffusers with {dense.kernel}"] + ([self.busy] if self.busy else [])
        return "\n".join([self.verdict, *table([HEADS, *map(_cells, rows)]), *notes])

    def to_dict(self) -> dict[str, Any]:
        """For JSON. each: the rows of each call; others: share of the processors' time that other processes took, by run."""
        each = [
            {"call": call, "tokens": found.tokens, "others": found.others, "rows": rows_of([found], self.configs)}
            for call, found in zip(self.calls, self.comparisons, strict=False)
        ]
        first = self.comparisons[0].kernel if self.comparisons else None
        return {"verdict": self.verdict, "busy": self.busy, "repeats": self.repeats, "kernel": first, "rows": self.rows} | {
            "each": each,
            "machine": self.machine | {"cpu": cpu_name()},
        }

    def sheet(self) -> Image | None:
        """Frames of dense and of each configuration, one line each, call after call; None if nothing was decoded."""
        lines: list[tuple[str, Any]] = []
        for number, found in enumerate(self.comparisons, 1):
            which = "" if len(self.comparisons) == 1 else f"{number}: "
            timed: dict[str, Timed] = {"dense": found.dense} | found.variants
            lines += [(which + name, each.clip.all_frames) for name, each in timed.items() if each.clip.clips is not None]
        return contact_sheet(lines) if lines else None

    def plot(self) -> Image:
        """Velocity error against speed, one point a configuration that was accelerated."""
        points = [(row["name"], row["ratio"], row["velocity_error"]) for row in self.rows[1:] if row["stayed_dense"] is None]
        tokens = self.comparisons[0].tokens if self.comparisons else None
        return plot.error_against_speed(points, self.machine["pipeline"] + ("" if tokens is None else f", {tokens:,} tokens"))

    def save(self, folder: Path) -> dict[str, Path]:
        """Write compare.json, compare-sheet.png and compare-plot.png; files of these names are replaced. Sets and returns
        `files`. Raises UserError if the folder cannot be written."""
        found, sheet = self.to_dict(), self.sheet()
        contents = {"sheet": None if sheet is None else png(sheet, self.machine), "plot": png(self.plot(), self.machine)}
        contents["json"] = to_json(found)
        names = {what: FILES[what] for what, content in contents.items() if content is not None}
        with Outputs(folder, *names.values()) as files:
            for what, name in names.items():
                files[name].write_bytes(contents[what] or b"")
            files.publish()
        self.files = {what: folder / name for what, name in names.items()}
        return self.files


def rows_of(comparisons: Sequence[Comparison], configs: dict[str, Config]) -> list[dict[str, Any]]:
    """See `ComparisonResult.rows`."""
    if not comparisons:
        return []
    rows = [{"name": "dense", "ratio": 1.0, "density": 1.0, "velocity_error": 0.0, "stayed_dense": None, "config": None}
            | _times([(found, found.dense) for found in comparisons])]  # fmt: skip
    for name, config in configs.items():
        inside = [(found, found.variants[name]) for found in comparisons if name in found.variants]
        if not inside:
            continue
        variants = [variant for _, variant in inside]
        reasons = [variant.dense_because for variant in variants]
        row = {"name": name} | _times([(found, variant) for found, variant in inside])
        row |= {
            "ratio": sum(found.dense_seconds for found, _ in inside) / row["seconds"],
            "density": statistics.fmean(variant.report.density for variant in variants),
            "velocity_error": statistics.fmean(worst(variant.velocity) for variant in variants),
            "velocity": _phases(variants),
            "psnr_db": _mean([variant.psnr for variant in variants]),
            "ssim": _mean([variant.ssim for variant in variants]),
            "flicker": _mean([variant.flicker for variant in variants]),
            "latent_error": _mean([variant.latents for variant in variants]),
            "identical": all(variant.psnr == float("inf") or variant.latents == 0 for variant in variants),
            "stayed_dense": reasons[0] if None not in reasons else None,
            "config": config.to_dict(),
        }
        rows.append(row)
    return rows


def _times(timed: Sequence[tuple[Comparison, Timed]]) -> dict[str, Any]:
    spreads = [each.spread for _, each in timed if each.spread is not None]
    return {
        "seconds": sum(each.seconds for _, each in timed),
        "median_s": sum(each.median for _, each in timed),
        "spread": max(spreads, default=None),
        "whole_s": sum(found.whole(each) for found, each in timed),
        "peak_bytes": max(each.peak for _, each in timed),
        "runs": min(len(each.stages) for _, each in timed),
        "calls": len(timed),
    }


def _mean(values: Sequence[float]) -> float | None:
    """Of those that are finite."""
    known = [value for value in values if finite(value) is not None]
    return statistics.fmean(known) if known else None


def _phases(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The velocity errors of each phase, meaned over calls."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in (row for variant in variants for row in variant.velocity):
        found.setdefault((*row["sigma"], row["policy"]), []).append(row)
    return [
        rows[0] | {"error": statistics.fmean(row["error"] for row in rows), "steps": sum(row["steps"] for row in rows)}
        for rows in found.values()
    ]


def _said(row: dict[str, Any], dense: dict[str, Any]) -> str:
    name, ratio = f"`{row['name']}`", row["ratio"]
    if row["stayed_dense"] is not None:
        return f"{name} stayed dense: {row['stayed_dense']}"
    rough = max(row["spread"] or 0.0, dense["spread"] or 0.0) > ROUGH
    speed = (
        f"{'roughly ' * rough}{ratio:.1f} × faster"
        if ratio >= 1.05
        else "as fast as dense"
        if ratio > 0.95
        else f"slower ({ratio:.2f} ×)"
    )
    if row["identical"]:
        return f"{name}: {speed}, identical to dense"
    ssim = "" if row["ssim"] is None else f", SSIM {row['ssim']:.3f}".replace(" 0.", " .")
    return f"{name}: {speed} at velocity error {short(row['velocity_error'])}{ssim}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def number(name: str, form: str) -> str:
        return "" if row.get(name) is None else format(row[name], form)

    dense = row["stayed_dense"] is not None
    return (
        row["name"], number("seconds", ".2f"), number("median_s", ".2f"), number("spread", ".0%"),
        "stays dense" if dense else f"{row['ratio']:.2f} ×", number("whole_s", ".2f"), f"{row['peak_bytes'] / 2**30:.2f}",
        number("density", ".3f"), short(row["velocity_error"]), "equal" if row.get("identical") else number("psnr_db", ".1f"),
        number("ssim", ".3f"), number("flicker", "+.4f"),
    )  # fmt: skip
