"""The text-to-video pipeline that ships with the package: a WanPipeline of 26 MB that draws solids on floors.

It was trained by `fastdit.apps.tiny.world.train`; `assets/tiny/MODEL.md` says what it understands and how well. It draws in
`STEPS` steps without guidance; with more steps and guidance 2 it draws outlines a little more exactly.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import WanPipeline

PATH = Path(__file__).resolve().parents[1] / "assets" / "tiny"
VOCABULARY = "vocabulary.txt"
"""In a pipeline's folder: every word that the model met in training, and small words that ask for nothing, one a line."""
PROMPT = "a red ball moving right on a checkered floor"
SIZE = (33, 256, 256)
"""Frames, height and width of a usual clip."""
STEPS, GUIDANCE = 8, 1.0


def load(path: str | Path | None = None) -> WanPipeline:
    """The embedded pipeline (or a retrained one in `path`), float32, on the CPU, without touching the network."""
    import torch
    from diffusers import WanPipeline

    folder = PATH if path is None else Path(path)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline in {folder}: model_index.json is missing; train one with fastdit.apps.tiny.world.train"
        )
    return WanPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def unknown_words(prompt: str, path: str | Path | None = None) -> list[str]:
    """The words of a prompt that the embedded model (or the one in `path`) does not know, in their order, each once.

    Without a vocabulary in the folder nothing is known about its words: then []. Example: `unknown_words("a red cat")` is
    `["cat"]`.
    """
    known = _vocabulary(PATH if path is None else Path(path))
    return [] if known is None else list(dict.fromkeys(w for w in words_of(prompt) if w not in known))


@lru_cache(maxsize=8)
def _vocabulary(folder: Path) -> frozenset[str] | None:
    file = folder / VOCABULARY
    return frozenset(file.read_text(encoding="utf-8").split()) if file.is_file() else None
