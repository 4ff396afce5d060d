"""`fastdit show`: pictures of tile maps, schedules step by step, and the pages that are made from measurements."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdit import Config, preset
from fastdit.apps.bench.markdown import around_block, write_block
from fastdit.apps.cli.list import about
from fastdit.apps.errors import UserError
from fastdit.apps.render.text import decode
from fastdit.apps.sizes import parse_size
from fastdit.pipelines import embedded
from fastdit.policies import policy_from_dict as from_dict
from fastdit.schedule import noise_levels, schedule

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastdit.core.layout import Layout
    from fastdit.policies import Policy

SIZE = 480
"""Side of a map in pixels, unless it has more tiles."""
BEGIN, END = "<!-- policies -->", "<!-- /policies -->"


def show_policy(
    name: Annotated[str, typer.Argument(help="A policy, such as window or radial.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG to write.")] = None,
    grid: Annotated[str, typer.Option(help="Grid of tokens: time x height x width.")] = "9x16x16",
    tile: Annotated[str, typer.Option(help="Tokens of a tile.")] = "1x4x4",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the policy, such as density=0.125; may be repeated.")
    ] = None,
    sigma: Annotated[float, typer.Option(help="Noise level of the attention that dynamic policies are given.")] = 0.6,
) -> None:
    """Draw the tiles that a policy keeps. Dynamic policies are given the embedded model's attention."""
    from fastdit.core.layout import Layout

    try:
        layout = Layout(parse_size(grid, "--grid"), parse_size(tile, "--tile"))
        policy = make(name, options or [])
    except ValueError as error:
        raise UserError(str(error), 2) from None
    image, density = draw(policy, layout, sigma)
    path = out or Path(f"{name}.png")
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): choose another file with --out") from None
    typer.echo(f"{path}: {policy} keeps {density:.1%} of the {layout.video_tiles:,}² pairs of tiles")


def show_schedule(
    name: Annotated[str, typer.Argument(help="A preset, or a JSON file of a configuration.")],
    steps: Annotated[int, typer.Option(help="Steps of the run.")] = 20,
    shift: Annotated[float, typer.Option(help="Flow shift of the scheduler: 5 for Wan, 7 for HunyuanVideo.")] = 5.0,
    layers: Annotated[int, typer.Option(help="Attention layers of the denoiser.")] = 30,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG: step by layer, a colour for each phase.")] = None,
) -> None:
    """Print what runs at each step: dense, sparse, or sparse with statistics."""
    from fastdit.reporting import heatmap

    try:
        file = Path(name)
        config = Config.from_dict(json.loads(decode(file.read_bytes()))) if file.suffix == ".json" else preset(name)
        if layers < 1:
            raise ValueError(f"--layers must be at least 1, got {layers}")
        entries = schedule(config, noise_levels(steps, shift), layers)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}", 2) from None
    except ValueError as error:  # invalid JSON, or an invalid configuration
        raise UserError(str(error), 2) from None
    for entry in entries:
        where = "" if entry.layers == (0, layers) else f"  layers {entry.layers[0]}-{entry.layers[1] - 1}"
        typer.echo(f"step {entry.step:3d}  noise level {entry.sigma:.3f}{where}  {entry.what}")
    for high, low in config.gaps():
        typer.echo(f"no phase names noise levels from {high:g} to {low:g}: attention is dense there")
    if out is not None:
        order = list(dict.fromkeys(entry.what for entry in entries))
        points = [(e.step, layer, float(order.index(e.what))) for e in entries for layer in range(*e.layers)]
        image = heatmap.draw(points, "kind of step", layers)
        try:
            image.save(out, format="PNG")
        except OSError as error:
            raise UserError(f"cannot write {out} ({error.strerror or error}): choose another file with --out") from None
        typer.echo(f"{out}: " + "; ".join(f"{i} {what}" for i, what in enumerate(order)))


def show_gallery(
    docs: Annotated[Path, typer.Option(help="Folder with policies.md, statistics.md and results/.")] = Path("docs"),
) -> None:
    """Draw every policy into DOCS/policies/ and write the measured tables into DOCS/policies.md and DOCS/statistics.md."""
    from fastdit.core.layout import Layout
    from fastdit.policies import POLICIES

    around_block(docs / "policies.md", BEGIN, END)  # fails before a minute of drawing
    folder = docs / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["| | policy | of all pairs |", "|---|---|--:|"]
    for name in POLICIES:
        policy = make(name, [])
        image, density = draw(policy, Layout((9, 16, 16), (1, 4, 4)), 0.6)
        image.quantize(16).save(folder / f"{name}.png", optimize=True)
        lines.append(f'| <img src="policies/{name}.png" width="220"> | **{policy}**<br>{about(type(policy))} | {density:.0%} |')
    results = docs / "results"
    costs = cost(results / "selection.json", results / "gpu_selection.json")
    text = "\n".join([*lines, "", *quality(results / "policies.json"), "", *costs])
    write_block(docs / "policies.md", BEGIN, END, text)
    write_block(docs / "statistics.md", "<!-- reuse -->", "<!-- /reuse -->", statistics(docs / "results" / "reuse.json"))
    typer.echo(f"{docs / 'policies.md'}: {len(POLICIES)} pictures and two tables; {docs / 'statistics.md'}: one table")


def make(name: str, options: list[str]) -> Policy:
    """Make a policy by name, with fields from "key=value". A missing density is 1/4.

    Raises ValueError for an unknown name or field, or a value that does not fit.
    """
    from fastdit.policies import POLICIES, HeadProfile, Intersect, Radial, SpatialTemporal, TopMass, Union, Window

    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--set wants key=value, got {option!r}")
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
    known = {field.name for field in fields(POLICIES[name])} if name in POLICIES else set()
    if not given and "density" in known:
        given = {"density": 0.25}
    if not given and name == "union":
        return Union((Window(size=(3, 1, 1)), Window(size=(1, 3, 3))))
    if not given and name == "intersect":
        return Intersect((Window(size=(3, 4, 4)), SpatialTemporal(density=0.3)))
    if not given and name == "head_profile":
        return HeadProfile((Window(density=0.25), Radial(density=0.25), TopMass(density=0.25)), (0, 1, 2, 0))
    if not given and name == "stripe":
        given = {"theta": 0.0}
    return from_dict({"name": name} | given)


def draw(policy: Policy, layout: Layout, sigma: float) -> tuple[Image, float]:
    """The map as a picture, and its density. Queries run down and keys to the right, in tile order; colour: share of heads."""
    import torch
    from PIL import Image

    from fastdit.reporting.heatmap import colour

    kept = policy.select(layout, *(() if policy.static else attention_of(layout, sigma))).float().mean((0, 1))
    scale = max(1, SIZE // kept.shape[-1])
    shades = torch.tensor([colour(i / 255) for i in range(256)], dtype=torch.uint8)
    picture = shades[(kept * 255).long()].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray(picture.numpy()), float(kept.mean())


def attention_of(layout: Layout, sigma: float) -> tuple[Any, ...]:
    """q, k and v of the embedded model's middle layer for one clip, in tile order."""
    import torch

    from fastdit.apps.tiny.attention import add_noise, clean_latents, recorded_attention

    t, h, w = layout.grid
    with torch.no_grad():
        inputs = clean_latents(embedded.load(), 1, ((t - 1) * 4 + 1, h * 8, w * 8))
        return recorded_attention(embedded.load(), add_noise(*inputs, sigma, 0), layout.tile)[3]


def quality(path: Path) -> list[str]:
    """Markdown of the rows that `fastdit.apps.bench.quality.policy_table` wrote."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows: dict[str, dict[tuple[float, str], Any]] = {}
    for row in measured["rows"]:
        rows.setdefault(row["policy"], {})[row["asked"], row["remainder"]] = row
    asked = sorted({row["asked"] for row in measured["rows"]}, reverse=True)
    heads = " | ".join(f"{density:g} | retained | + pooled" for density in asked)
    lines = [
        f"Velocity error (relative L2, mean over noise levels .9, .6, .3), {measured['clips']} clips × {measured['seeds']} "
        f"seeds, {measured['tokens']:,} tokens, tiles of {'×'.join(map(str, measured['tile']))}:",
        "",
        f"| policy, at density | {heads} |",
        "|---" + "|--:" * 3 * len(asked) + "|",
    ]
    middle = asked[len(asked) // 2]
    for name, cells in sorted(rows.items(), key=lambda item: item[1][middle, "none"]["error"]):
        text = []
        for density in asked:
            none, pooled = cells[density, "none"], cells[density, "pooled"]
            text.append(f"{none['error']:.3f} | {none['retained']:.2f} | {pooled['error']:.3f}")
        lines.append(f"| {name} | {' | '.join(text)} |")
    for remainder in ("sampled", "stripes"):
        found = [
            f"{name} {', '.join(format(cells[d, remainder]['error'], '.3f') for d in asked)}"
            for name, cells in rows.items()
            if (middle, remainder) in cells
        ]
        lines += ["", f"With the remainder `{remainder}` at the same densities: {'; '.join(found)}."] if found else []
    return lines


def cost(cpu: Path, gpu: Path) -> list[str]:
    """Markdown of the rows of `fastdit.apps.bench.quality.selection_cost` on a CPU and of `fastdit bench gpu` on a GPU."""
    rows, others = (json.loads(path.read_text(encoding="utf-8")) for path in (cpu, gpu))
    there = {row["policy"]: row["of dense"] for row in others["rows"]}
    lines = [
        "Time to choose tiles, of dense attention's:",
        "",
        "| policy | two CPU cores, 9,216 tokens | H200, 75,600 tokens |",
        "|---|--:|--:|",
    ]
    found = ((row["policy"], row["of dense"]) for row in rows if row["policy"] != "dense")
    return [*lines, *(f"| {name} | {share:.1%} | {there[name]:.1%} |" for name, share in found)]


def statistics(path: Path) -> str:
    """Markdown of the rows that `fastdit.apps.bench.quality.reuse_table` wrote."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows = {(row["arm"], row["asked"]): row for row in measured["rows"]}
    densities = sorted({asked for arm, asked in rows if arm == "sparse only"}, reverse=True)
    lines = [
        f"{measured['clips']} clips of {measured['size']} ({measured['tokens']:,} tokens), {measured['steps']} steps, dense at "
        f"one step in {measured['refresh']}. Relative error of the last latents, and of the velocity at the dense ones; "
        f"seconds of a clip ({measured['device']}, dense {rows['dense', 1.0]['seconds']:.2f}):",
        "",
        "| what is remembered | " + " | ".join(f"window {density:g}" for density in densities) + " |",
        "|---" + "|--:" * len(densities) + "|",
    ]
    for arm in dict.fromkeys(arm for arm, _ in rows if arm != "dense"):
        cells = [rows.get((arm, density)) or rows[arm, 0.0] for density in densities]
        text = [f"{row['final']:.2f}, {row['forced']:.3f}; {row['seconds']:.2f}" for row in cells]
        lines.append(f"| {arm} | {' | '.join(text)} |")
    return "\n".join(lines)
