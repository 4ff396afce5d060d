"""One attention call of a site, decided when it runs: where its tokens sit, its plan, dense or sparse, and what ran is noted.

Opaque to torch.compile (`fastdit::site_attention`), so that noise levels, phases and prompt lengths never cost a graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from fastdit import ops, remainder, trim
from fastdit.handle import Denoiser, Handle, Site
from fastdit.layout import Grid
from fastdit.plan import Plan, make_plan
from fastdit.quant import Quant

SDPA = "F.scaled_dot_product_attention"
"""The backend of processors that call it themselves, instead of diffusers' `dispatch_attention_fn`."""


class Place(NamedTuple):
    """Where the tokens of one sequence sit: `before` others, the grid in raster order, `after` others."""

    grid: Grid
    before: int = 0
    after: int = 0


def attend(
    denoiser: Denoiser, ids: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, backend: str
) -> Tensor:
    """[B, N, H, D] -> [B, N, H, D] at the site of this number in the denoiser's call. Traced by torch.compile."""
    places = [denoiser.before, denoiser.after, int(denoiser.ragged), *denoiser.grid]
    for grid in denoiser.coarser:
        places.extend(grid)
    return _site_attention(q, k, v, mask, ids, denoiser.sigma, denoiser.where, places, scale, backend)


@torch.library.custom_op("fastdit::site_attention", mutates_args=())
def _site_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ids: Tensor,
    sigma: Tensor,
    where: Tensor | None,
    places: list[int],
    scale: float | None,
    backend: str,
) -> Tensor:
    number, index = ids.tolist()
    handle = Handle.find(number)
    level = float(sigma)
    handle.begin_call(level)
    call = _Call(handle, handle.sites[index], level, where, places, scale, backend)
    keys = None
    if mask is not None:
        keys = trim.read(mask, q.shape[0], q.shape[1], k.shape[1])
        if keys is None:
            handle.sites[index].record(call.dense("the mask hides more than whole keys"))
            return call.original(q, k, v, mask).contiguous()
        if all(runs == ((0, k.shape[1]),) for runs in keys.kept):
            keys = None
    if keys is None:
        return call.run(q, k, v).contiguous()
    groups = defaultdict(list)
    for row, runs in enumerate(keys.kept):
        groups[runs].append(row)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for runs, rows in groups.items():
        if len(groups) == 1:
            call.run_trimmed(out, q, k, v, runs, keys.square)
        else:
            part = torch.empty_like(out[rows])
            call.run_trimmed(part, q[rows], k[rows], v[rows], runs, keys.square)
            out[rows] = part
    return out


@_site_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _no_backward(*_: Any) -> None:
    raise RuntimeError("a pipeline accelerated by fastdit is for inference only: call fastdit.restore(pipe) before training")


torch.library.register_autograd("fastdit::site_attention", _no_backward)


@dataclass
class _Call:
    """What one call of the op knows; tensors [B, N, H, D] throughout."""

    handle: Handle
    site: Site
    sigma: float
    where: Tensor | None
    places: list[int]
    scale: float | None
    backend: str

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan, roll = self.plan(q, k, v, self.place(q.shape[1]))
        self.site.record(plan)
        return self.original(q, k, v) if plan.reason is not None else self.sparse(q, k, v, plan, roll)

    def run_trimmed(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, runs: trim.Runs, square: bool) -> None:
        """Into out. Hidden tokens are no keys; as queries they attend what is left, or stay 0 if the mask is square."""
        hidden = trim.gaps(runs, q.shape[1])
        query, key, value = (trim.take(x, runs) for x in (q, k, v))
        plan, roll = self.plan(query, key, value, self.place(q.shape[1], runs))
        self.site.record(plan, trimmed=trim.count(hidden))
        if plan.reason is not None and not square:
            out.copy_(self.original(q, key, value))
            return
        if plan.reason is not None:
            trim.put(out, self.original(query, key, value), runs)
        else:
            trim.put(out, self.sparse(query, key, value, plan, roll), runs)
        if square:
            trim.put(out, torch.zeros_like(trim.take(q, hidden)), hidden)
        else:
            trim.put(out, self.original(trim.take(q, hidden), key, value), hidden)

    def place(self, tokens: int, kept: trim.Runs | None = None) -> Place | str:
        """Where this many tokens sit, of which a mask leaves `kept`; or why that cannot be told."""
        before, after, ragged, *sides = self.places
        grids = [tuple(sides[i : i + 3]) for i in range(0, len(sides), 3)]
        if self.where is not None:
            grids = [tuple(self.where.tolist())]
            after = tokens - before - math.prod(grids[0])
            if math.prod(grids[0]) == 0 or after < 0:
                return "the tokens' coordinates are not those of one image"
        left = tokens if kept is None else trim.count(kept)
        for t, h, w in grids:
            video = t * h * w
            if kept is not None and not ragged:
                if tokens == before + video + after:
                    if trim.count(kept, before, before + video) < video:
                        return "the mask hides tokens of the picture"
                    return Place((t, h, w), trim.count(kept, 0, before), trim.count(kept, before + video))
            elif left == before + video + after:
                return Place((t, h, w), before, after)
            elif kept is None and not (before and after) and video <= left < video + before + after:
                return Place((t, h, w), left - video if before else 0, left - video if after else 0)  # text cut by the model
            elif ragged and kept is not None and len(kept) == 1 and kept[0][0] == 0 and left >= video:
                return Place((t, h, w), left - video)
        expected = " or ".join(str(before + math.prod(grid) + after) for grid in grids)
        return f"{tokens} tokens where the denoiser's input makes {expected}"

    def plan(self, q: Tensor, k: Tensor, v: Tensor, place: Place | str) -> tuple[Plan, int]:
        """The plan, and by how many tokens the sequence is to be rolled for it, so that all other tokens lie in front."""
        if isinstance(place, str):
            return self.dense(place), 0
        config, site = self.handle.config, self.site
        layers = len(site.denoiser.sites)
        roll = place.after if place.before and config.at(self.sigma, site.layer, layers) is not None else 0
        query, key, value = (_roll(x, roll).transpose(1, 2) for x in (q, k, v))
        others, first = place.before + place.after, place.before > 0
        plan = make_plan(config, self.sigma, site.layer, layers, place.grid, others, first, query, key, value)
        if plan.reason is None and (refusal := ops.unsupported(query, plan.quant)):
            plan = replace(plan, density=1.0, block_mask=None, reason=refusal)
        return plan, roll

    def dense(self, reason: str) -> Plan:
        phase = self.handle.config.at(self.sigma, self.site.layer, len(self.site.denoiser.sites))
        return Plan(phase, 1.0, None, Quant(), reason)

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, roll: int) -> Tensor:
        query, key, value = (_roll(x, roll).transpose(1, 2) for x in (q, k, v))
        out = remainder.attention(query, key, value, plan.block_mask, plan.quant, self.scale, plan.remainder)[0].transpose(1, 2)
        return _roll(out, -roll)

    def original(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense, by the function and the backend that the model's own processor names."""
        if self.backend == SDPA:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale).transpose(1, 2)
        backend = AttentionBackendName(self.backend) if self.backend else None
        return dispatch_attention_fn(q, k, v, mask, scale=self.scale, backend=backend)


def _roll(x: Tensor, tokens: int) -> Tensor:
    """The last `tokens` of [B, N, H, D] to the front. Attention does not mind the order, only the layout of the tiles does."""
    return torch.roll(x, tokens, 1) if tokens else x
