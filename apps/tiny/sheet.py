"""Contact sheets of clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def sheet(videos: Sequence[Tensor], path: Path, columns: int = 4, shots: int = 4) -> None:
    """A PNG with `shots` frames of each clip side by side."""
    from PIL import Image

    strips = []
    for v in videos:
        picks = torch.linspace(0, v.shape[1] - 1, shots).round().long()
        strips.append(F.pad(torch.cat([v[:, f] for f in picks], 2), (0, 4, 0, 4), value=1.0))
    strips += [torch.ones_like(strips[0])] * (-len(strips) % columns)
    rows = [torch.cat(strips[i : i + columns], 2) for i in range(0, len(strips), columns)]
    pixels = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)
