"""The plan of a denoiser's forward, made once before its first layer, and the plan of each of its attention calls.

`plan_forward` is a pure function of the configuration, the noise level, the denoiser's sequence and the guard's level at each
site. A call adds its shape (`ForwardPlan.call`): all sites of one phase and shape share one `CallPlan`. `CallPlan.choose`
selects the tiles of a dynamic policy, which depend on the values of q, k and v.

This file handles text, padding and the diagonal, so that no policy has to: every tile attends all text, text attends
everything, and a tile always attends itself. A policy can therefore cost quality but never leave a row without keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from fastdit import ops
from fastdit.approx.error_guard import config_at_level
from fastdit.config import Config, Phase, Reuse
from fastdit.core.block_mask import BlockMask, density
from fastdit.core.byte_cache import ByteCache, sent
from fastdit.core.layout import Grid, Layout, fit_tile
from fastdit.core.quant import Quant
from fastdit.kernels import launch
from fastdit.planning.key_padding import Runs
from fastdit.planning.sequence import SequenceSpan, SequenceSpec
from fastdit.policies import Dense, Policy

MASK_BYTES = 256 << 20
"""Bound on a pipeline's cached block masks of static policies: about 40 masks of a 14B model at 720p."""


@dataclass(frozen=True, eq=False)
class SitePlan:
    """What the configuration asks of a site in this forward; sites of the same phase and level share it.

    config: at the guard's level. phase: index into `Config.phases`, None if no phase holds. reason: why every call of the site
    stays dense; None if calls may be sparse.
    """

    config: Config
    phase: int | None
    level: int
    reason: str | None = None

    @property
    def settings(self) -> Phase:
        return Phase() if self.phase is None else self.config.phases[self.phase]


@dataclass(frozen=True, eq=False)
class CallPlan:
    """What an attention call of one shape will do.

    reason: why it runs dense through the pipeline's own attention; None: it runs through `ops.run`. wanting: it is dense
    because something is missing or unsupported, which a strict configuration refuses. density: share of all query-key pairs in
    [0, 1]; a tensor [] while it is on a GPU. block_mask: None attends to every key, or, with a policy, is not chosen yet. span:
    where the tokens sit. policy: a dynamic policy, which still has to select its tiles. level: of the guard.
    """

    phase: int | None
    reason: str | None = None
    wanting: bool = False
    density: float | Tensor = 1.0
    block_mask: BlockMask | None = None
    quant: Quant = field(default_factory=Quant)
    remainder: str = "none"
    reuse: Reuse = field(default_factory=Reuse)
    span: SequenceSpan | None = None
    layout: Layout | None = None
    policy: Policy | None = None
    first_frame: bool = False
    max_density: float = 1.0
    level: int = 0

    @property
    def roll(self) -> int:
        """See `SequenceSpan.roll`."""
        return 0 if self.span is None else self.span.roll

    def choose(self, q: Tensor, k: Tensor, v: Tensor) -> CallPlan:
        """The plan with the tiles that the dynamic policy keeps for q, k and v [B, H, N, D], rolled by `roll` positions."""
        assert self.policy is not None
        assert self.layout is not None
        return self.with_mask(*_select(self.policy, self.layout, self.first_frame, q, k, v), heads=q.shape[1])

    def with_mask(self, block_mask: BlockMask, share: float | Tensor, heads: int) -> CallPlan:
        """The plan with this mask, or a dense plan if its density, `share`, is above the maximum.

        Raises ValueError if the mask has another number of heads.
        """
        if block_mask.kv_indices.shape[1] not in (1, heads):
            raise ValueError(f"{self.policy} is for {block_mask.kv_indices.shape[1]} heads, this layer has {heads}")
        if not isinstance(share, Tensor) and share > self.max_density:
            return self.dense(above(share, self.max_density))
        return replace(self, block_mask=block_mask, density=share)

    def dense(self, reason: str) -> CallPlan:
        return CallPlan(self.phase, reason, span=self.span, level=self.level)


@dataclass(frozen=True, eq=False)
class ForwardPlan:
    """The decisions for a whole forward of a denoiser. sites: by layer."""

    sequence: SequenceSpec
    sites: tuple[SitePlan, ...]

    def call(self, layer: int, q: Tensor, keys: int, kept: Runs | None = None, masks: ByteCache | None = None) -> CallPlan:
        """The plan of a call with queries q [B, H, n, D] on a sequence of `keys` tokens.

        kept: the tokens that a mask leaves, None: all. q holds those tokens, or this process's part of them. masks: cache of
        static policies' block masks.
        """
        site = self.sites[layer]
        span = self.sequence.missing or self.sequence.span(keys, kept)
        return _call(site, span, q, masks)


@lru_cache(maxsize=256)
def plan_forward(config: Config, sigma: float, sequence: SequenceSpec, levels: tuple[int, ...]) -> ForwardPlan:
    """The plan of a forward. sigma: noise level in [0, 1]; levels: the guard's level of each layer (`error_guard.LEVELS`)."""
    known: dict[tuple[int, int], SitePlan] = {}
    sites = []
    for layer, level in enumerate(levels):
        phase = config.at(sigma, layer, len(levels))
        if phase is None:
            none = f"no phase for noise level {sigma:.3f} and layer {layer} of {len(levels)}"
            sites.append(SitePlan(config, None, level, none if config.phases else "the configuration is dense"))
        else:
            sites.append(known.setdefault((phase, level), SitePlan(config_at_level(config, level), phase, level)))
    return ForwardPlan(sequence, tuple(sites))


def layout_of(config: Config, grid: Grid, text_len: int = 0, text_first: bool = False) -> Layout:
    """The layout of a grid: with the configuration's tile cut to the grid, or a tile fitted to it."""
    tile = config.tile or fit_tile(grid, config.tile_tokens)
    t, h, w = (min(s, g) for s, g in zip(tile, grid, strict=True))
    return Layout(grid, (t, h, w), text_len, text_first)


def plan_call(
    config: Config,
    sigma: float,
    grid: Grid,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int = 0,
    layers: int = 1,
    before: int = 0,
    after: int = 0,
    masks: ByteCache | None = None,
) -> CallPlan:
    """The plan of a single call, tiles selected: q, k and v [B, H, N, D] with `before` and `after` tokens around the grid's."""
    forward = plan_forward(config, sigma, SequenceSpec((grid,), before, after), (0,) * layers)
    plan = forward.call(layer, q, k.shape[2], None, masks)
    return plan if plan.policy is None else plan.choose(q, k, v)


def _call(site: SitePlan, span: SequenceSpan | str, q: Tensor, masks: ByteCache | None) -> CallPlan:
    if isinstance(span, str):
        return CallPlan(site.phase, span, wanting=True, level=site.level)
    config, phase, tokens = site.config, site.settings, span.tokens
    policy, quant = phase.policy, phase.quant
    plan = CallPlan(
        site.phase, quant=quant, span=span, first_frame=config.first_frame, max_density=config.max_density, level=site.level
    )
    if site.reason is not None:
        return plan.dense(site.reason)
    if (why := dense_because(config, phase, tokens, q.shape[-1], q.device.type)) is not None:
        return plan.dense(why)
    if q.shape[2] != tokens and not policy.static:
        return plan.dense(f"{policy} needs all queries, which are split over processes")
    if (refusal := ops.unsupported(q, quant)) is not None:
        return replace(plan.dense(refusal), wanting=True)
    if isinstance(policy, Dense):
        return plan
    layout = layout_of(config, span.grid, span.others, span.before > 0)
    plan = replace(plan, remainder=phase.remainder, reuse=phase.reuse, layout=layout, policy=policy)
    if not policy.static:
        return plan
    where = (policy, layout, config.first_frame, str(q.device))
    found = _static(*where) if masks is None else masks.get(where, lambda: _static(*where))
    return replace(plan.with_mask(*found, heads=q.shape[1]), policy=None)


def dense_because(config: Config, phase: Phase, tokens: int, head_dim: int, device: str) -> str | None:
    """Why a phase stays dense for so many tokens on a type of device ("cpu", "cuda"); None: it may be sparse."""
    if tokens < (least := config.least_tokens(device)):
        who = f"this {'CPU' if device == 'cpu' else 'GPU'}" if config.min_tokens is None else "the configuration"
        return f"{tokens:,} tokens, {who} needs {least:,}"
    if not isinstance(phase.policy, Dense):
        return None
    if phase.quant.is_none:
        return "the phase is dense"
    if device == "cuda" and least and tokens < launch.pays_from(head_dim, phase.quant):
        return f"{tokens} tokens: dense attention in {phase.quant} is no faster at this length"
    return None


def above(share: float, most: float) -> str:
    return f"density {share:.2f} is above {most:g}: dense is faster"


def complete(video: Tensor, layout: Layout, first_frame: bool = False) -> Tensor:
    """A policy's map, bool [b, h, video_tiles, video_tiles] -> map of all tiles, with the diagonal and text kept."""
    n, tiles = layout.video_tiles, layout.num_tiles
    if video.dtype != torch.bool or video.ndim != 4 or video.shape[2:] != (n, n):
        raise ValueError(f"a policy must give bool [b, h, {n}, {n}], got {video.dtype} {tuple(video.shape)}")
    kept = torch.ones(*video.shape[:2], tiles, tiles, dtype=torch.bool, device=video.device)
    kept[:, :, :n, :n] = video | torch.eye(n, dtype=torch.bool, device=video.device)
    if first_frame:
        kept[..., : layout.frame_tiles] = True
    return kept


def _static(policy: Policy, layout: Layout, first_frame: bool, device: str) -> tuple[BlockMask, float]:
    kept = complete(policy.select(layout), layout, first_frame)  # on the CPU, whose density is known without a wait
    order = layout.order(kept.device)
    return BlockMask.from_tile_map(sent(kept, device), layout), float(density(kept, order, order))


def _select(policy: Policy, layout: Layout, first_frame: bool, *qkv: Tensor) -> tuple[BlockMask, float | Tensor]:
    video = (layout.to_tiles(x)[:, :, : layout.video_tiles] for _, x in zip(policy.reads, qkv, strict=False))
    kept = complete(policy.select(layout, *video), layout, first_frame)
    block_mask = BlockMask.from_tile_map(kept, layout)
    return block_mask, on_host(density(kept, block_mask.q_order, block_mask.k_order))


def on_host(share: Tensor) -> float | Tensor:
    """A float, or the tensor itself on a GPU, where reading it would block."""
    return share if share.is_cuda else float(share)
