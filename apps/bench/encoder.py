"""`fastdit bench encoder`: encoder propagation on the UNet of Stable Diffusion 1.5, into JSON rows; for docs/encoder.md.

Weights are random: no time depends on them. Two measurements. *forward*: one call of each kind, in turns, the best of several.
*loop*: DDIM runs, stock and propagated taking turns step by step, with scheduler and guidance; a row says how far it came.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdit.apps.bench.markdown import cpu_name, write_block
from fastdit.apps.errors import UserError
from fastdit.apps.render.outputs import write_json

BEGIN, END = "<!-- bench:encoder -->", "<!-- /bench:encoder -->"
TOLERANCE = 1e-4
"""Relative error of single precision results that differ in the order of sums."""
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SDXL: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
"""Differences from the defaults of UNet2DConditionModel. SDXL's embedding of picture sizes is omitted: it costs nothing."""
MODELS = {"SD 1.5": SD15, "SDXL": SDXL}


def bench_encoder(
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file; parts that are not measured now are kept.")] = Path(
        "docs/results/encoder_cpu.json"
    ),
    size: Annotated[int, typer.Option(help="Side of the latents: 64 is 512 x 512 pixels.")] = 32,
    steps: Annotated[int, typer.Option(help="DDIM steps of the loop; 0: no loop.")] = 50,
    repeats: Annotated[int, typer.Option(help="Repeats of each kind of forward; 0: none.")] = 3,
    together: Annotated[int, typer.Option(help="Steps decoded in one call, for the row of batched decoding.")] = 4,
    guidance: Annotated[bool, typer.Option(help="Two branches in one batch.")] = True,
    table: Annotated[
        Path | None, typer.Option("--table", help="Measure nothing: write the rows into this Markdown file.")
    ] = None,
) -> None:
    """Measure encoder propagation on Stable Diffusion 1.5's UNet, or write the table of what was measured."""
    rows: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if table is not None:
        write_block(table, BEGIN, END, "\n".join(lines(rows)))
        return
    import torch

    for name, config in MODELS.items():
        for side in (config["sample_size"] // 2, config["sample_size"]):
            rows[f"operations {name} {side}x{side}"] = {"model": name, "size": side} | operations(config, side)
    write_json(out, rows)
    if not repeats and not steps:
        return
    model = unet()
    batch = 2 if guidance else 1
    facts = {
        "device": cpu_name() if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "clock": "wall" if torch.cuda.is_available() else "CPU time",
        "date": datetime.date.today().isoformat(),
        "batch": batch,
        "size": size,
    }
    with torch.inference_mode():
        if repeats:
            for row in forwards(model, size, batch, repeats, together):
                rows[f"forward {size}x{size}, batch {batch}"] = facts | row
                write_json(out, rows)
        if steps:
            for row in loop(model, size, batch, steps):
                rows[f"loop {size}x{size}, batch {batch}, {steps} steps"] = facts | row
                write_json(out, rows)


def forwards(model: Any, size: int, batch: int, repeats: int, together: int) -> Any:
    """Seconds of each kind of forward, after every round. Raises UserError if a result is wrong."""
    import torch

    from fastdit.core.reference import relative_error

    pipeline = Schedule(50)
    levels = iter(pipeline.scheduler.timesteps)
    x, text = torch.randn(batch, 4, size, size, device=model.device), torch.randn(batch, 77, 768, device=model.device)
    plain, _ = propagated(model, (0,), joins=False)
    joined, _ = propagated(model, (0,))
    several, _ = propagated(model, (0,), batch=together, pipeline=pipeline)
    first = next(levels)
    stock = model(x, first, text)[0]
    for one in (plain, joined, several):
        if not torch.equal(one(x, first, text)[0], stock):
            raise UserError("a key step differs from the stock model: not measured", 1)
    best: dict[str, float] = {}
    for i in range(repeats):
        now = [next(levels) for _ in range(together)]
        seconds = {}
        seconds["stock"], _ = _timed(partial(model, x, now[0], text))
        seconds["decoder alone"], expected = _timed(partial(plain, x, now[0], text))
        seconds["decoder, skips convolved once"], found = _timed(partial(joined, x, now[0], text))
        steps = [_timed(partial(several, x, level, text)) for level in now]
        seconds[f"the same, {together} steps in a batch"] = sum(took for took, _ in steps) / together
        for answer in (found[0], steps[0][1][0]):
            if relative_error(answer, expected[0]) > TOLERANCE:
                raise UserError("two ways to decode differ: not measured", 1)
        best = {name: min(best.get(name, math.inf), value) for name, value in seconds.items()}
        print("  ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), flush=True)
        yield {"rounds": i + 1, "seconds": best}


def loop(model: Any, size: int, batch: int, steps: int) -> Any:
    """Seconds of a run so far, after every step: stock, and with the paper's key steps, decoded one by one and in batches."""
    import torch

    from fastdit.encoder_reuse.propagate import KEY_STEPS

    text = torch.randn(batch, 77, 768, device=model.device)
    pipeline = Schedule(steps)
    found, handle = propagated(model, KEY_STEPS)
    arms = {"stock": model, "propagated": found, "in batches": propagated(model, KEY_STEPS, batch=None, pipeline=pipeline)[0]}
    schedules = {name: Schedule(steps).scheduler for name in arms} | {"in batches": pipeline.scheduler}
    latents = dict.fromkeys(arms, torch.randn(1, 4, size, size, device=model.device))
    seconds = dict.fromkeys(arms, 0.0)
    for i, level in enumerate(schedules["stock"].timesteps):
        for name in list(arms)[:: (-1) ** i]:  # so that none is always first

            def one(name: str = name, level: Any = level) -> Any:
                noise = arms[name](latents[name].repeat(batch, 1, 1, 1), level, text)[0]
                if batch == 2:
                    noise = noise[:1] + 7.5 * (noise[1:] - noise[:1])
                return schedules[name].step(noise, level, latents[name]).prev_sample

            took, latents[name] = _timed(one)
            seconds[name] += took
        print(f"step {i + 1}: " + "  ".join(f"{name} {value:.1f} s" for name, value in seconds.items()), flush=True)
        yield {"done": i + 1, "steps": steps, "keys": handle.counts.encoder, "seconds": dict(seconds)}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and the result. On a CPU these are seconds of CPU time, which other processes hardly lengthen."""
    import torch

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, found


def lines(rows: dict[str, Any]) -> list[str]:
    """The tables of docs/encoder.md."""
    counted = [row for row in rows.values() if "seconds" not in row]
    found = ["| operations of a step between, of a full one | decoder alone | 50 steps | skips convolved once | 50 steps |"]
    found += ["|---|--:|--:|--:|--:|"]
    for row in counted:
        shares = [row[name] for name in ("decoder alone", "skips convolved once")]
        cells = " | ".join(f"{share:.2f} | {speedup(share):.2f}×" for share in shares)
        found.append(f"| {row['model']}, {8 * row['size']}×{8 * row['size']} | {cells} |")
    found.append("")
    for row in rows.values():
        if row in counted:
            continue
        where = (
            f"{8 * row['size']}×{8 * row['size']} pixels, {'with' if row['batch'] == 2 else 'no'} guidance, {row['clock']}, "
            f"{row['threads']} thread{'s' * (row['threads'] > 1)} of {row['device']}"
        )
        seconds = row["seconds"]
        if "done" not in row:
            found += [f"One forward, {where}, best of {row['rounds']}:", ""]
            found += ["| forward | seconds | of stock | 50 steps |", "|---|--:|--:|--:|"]
            for name, share in ((name, value / seconds["stock"]) for name, value in seconds.items()):
                found.append(f"| {name} | {seconds[name]:.2f} | {share:.2f} | {speedup(share):.2f}× |")
        else:
            times = ", ".join(f"{name} {value:.0f} s ({seconds['stock'] / value:.2f}×)" for name, value in seconds.items())
            found.append(f"{row['done']} of {row['steps']} DDIM steps, {row['keys']} of them key steps, {where}: {times}.")
        found.append("")
    return found[:-1]


def speedup(share: float) -> float:
    """Speedup of 50 steps with the paper's key steps, if each other step takes this share of a full one."""
    from fastdit.encoder_reuse.propagate import KEY_STEPS

    return 50 / (len(KEY_STEPS) + (50 - len(KEY_STEPS)) * share)


def unet() -> Any:
    """The UNet with random weights, filled here: the layers' own initialisation of 860 million numbers takes minutes."""
    import torch

    model = twin(None).to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.uniform_(-1, 1).mul_(1 / math.sqrt(parameter[0].numel()))
    return model


def operations(config: dict[str, Any], size: int) -> dict[str, float]:
    """Floating point operations of a step between key steps, as shares of a full step, counted on tensors without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    with torch.inference_mode():
        x = torch.zeros(1, 4, size, size, device="meta")
        text = torch.zeros(1, 77, config["cross_attention_dim"], device="meta")
        for name, joins in (("decoder alone", False), ("skips convolved once", True)):
            model, _ = propagated(None, (0,), joins=joins, config=config)
            for time in (900, 800, 700):  # the second is the first step between key steps, which convolves the skips
                with FlopCounterMode(display=False) as counter:
                    model(x, torch.tensor(time), text)
                counts["full" if time == 900 else name] = counter.get_total_flops()
    return {name: count / counts["full"] for name, count in counts.items() if name != "full"}


def twin(model: Any, config: dict[str, Any] = SD15) -> Any:
    """Another module with the same weights, so that hooks in one do not affect the other. None: no weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        found: Any = UNet2DConditionModel(**config)
    found.eval().requires_grad_(False)
    if model is not None:
        found.load_state_dict(model.state_dict(), assign=True)
    return found


def propagated(
    model: Any,
    keys: tuple[int, ...],
    joins: bool = True,
    batch: int | None = 1,
    pipeline: Any = None,
    config: dict[str, Any] = SD15,
) -> tuple[Any, Any]:
    """A twin with its encoder propagated, and the handle. joins: whether the convolutions of skips are kept too."""
    from fastdit.encoder_reuse.propagate import Propagation
    from fastdit.pipelines.encoder import encoder_of

    found = twin(model, config)
    handle = Propagation(keys, 0.0, batch, pipeline)
    encoder = encoder_of(found)
    handle.install(found, encoder if joins else encoder._replace(joins=[]))
    return found, handle


class Schedule:
    """What `Propagation` needs of a pipeline: a scheduler."""

    def __init__(self, steps: int) -> None:
        import diffusers

        scheduler: Any = diffusers.DDIMScheduler
        self.scheduler = scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
        self.scheduler.set_timesteps(steps)
