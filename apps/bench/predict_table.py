"""Predicted, not run: `python -m fastdit.apps.bench.predict_table --out docs/predicted.md` (card × model → preset, memory, ratio),
and `--beside docs/statistics.md`: predictions beside the measured rows of docs/results.

Denoisers are built on the meta device from the configurations of diffusers' classes; nothing is loaded and nothing runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastdit
from fastdit import Config
from fastdit.apps.bench import gpu_denoisers
from fastdit.apps.bench.markdown import write_block
from fastdit.prediction.cards import CARDS
from fastdit.prediction.predict import Prediction

TOLERANCE = 0.12
"""Of ratios and seconds of a dense step, predicted against measured."""
BEGIN, END = "<!-- predicted -->", "<!-- /predicted -->"
BITS = (("bfloat16", 1.0), ("FP8", 0.5), ("GGUF Q4", 4.5 / 16))
"""Forms of the weights, and their share of bfloat16's bytes."""
OFFERED = ("RTX 4070", "RTX 4080", "RTX 4090", "RTX 5090", "L40S", "H100")
"""12, 16, 24, 32, 48 and 80 GB."""
P480, P720 = (480, 832), (720, 1280)


class Clip:
    """As much of a video pipeline as `predict` reads."""

    def __init__(self, model: Any, scheduler: Any, scale: tuple[int, int], second: Any = None) -> None:
        self.transformer, self.scheduler = model, scheduler
        self.vae_scale_factor_temporal, self.vae_scale_factor_spatial = scale
        if second is not None:
            self.transformer_2, self.config = second, argparse.Namespace(boundary_ratio=0.875)

    def __call__(self, num_frames: int = 81, guidance_scale: float = 5.0, max_sequence_length: int = 512) -> None:
        raise NotImplementedError


def on_meta(cls: str, **config: Any) -> Any:
    """A denoiser without weights, bfloat16."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, cls)(**config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def wan(layers: int, heads: int, ffn: int, **more: Any) -> Any:
    return on_meta(
        "WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn,
        num_layers=layers, **{"text_dim": 4096, "freq_dim": 256} | more,
    )  # fmt: skip


def flow(shift: float, **more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, **more)


def unipc(shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@dataclass(frozen=True)
class Beside:
    """One measured row and what is predicted for it. Seconds: of a dense step, None: not compared. peak: GB."""

    device: str
    model: str
    config: str
    ratio: float
    density: float
    dense_seconds: float | None
    peak: float | None
    predicted_ratio: float
    predicted_density: float
    predicted_seconds: float | None
    predicted_bytes: int

    def __str__(self) -> str:
        return f"{self.device}, {self.model}, {self.config}"


def recorded(results: Path) -> list[Beside]:
    """The rows of denoisers on GPUs and of the CPU's benchmark, predicted."""
    return [*_on_gpus(results), *_on_cpu(results)]


def _on_gpus(results: Path) -> Iterator[Beside]:
    for file in ("gpu_denoisers.json", "gpu_denoisers_h100.json"):
        measured = json.loads((results / file).read_text(encoding="utf-8"))
        for name, (layers, heads, ffn, latent) in gpu_denoisers.SHAPES.items():
            pipe = Clip(wan(layers, heads, ffn), Levels([]), (4, 8))
            for row in (row for row in measured["rows"] if row["model"] == name):
                config, levels = gpu_denoisers.configs()[row["config"]]
                pipe.scheduler = Levels(levels)
                found = fastdit.predict(
                    pipe, 8 * latent[1], 8 * latent[2], 81, len(levels), config, gpu=measured["device"], guidance=1.0
                )
                yield _beside(measured["device"], row, found)


def _on_cpu(results: Path) -> Iterator[Beside]:
    """Of the embedded model of that day, which was smaller."""
    pipe = Clip(
        on_meta(
            "WanTransformer3DModel", patch_size=(1, 1, 1), num_attention_heads=3, attention_head_dim=64, ffn_dim=768,
            num_layers=6, in_channels=48, out_channels=48, text_dim=128, freq_dim=128,
        ), unipc(5.0), (4, 8),
    )  # fmt: skip
    for row in json.loads((results / "bench_cpu.json").read_text(encoding="utf-8"))["rows"]:
        if row["stayed_dense"]:
            continue
        frames, height, width = map(int, row["shape"].split("x"))
        found = fastdit.predict(pipe, height, width, frames, row["steps"], Config.from_dict(row["config"]), gpu="cpu")
        yield _beside("CPU", row | {"model": "embedded, flat", "config": f"preset {row['preset']}"}, found)


class Levels:
    """A scheduler of given timesteps."""

    def __init__(self, timesteps: list[int]) -> None:
        self.timesteps, self.config = torch.tensor(timesteps, dtype=torch.float64), {}

    def set_timesteps(self, steps: int, device: str) -> None:
        """They stay as they are."""


def _beside(device: str, row: dict[str, Any], found: Prediction) -> Beside:
    one = found.forecasts[0]
    assert one.ratio is not None
    assert one.density is not None
    dense = row["dense_ms"] / 1000 if "dense_ms" in row else None
    return Beside(
        device, row["model"], row["config"], row["ratio"], row["density"], dense, row.get("peak_gb"), one.ratio, one.density,
        found.step_seconds, one.gpu_bytes + one.host_bytes,
    )  # fmt: skip


def markdown(rows: list[Beside]) -> str:
    """Predicted beside measured."""
    lines = ["| device | denoiser | configuration | dense step, measured | predicted | ratio, measured | predicted |"]
    lines += ["|---|---|---|--:|--:|--:|--:|"]
    for row in rows:
        times = [f"{1000 * s:.0f} ms" if s is not None else "" for s in (row.dense_seconds, row.predicted_seconds)]
        ratios = [f"{ratio:.2f} ×" for ratio in (row.ratio, row.predicted_ratio)]
        lines.append(f"| {' | '.join([row.device, row.model, row.config, *times, *ratios])} |")
    worst = max(abs(row.predicted_ratio / row.ratio - 1) for row in rows)
    lines += ["", f"Largest difference of a ratio: {worst:.0%}; a test allows {TOLERANCE:.0%}."]
    return "\n".join(lines)


def models() -> dict[str, tuple[Any, int, dict[str, tuple[int, int]], dict[str, Any]]]:
    """(pipeline, frames, sizes, more for `predict`) by name."""
    big = {"480p": P480, "720p": P720}
    even = {"480p": P480, "720p": (704, 1280)}
    hunyuan = on_meta("HunyuanVideoTransformer3DModel")
    return {
        "Wan 1.3B": (Clip(wan(30, 12, 8960), unipc(5.0), (4, 8)), 81, big, {}),
        "Wan 14B": (Clip(wan(40, 40, 13824), unipc(5.0), (4, 8)), 81, big, {}),
        "Wan 2.2 A14B": (Clip(wan(40, 40, 13824), unipc(5.0), (4, 8), wan(40, 40, 13824)), 81, big, {}),
        "HunyuanVideo": (Clip(hunyuan, flow(7.0), (4, 8)), 129, big, {"guidance": 1.0, "text_tokens": 256}),
        "LTX-2": (Clip(on_meta("LTX2VideoTransformer3DModel"), flow(5.0), (8, 32)), 121, even, {"text_tokens": 1024}),
        "MiniMax-H3": (Clip(on_meta("MiniMaxH3Transformer3DModel"), flow(12.0), (4, 16)), 124, even, {"guidance": 1.0}),
    }  # fmt: skip


def table(steps: int = 50) -> str:
    """Card × model × size: the form of weights that fits, memory, and the ratio of the default preset and of `fast`."""
    lines = ["| card | model | clip | tokens | weights | statistics, `balanced` | `balanced` | `fast` |"]
    lines += ["|---|---|---|--:|--:|---|--:|--:|"]
    known = models()
    for name in OFFERED:
        card = CARDS[name]
        for model, (pipe, frames, sizes, more) in known.items():
            for clip, (height, width) in sizes.items():
                lines.append(f"| {name}, {card.memory:.0f} GB | {model} | {clip}, {frames} frames | "
                             f"{' | '.join(_cell(pipe, height, width, frames, steps, name, more))} |")  # fmt: skip
    return "\n".join(lines)


def _cell(pipe: Any, height: int, width: int, frames: int, steps: int, name: str, more: dict[str, Any]) -> list[str]:
    card = CARDS[name]
    for form, share in BITS:
        bare = fastdit.predict(pipe, height, width, frames, steps, "balanced", name, **more)
        one = bare.weights / 1e9 / (2 if hasattr(pipe, "transformer_2") else 1)  # the other one waits on the host
        # `predict` takes the bfloat16 weights off the memory it is given
        memory = card.memory + bare.weights / 1e9 - share * one
        found = {
            p: fastdit.predict(pipe, height, width, frames, steps, p, name, memory=memory, **more) for p in ("balanced", "fast")
        }
        if found["balanced"].free > 0:
            cell = found["balanced"].forecasts[0]
            speeds = [each.forecasts[0].speed for each in found.values()]
            return [f"{bare.tokens:,}", f"{form}, {share * one:.1f} GB", _statistics(cell), *speeds]
    return [f"{bare.tokens:,}", "on the host: not predicted", "", "unknown", "unknown"]


def _statistics(found: fastdit.Forecast) -> str:
    parts = [f"{size / 1e9:.1f} GB {where}" for size, where in ((found.gpu_bytes, "GPU"), (found.host_bytes, "host")) if size]
    forms = ", ".join(f"{form} × {count}" for form, count in found.forms)
    return f"{' + '.join(parts)} ({forms})" if parts else "none"


NOTE = """# Predicted, not run

Made by `python -m fastdit.apps.bench.predict_table --out {out}`, {steps} steps, on paper: nobody ran these. Weights are the
denoiser's alone, in the largest of bfloat16, FP8 and GGUF Q4 that leaves room for a forward of bfloat16 activations; text
encoder and autoencoder wait on the host, and so does Wan 2.2's other denoiser. The speed is of denoising, against dense
attention in bfloat16 on the same card. "measured" means that the rates were measured on that card, "estimated" that they are
an H100's, by published arithmetic and bandwidth. Statistics on the host need that much of its memory, page-locked.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastdit.apps.bench.predict_table", description="Predicted, not run.")
    parser.add_argument("--out", type=Path, help="Markdown file of the table by card and model")
    parser.add_argument("--beside", type=Path, help="Markdown file with a block for predictions beside measured rows")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the rows")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(argv)
    if args.beside is not None:
        write_block(args.beside, BEGIN, END, markdown(recorded(args.results)))
    if args.out is not None:
        args.out.write_text(NOTE.format(out=args.out, steps=args.steps) + "\n" + table(args.steps) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
