"""Keep fastdit's ops out of CUDA graphs: an op that decides on the host must not be captured and replayed."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

_TAG = getattr(torch.Tag, "cudagraph_unsafe", None)
STAYS_OUT: dict[str, Any] = (
    {"tags": (_TAG,)} if _TAG is not None and "tags" in inspect.signature(torch.library.custom_op).parameters else {}
)
"""Arguments of `torch.library.custom_op`: Inductor splits the graph at the op, captures the parts between ops, and runs the op
itself at every step."""


def refuse_capture() -> None:
    """Raise RuntimeError if the op being traced would be captured nevertheless. Called from fake kernels."""
    inductor: Any = sys.modules.get("torch._inductor.config")
    if inductor is None or not inductor.triton.cudagraphs:
        return
    if not (STAYS_OUT and getattr(inductor, "graph_partition", False)):
        raise RuntimeError(
            "fastdit decides at every step what to compute, which a CUDA graph would replay as it was captured. Use"
            ' torch.compile without mode="reduce-overhead" and "max-autotune" ("max-autotune-no-cudagraphs" is fine), or a'
            " PyTorch that can leave an op out of the graph (2.9 or newer, torch._inductor.config.graph_partition on)"
        )
