"""Seconds of a step: attention by its floating-point operations, and the rest by the shapes of the denoiser's modules.

    step = Σ_sites attention + linear FLOPs / rate + tokens · channels · layers · (norms, activations …)
    attention   dense 4·N²·H·D / rate;  sparse 4·pairs·H·D / rate + packing, pairs those in kept tiles with their padding

A refresh is a dense call and a sparse one. On a GPU a step takes at least what the host needs to launch it. Selection by
policies that read q and k, and encoders and decoders, are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import nn

from fastdit.core.block_mask import density
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.planning.forward_plan import complete
from fastdit.policies import Policy
from fastdit.prediction.cards import PCIE, Rates

ONE = ("time", "guidance", "pooled", "norm", "adaln", "modulation")
"""In names of modules that see one row a sample, and of those that see the text's."""
TEXT = ("text", "caption", "context", "add_", "attn2.to_k", "attn2.to_v")
SOUND = ("audio",)
POOLED = 1.17
"""A sparse call with pooled tiles over one without (docs/results/gpu_remainder.json)."""
MOST_TILES = 8192
"""Larger tile maps are not made and counted."""


@dataclass(frozen=True)
class Call:
    """One call of a site: tokens N, heads H, channels D of a head. how: "dense", "sparse", "refresh" or "reuse". pairs: in kept
    tiles, over N². host: bytes of a residual that has to come from the host."""

    tokens: int
    heads: int
    head_dim: int
    how: str = "dense"
    pairs: float = 1.0
    quant: Quant = field(default_factory=Quant)
    pooled: bool = False
    broadcast: bool = False
    host: int = 0

    def turned(self, how: str, host: int = 0) -> Call:
        return replace(self, how=how, host=host)


def attention_seconds(call: Call, rates: Rates) -> float:
    full = 4 * call.tokens**2 * call.heads * call.head_dim
    elements = call.tokens * call.heads * call.head_dim
    faster = (1.0, 1.0) if call.quant.is_none else rates.eight_bits
    if call.how == "dense":
        return full / rates.attention / faster[1]
    sparse = full * call.pairs / rates.sparse / faster[0] * (POOLED if call.pooled else 1) + elements * rates.packing
    moved = elements * rates.residual + call.host / PCIE
    if call.how == "sparse":
        return sparse
    if call.how == "reuse":
        return moved if call.broadcast else sparse + moved
    return full / rates.attention * rates.with_lse + (0 if call.broadcast else sparse) + moved


def rest_seconds(model: nn.Module, tokens: int, text: int, layers: int, width: int, crosses: int, rates: Rates) -> float:
    """Everything of a forward of one sample but its sites. crosses: number of cross-attentions to the text."""
    cross = 4 * tokens * text * width * crosses
    return linear_flops(model, tokens, text) / rates.linear + cross / rates.attention + tokens * width * layers * rates.other


def linear_flops(model: nn.Module, tokens: int, text: int) -> int:
    """Of all linear layers and convolutions into tokens, by their shapes; sound's are left out."""
    total = 0
    for name, module in model.named_modules():
        if any(part in name for part in SOUND):
            continue
        rows = 1 if any(part in name for part in ONE) else text if any(part in name for part in TEXT) else tokens
        total += 2 * rows * _weights(module)
    return total


def _weights(module: Any) -> int:
    rows, columns = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return rows * columns  # also of quantized layers, whose weight has another shape
    return module.weight.numel() if isinstance(module, (nn.Conv2d, nn.Conv3d)) else 0


@lru_cache(maxsize=64)
def kept(policy: Policy, layout: Layout, first_frame: bool) -> tuple[float, float] | None:
    """(share of query-key pairs, the same with padding: pairs in kept tiles over N²) of a static policy; None: it has too many
    tiles to count."""
    if layout.num_tiles > MOST_TILES:
        return None
    tiles = complete(policy.select(layout), layout, first_frame)
    order = layout.order(tiles.device)
    inside = float(tiles.float().mean()) * order.numel() ** 2 / layout.length**2
    return float(density(tiles, order, order)), inside
