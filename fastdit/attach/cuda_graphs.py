"""fastdit's ops and CUDA graphs: an op that decides on the host must stay outside of what is captured and replayed."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

_TAG = getattr(torch.Tag, "cudagraph_unsafe", None)
STAYS_OUT: dict[str, Any] = (
    {"tags": (_TAG,)} if _TAG is not None and "tags" in inspect.signature(torch.library.custom_op).parameters else {}
)
"""For `torch.library.custom_op`: Inductor then cuts the graph at the op, captures what lies between two of them, and runs the
op itself at every step."""


def refuse_capture() -> None:
    """To be called while an op is traced. Raises RuntimeError where it would be captured all the same."""
    inductor: Any = sys.modules.get("torch._inductor.config")
    if inductor is None or not inductor.triton.cudagraphs:
        return
    if not (STAYS_OUT and getattr(inductor, "graph_partition", False)):
        raise RuntimeError(
            "fastdit decides at every step what to compute, which a CUDA graph would replay as it was captured. Use"
            ' torch.compile without mode="reduce-overhead" and "max-autotune" ("max-autotune-no-cudagraphs" is fine), or a'
            " PyTorch that can leave an op out of the graph (2.9 or newer, torch._inductor.config.graph_partition on)"
        )
