"""The text-to-video pipeline that ships with the package: a WanPipeline of 12 MB that draws moving coloured shapes.

It was trained by `fastdit.apps.tiny.train`; `assets/tiny/MODEL.md` says what it understands and how well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import WanPipeline

PATH = Path(__file__).resolve().parents[1] / "assets" / "tiny"


def load(path: str | Path | None = None) -> WanPipeline:
    """The embedded pipeline (or a retrained one in `path`), float32, on the CPU, without touching the network."""
    import torch
    from diffusers import WanPipeline

    folder = PATH if path is None else Path(path)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no pipeline in {folder}: model_index.json is missing; train one with fastdit.apps.tiny.train")
    return WanPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
