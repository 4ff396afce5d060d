"""What one attention call will do, with all axes of the configuration resolved: dense (and why), or a block mask.

Text, padding and each tile's own diagonal are this file's business and no policy's: every tile attends all text, text
attends everything, and a tile always attends itself. So a policy can cost quality but never break a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdit import ops
from fastdit.config import Config, Reuse
from fastdit.core.block_mask import BlockMask, density
from fastdit.core.byte_cache import ByteCache
from fastdit.core.layout import Grid, Layout, fit_tile
from fastdit.core.quant import Quant
from fastdit.kernels import launch
from fastdit.policies import Dense, Policy

MASK_BYTES = 256 << 20
"""Of static policies' block masks that one pipeline keeps: some 40 of a 14B model's at 720p."""


@dataclass(frozen=True, eq=False)
class Plan:
    """phase: index into `Config.phases`, None outside all of them. block_mask None: attend to every key.

    reason: why the call runs dense through the pipeline's own attention; None: it runs through `ops.attention`.
    """

    phase: int | None
    density: float
    block_mask: BlockMask | None
    quant: Quant
    reason: str | None
    remainder: str = "none"
    reuse: Reuse = field(default_factory=Reuse)


def layout_of(config: Config, grid: Grid, text_len: int = 0, text_first: bool = False) -> Layout:
    """The layout a configuration gives a grid: its own tile, cut to the grid, or one fitted to it."""
    tile = config.tile or fit_tile(grid, config.tile_tokens)
    t, h, w = (min(s, g) for s, g in zip(tile, grid, strict=True))
    return Layout(grid, (t, h, w), text_len, text_first)


def make_plan(
    config: Config,
    sigma: float,
    layer: int,
    layers: int,
    grid: Grid,
    text_len: int,
    text_first: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: tuple[BlockMask, float] | None = None,
    masks: ByteCache | None = None,
) -> Plan:
    """Resolve one call. q, k and v: [B, H, N, D] in token order (q may have fewer tokens than the sequence); layer: index
    among the denoiser's `layers` sites; known: block mask and density that a dynamic policy chose in an earlier step and that
    shall serve on; masks: where static policies' are kept."""
    phase = config.at(sigma, layer, layers)
    if phase is None:
        none = f"no phase for noise level {sigma:.3f} and layer {layer} of {layers}"
        return _dense(phase, none if config.phases else "the configuration is dense")
    policy, quant = config.phases[phase].policy, config.phases[phase].quant
    tokens = math.prod(grid) + text_len
    if k.shape[2] != tokens:
        return _dense(phase, f"{k.shape[2]} tokens where the denoiser's input makes {tokens}")
    if tokens < config.min_tokens:
        return _dense(phase, f"{tokens} tokens: below {config.min_tokens}, sparse attention does not pay")
    if isinstance(policy, Dense):
        if quant.is_none:
            return _dense(phase, "the phase is dense")
        if q.is_cuda and config.min_tokens and tokens < launch.pays_from(q.shape[-1], quant):
            return _dense(phase, f"{tokens} tokens: all of attention in {quant} is no faster there")
        return Plan(phase, 1.0, None, quant, None)
    if q.shape[2] != tokens and not policy.static:
        return _dense(phase, f"{policy} chooses by all queries, which are spread over processes")
    layout = layout_of(config, grid, text_len, text_first)
    if known is not None:
        block_mask, share = known
    elif policy.static:
        where = (policy, layout, config.first_frame, str(q.device))
        block_mask, share = _static(*where) if masks is None else masks.get(where, lambda: _static(*where))
    elif ops.unsupported(q, quant) is not None:
        return Plan(phase, 1.0, None, quant, None)  # nobody will run it (`attend` says why): to choose would be for nothing
    else:
        block_mask, share = _select(policy, layout, config.first_frame, q, k, v)
    if block_mask.kv_indices.shape[1] not in (1, q.shape[1]):
        raise ValueError(f"{policy} is for {block_mask.kv_indices.shape[1]} heads, this layer has {q.shape[1]}")
    if share > config.max_density:
        return _dense(phase, f"density {share:.2f} is above {config.max_density:g}: dense is faster")
    return Plan(phase, share, block_mask, quant, None, config.phases[phase].remainder, config.phases[phase].reuse)


def complete(video: Tensor, layout: Layout, first_frame: bool = False) -> Tensor:
    """A policy's map bool [b, h, video_tiles, video_tiles] -> that of all tiles, with own tiles and text kept."""
    n, tiles = layout.video_tiles, layout.num_tiles
    if video.dtype != torch.bool or video.ndim != 4 or video.shape[2:] != (n, n):
        raise ValueError(f"a policy must give bool [b, h, {n}, {n}], got {video.dtype} {tuple(video.shape)}")
    kept = torch.ones(*video.shape[:2], tiles, tiles, dtype=torch.bool, device=video.device)
    kept[:, :, :n, :n] = video | torch.eye(n, dtype=torch.bool, device=video.device)
    if first_frame:
        kept[..., : n // layout.tile_grid[0]] = True
    return kept


def _dense(phase: int | None, reason: str) -> Plan:
    return Plan(phase, 1.0, None, Quant(), reason)


def _static(policy: Policy, layout: Layout, first_frame: bool, device: str) -> tuple[BlockMask, float]:
    return _listed(complete(policy.select(layout).to(device), layout, first_frame), layout)


def _select(policy: Policy, layout: Layout, first_frame: bool, *qkv: Tensor) -> tuple[BlockMask, float]:
    video = (layout.to_tiles(x)[:, :, : layout.video_tiles] for _, x in zip(policy.reads, qkv, strict=False))
    return _listed(complete(policy.select(layout, *video), layout, first_frame), layout)


def _listed(kept: Tensor, layout: Layout) -> tuple[BlockMask, float]:
    block_mask = BlockMask.from_tile_map(kept, layout)
    return block_mask, density(kept, block_mask.q_order, block_mask.k_order)
