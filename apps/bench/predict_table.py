"""Predicted beside measured rows of docs/results: `python -m fastdit.apps.bench.predict_table --beside docs/statistics.md`.

Denoisers are built on the meta device from the configurations of diffusers' classes; nothing is loaded and nothing runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

import fastdit
from fastdit import Config
from fastdit.apps.bench import gpu_denoisers
from fastdit.apps.bench.markdown import write_block
from fastdit.prediction.forecast import Prediction

TOLERANCE = 0.12
"""Of ratios and seconds of a dense step, predicted against measured."""
BEGIN, END = "<!-- predicted -->", "<!-- /predicted -->"


class Clip:
    """As much of a video pipeline as `predict` reads."""

    def __init__(self, model: Any, scheduler: Any, scale: tuple[int, int]) -> None:
        self.transformer, self.scheduler = model, scheduler
        self.vae_scale_factor_temporal, self.vae_scale_factor_spatial = scale

    def __call__(self, num_frames: int = 81, guidance_scale: float = 5.0, max_sequence_length: int = 512) -> None:
        raise NotImplementedError


def on_meta(cls: str, **config: Any) -> Any:
    """A denoiser without weights, bfloat16."""
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


def unipc(shift: float) -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


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
        self.timesteps = torch.tensor(timesteps, dtype=torch.float64)
        self.config: dict[str, Any] = {}

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastdit.apps.bench.predict_table", description="Predicted beside measured.")
    parser.add_argument("--beside", type=Path, required=True, help="Markdown file with a block for the table")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the rows")
    args = parser.parse_args(argv)
    write_block(args.beside, BEGIN, END, markdown(recorded(args.results)))


if __name__ == "__main__":
    main()
