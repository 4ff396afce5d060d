"""One attention call of a site, decided when it runs: where its tokens sit, its plan, what was remembered, whether it held.

Opaque to torch.compile (`fastdit::site_attention`), so that noise levels, phases, prompt lengths and statistics never cost a
graph.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from fastdit import guard, memory, ops, trim
from fastdit.clock import Stopwatch
from fastdit.handle import Denoiser, Handle, Ran, Site
from fastdit.memory import Memory
from fastdit.place import Place, find_place
from fastdit.plan import Plan, make_plan
from fastdit.quant import Quant

SDPA = "F.scaled_dot_product_attention"
"""The backend of processors that call it themselves, instead of diffusers' `dispatch_attention_fn`."""


def attend(
    denoiser: Denoiser,
    ids: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    backend: str,
    at: Tensor | None = None,
) -> Tensor:
    """[B, N, H, D] -> [B, N, H, D] at the site of this number in the denoiser's call. Traced by torch.compile.

    at: int64 [n], where q has only n of the sequence's tokens: which ones.
    """
    places = [denoiser.before, denoiser.after, int(denoiser.ragged), int(denoiser.unread), *denoiser.grid]
    for grid in denoiser.coarser:
        places.extend(grid)
    return _site_attention(q, k, v, mask, ids, denoiser.sigma, denoiser.where, at, places, scale, backend)


@torch.library.custom_op("fastdit::site_attention", mutates_args=())
def _site_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ids: Tensor,
    sigma: Tensor,
    where: Tensor | None,
    at: Tensor | None,
    places: list[int],
    scale: float | None,
    backend: str,
) -> Tensor:
    number, index = ids.tolist()
    handle = Handle.find(number)
    level, site = float(sigma), handle.sites[index]
    handle.begin_call(level, site)
    call = _Call(handle, site, level, where, at, places, scale, backend)
    keys = None
    if mask is not None:
        keys = trim.read(mask, q.shape[0], q.shape[1], k.shape[1])
        if keys is None:
            return call.dense(call.lacking(trim.why_not(mask)), q, k, v, mask).contiguous()
        if all(runs == ((0, k.shape[1]),) for runs in keys.kept):
            keys = None
    if keys is None:
        return call.answer(q, k, v, call.place(k.shape[1])).contiguous()
    groups = defaultdict(list)
    for row, runs in enumerate(keys.kept):
        groups[runs].append(row)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for runs, rows in groups.items():
        if len(groups) == 1:
            call.trimmed(out, q, k, v, runs, keys.square)
        else:
            part = torch.empty_like(out[rows])
            call.trimmed(part, q[rows], k[rows], v[rows], runs, keys.square)
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
    at: Tensor | None
    places: list[int]
    scale: float | None
    backend: str

    def trimmed(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, runs: trim.Runs, square: bool) -> None:
        """Into out. Hidden tokens are no keys; as queries they attend what is left, or stay 0 if the mask is square, or if they
        are text of which nobody reads what becomes."""
        hidden = trim.gaps(runs, q.shape[1])
        query, key, value = (trim.take(x, runs) for x in (q, k, v))
        place = self.place(q.shape[1], runs)
        trim.put(out, self.answer(query, key, value, place, trim.count(hidden), branch=runs), runs)
        if square or (self.places[3] and not isinstance(place, str)):
            trim.put(out, torch.zeros_like(trim.take(q, hidden)), hidden)
        else:
            trim.put(out, self.original(trim.take(q, hidden), key, value), hidden)

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place | str, trimmed: int = 0, branch: trim.Runs | None = None
    ) -> Tensor:
        """Sparse, quantized or dense as planned; again on a higher rung of the guard while the answer is not good enough."""
        while True:
            key = (self.site.denoiser.branch, branch, place, q.shape, q.dtype, self.site.rung)
            held = self.site.memory(self.phase(), *key)
            plan, roll = self.plan(q, k, v, place, held)
            if plan.reason is not None:
                return self.dense(plan, q, k, v, trimmed=trimmed)
            watch = Stopwatch(q)
            query, key_, value = self.rolled(q, k, v, roll)
            out, how = memory.attention(
                query, key_, value, plan, plan.reuse, held, self.scale,
                lambda: self.original(*(x.transpose(1, 2) for x in (query, key_, value))).transpose(1, 2),  # noqa: B023
                lambda device: sum(site.bytes(device) for site in self.handle.sites),
            )  # fmt: skip
            if how == "refresh":  # nothing else takes room
                self.site.most = max(self.site.most, self.site.bytes())
            if self.handle.last:
                held.drop()  # decoding, which comes next, needs the room
            error, why = self.fault(query, key_, value, out, how)
            if why is None:
                skipped = how == "reuse" and plan.reuse.kind == "broadcast"
                density = 1.0 if how in ("refresh", "dense") else 0.0 if skipped else plan.density
                self.record(replace(plan, density=density), how, watch, trimmed, error, held.no_room)
                return out.transpose(1, 2) if self.at is not None else _roll(out.transpose(1, 2), -roll)
            self.site.climb(why, guard.TOP if error is None else self.site.rung + 1)

    def fault(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, how: str) -> tuple[float | None, str | None]:
        """Measured error (None: not measured, or not finite) and what is wrong with an answer, None if nothing is."""
        # A sum that is not finite says the same as `isfinite().all()`, without a mask as large as the answer
        if not bool(out.sum(dtype=torch.promote_types(out.dtype, torch.float32)).isfinite()):
            sane = all(bool(x.isfinite().all()) for x in (q, k, v))
            return None, "not finite" if sane else None  # what came in broken is the model's own affair
        budget = self.handle.config.error_budget
        if budget is None or how in ("refresh", "dense"):
            return None, None
        error = guard.probe(q, k, v, out, self.scale)
        return error, f"error {error:.3g} over the budget of {budget:g}" if error > budget else None

    def place(self, tokens: int, kept: trim.Runs | None = None) -> Place | str:
        before, after, ragged, _, *sides = self.places
        grids = [(sides[i], sides[i + 1], sides[i + 2]) for i in range(0, len(sides), 3)]
        if self.where is not None:
            t, h, w = self.where.tolist()
            if t * h * w == 0:
                return "the tokens' coordinates are not those of one image"
            grids = [(t, h, w)]
        return find_place(tokens, grids, before, after, bool(ragged), kept)

    def phase(self) -> int | None:
        return self.handle.config.at(self.sigma, self.site.layer, len(self.site.denoiser.sites))

    def plan(self, q: Tensor, k: Tensor, v: Tensor, place: Place | str, held: Memory) -> tuple[Plan, int]:
        """The plan, and by how many tokens the sequence is to be rolled for it, so that all other tokens lie in front."""
        if isinstance(place, str):
            return self.lacking(place), 0
        phase, layers = self.phase(), len(self.site.denoiser.sites)
        roll = place.after if place.before and phase is not None else 0
        query, key, value = self.rolled(q, k, v, roll)
        config = guard.raised(self.handle.config, self.site.rung)
        age = 1 if phase is None else config.phases[phase].reuse.map_age
        known = (held.block_mask, held.density) if held.block_mask is not None and held.map_uses < age else None
        plan = make_plan(
            config, self.sigma, self.site.layer, layers, place.grid, place.before + place.after, place.before > 0,
            query, key, value, known,
        )  # fmt: skip
        if plan.reason is None and (refusal := ops.unsupported(query, plan.quant)):
            return self.lacking(refusal), 0
        if age > 1:
            held.block_mask, held.density = plan.block_mask, plan.density
            held.map_uses = 1 if known is None else held.map_uses + 1
        if self.at is not None and plan.block_mask is not None:
            plan = replace(plan, block_mask=plan.block_mask.for_queries(self.at, roll))
        return plan, roll

    def rolled(self, q: Tensor, k: Tensor, v: Tensor, roll: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, N, D], the sequence's tokens rolled; queries that are only some of them stay where they are."""
        q = q if self.at is not None else _roll(q, roll)
        return q.transpose(1, 2), _roll(k, roll).transpose(1, 2), _roll(v, roll).transpose(1, 2)

    def lacking(self, reason: str) -> Plan:
        """Dense for want of something, which a strict configuration does not accept. Raises RuntimeError then."""
        if self.handle.config.strict:
            raise RuntimeError(f"{self.site.name}: {reason} (strict: attention may not fall back to dense)")
        return Plan(self.phase(), 1.0, None, Quant(), reason)

    def dense(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, trimmed: int = 0) -> Tensor:
        watch = Stopwatch(q)
        out = self.original(q, k, v, mask)
        reason = self.site.guarded if self.site.rung == guard.TOP and self.site.guarded else plan.reason
        self.record(replace(plan, reason=reason), "dense", watch, trimmed)
        return out

    def original(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense, by the function and the backend that the model's own processor names."""
        if self.backend == SDPA:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale).transpose(1, 2)
        backend = AttentionBackendName(self.backend) if self.backend else None
        return dispatch_attention_fn(q, k, v, mask, scale=self.scale, backend=backend)

    def record(
        self, plan: Plan, how: str, watch: Stopwatch, trimmed: int = 0, error: float | None = None, no_room: str | None = None
    ) -> None:
        step, rung = self.handle.clock.step, self.site.rung
        self.site.ran.append(
            Ran(plan.phase, plan.density, how, plan.reason or no_room, step, self.sigma, str(plan.quant), trimmed, error, rung,
                watch.stop())
        )  # fmt: skip


def _roll(x: Tensor, tokens: int) -> Tensor:
    """The last `tokens` of [B, N, H, D] to the front. Attention does not mind the order, only the layout of the tiles does."""
    return torch.roll(x, tokens, 1) if tokens else x
