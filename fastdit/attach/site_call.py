"""One attention call of a site, decided when it runs: where its tokens sit, its plan, what was remembered, whether it held.

Opaque to torch.compile (`fastdit::site_attention`), so that noise levels, phases, prompt lengths and statistics never cost a
graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from fastdit import ops
from fastdit.approx import error_guard, step_cache
from fastdit.approx.step_cache import Memory
from fastdit.attach.cuda_graphs import STAYS_OUT, refuse_capture
from fastdit.attach.handle import Denoiser, Handle, Site
from fastdit.core.quant import Quant
from fastdit.planning import key_padding
from fastdit.planning.plan import Plan, make_plan
from fastdit.planning.sequence import Place, find_place
from fastdit.runs.clock import Stopwatch
from fastdit.runs.run import Forward, Ran

Qkv = tuple[Tensor, Tensor, Tensor]

NEW = "no earlier step of its branch: the conditioning or the noise is new"
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
    return _site_attention(q, k, v, mask, ids, denoiser.call.token, at, scale, backend)


@torch.library.custom_op("fastdit::site_attention", mutates_args=(), **STAYS_OUT)
def _site_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ids: Tensor,
    token: Tensor,
    at: Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    number, index = ids.tolist()
    handle = Handle.find(number)
    call = _Call(handle, handle.sites[index], Forward.find(int(token)), at, scale, backend)
    # What autocast asks for was done before; products of our own, in float32, are not its business.
    with ops.on_device(q), torch.autocast(q.device.type, enabled=False):
        return _answer(call, q, k, v, mask)


def _answer(call: _Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if (why := call.forward.missing) is not None:
        return call.dense(call.lacking(why), q, k, v, mask).contiguous()
    keys = None if mask is None else key_padding.read(mask, q.shape[0], q.shape[1], k.shape[1])
    if mask is not None and keys is None:
        return call.dense(call.lacking(key_padding.why_not(mask)), q, k, v, mask).contiguous()
    if keys is None or all(runs == ((0, k.shape[1]),) for runs in keys.kept):
        return call.answer(q, k, v, call.place(k.shape[1])).contiguous()
    groups = key_padding.alike(keys.kept)
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
    refuse_capture()
    return q.new_empty(q.shape)


def _no_backward(*_: Any) -> None:
    raise RuntimeError("a pipeline accelerated by fastdit is for inference only: call fastdit.restore(pipe) before training")


torch.library.register_autograd("fastdit::site_attention", _no_backward)


@dataclass
class _Call:
    """What one call of the op knows; tensors [B, N, H, D] throughout. nth: of the site's calls in this forward."""

    handle: Handle
    site: Site
    forward: Forward
    at: Tensor | None
    scale: float | None
    backend: str

    def __post_init__(self) -> None:
        self.state = self.forward.run.sites[self.site.index]
        self.sigma, self.layer, self.layers = self.forward.sigma, self.site.layer, len(self.site.denoiser.sites)
        self.nth = self.forward.seen[self.layer]
        self.forward.seen[self.layer] += 1
        self.phase = self.handle.config.at(self.sigma, self.layer, self.layers)

    def trimmed(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, runs: key_padding.Runs, square: bool) -> None:
        """Into out. Hidden tokens are no keys; as queries they attend what is left, or stay 0 if the mask is square, or if they
        are text of which nobody reads what becomes."""
        hidden = key_padding.gaps(runs, q.shape[1])
        query, key, value = (key_padding.take(x, runs) for x in (q, k, v))
        place = self.place(q.shape[1], runs)
        key_padding.put(out, self.answer(query, key, value, place, key_padding.count(hidden), kept=runs), runs)
        if not hidden:
            return
        if square or (self.forward.unread and not isinstance(place, str)):
            key_padding.put(out, torch.zeros_like(key_padding.take(q, hidden)), hidden)
        else:
            key_padding.put(out, self.original(key_padding.take(q, hidden), key, value), hidden)

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place | str, trimmed: int = 0, kept: key_padding.Runs | None = None
    ) -> Tensor:
        """Sparse, quantized or dense as planned; again on a higher rung of the guard while the answer is not good enough."""
        state, run = self.state, self.forward.run
        roll = place.after if not isinstance(place, str) and place.before else 0

        @functools.cache
        def rolled() -> Qkv:
            query = q if self.at is not None else _roll(q, roll)  # queries that are only some of them stay where they are
            return query.transpose(1, 2), _roll(k, roll).transpose(1, 2), _roll(v, roll).transpose(1, 2)

        while True:
            held = state.memory(self.phase, self.forward.branch, self.nth, kept, place, q.shape, q.dtype, state.rung)
            plan = self.plan(q, k, v, place, held, roll, rolled)
            if plan.reason is not None:
                return self.dense(plan, q, k, v, trimmed=trimmed)
            watch = Stopwatch(q)
            query, key, value = rolled()
            out, how = step_cache.attention(
                query, key, value, plan, plan.reuse, held, self.scale,
                lambda: self.original(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2),  # noqa: B023
                lambda device: sum(site.bytes(device) for site in self.handle.sites),
            )  # fmt: skip
            note, state.most = held.no_room, max(state.most, state.bytes()) if how == "refresh" else state.most
            if how == "refresh" and self.forward.branch.first == run.clock.step > 0:
                note = NEW
            if held.no_room and run.forget(1):
                held.no_room = None  # the next call of this branch tries again
            if run.last:
                held.drop()  # decoding, which comes next, needs the room
            error, why = self.fault(query, key, value, out, how)
            if why is None:
                skipped = how == "reuse" and plan.reuse.kind == "broadcast"
                density = 1.0 if how in ("refresh", "dense") else 0.0 if skipped else plan.density
                self.record(replace(plan, density=density), how, watch, trimmed, error, note)
                return out.transpose(1, 2) if self.at is not None else _roll(out.transpose(1, 2), -roll)
            state.climb(f"{why} at noise level {self.sigma:.3f}", error_guard.TOP if error is None else state.rung + 1)

    def fault(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, how: str) -> tuple[float | None, str | None]:
        """Measured error (None: not measured, or not finite) and what is wrong with an answer, None if nothing is."""
        # A sum that is not finite says the same as `isfinite().all()`, without a mask as large as the answer
        if not bool(out.sum(dtype=torch.promote_types(out.dtype, torch.float32)).isfinite()):
            sane = all(bool(x.isfinite().all()) for x in (q, k, v))
            return None, "not finite" if sane else None  # what came in broken is the model's own affair
        budget = self.handle.config.error_budget
        if budget is None or how in ("refresh", "dense"):
            return None, None
        error = error_guard.probe(q, k, v, out, self.scale)
        return error, f"error {error:.3g} over the budget of {budget:g}" if error > budget else None

    def place(self, tokens: int, kept: key_padding.Runs | None = None) -> Place | str:
        forward = self.forward
        return find_place(tokens, forward.grids, forward.before, forward.after, forward.ragged, kept)

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place | str, held: Memory, roll: int, rolled: Callable[[], Qkv]
    ) -> Plan:
        """rolled: q, k, v [B, H, N, D], the sequence rolled by `roll` so that all other tokens lie in front."""
        if isinstance(place, str):
            return self.lacking(place)
        config = error_guard.raised(self.handle.config, self.state.rung)
        phase = None if self.phase is None else config.phases[self.phase]
        age = 1 if phase is None else phase.reuse.map_age
        known = (held.block_mask, held.density) if held.block_mask is not None and held.map_uses < age else None
        # A policy that does not read them needs no more than their shape
        looks = phase is not None and not phase.policy.static and known is None
        query, key, value = rolled() if looks else (x.transpose(1, 2) for x in (q, k, v))
        plan = make_plan(
            config, self.sigma, self.layer, self.layers, place.grid, place.before + place.after, place.before > 0,
            query, key, value, known, self.handle.masks,
        )  # fmt: skip
        if plan.reason is None and (refusal := ops.unsupported(query, plan.quant)):
            return self.lacking(refusal)
        if age > 1:
            held.block_mask, held.density = plan.block_mask, plan.density
            held.map_uses = 1 if known is None else held.map_uses + 1
        if self.at is not None and plan.block_mask is not None:
            plan = replace(plan, block_mask=plan.block_mask.for_queries(self.at, roll))
        return plan

    def lacking(self, reason: str) -> Plan:
        """Dense for want of something. Raises RuntimeError if the configuration is strict."""
        return Plan(self.phase, 1.0, None, Quant(), self.handle.lacking(self.site, reason))

    def dense(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, trimmed: int = 0) -> Tensor:
        watch = Stopwatch(q)
        out = self.original(q, k, v, mask)
        reason = self.state.guarded if self.state.rung == error_guard.TOP and self.state.guarded else plan.reason
        self.record(replace(plan, reason=reason), "dense", watch, trimmed)
        return out

    def original(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense, by the function and the backend that the model's own processor names."""
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)  # as autocast does
        if self.backend == SDPA:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale).transpose(1, 2)
        backend = AttentionBackendName(self.backend) if self.backend else None
        return dispatch_attention_fn(q, k, v, mask, scale=self.scale, backend=backend)

    def record(
        self, plan: Plan, how: str, watch: Stopwatch, trimmed: int = 0, error: float | None = None, note: str | None = None
    ) -> None:
        ran = Ran(plan.phase, plan.density, how, plan.reason or note, self.forward.step, self.sigma, str(plan.quant), trimmed)
        self.state.ran.append(ran._replace(error=error, rung=self.state.rung, seconds=watch.stop()))


def _roll(x: Tensor, tokens: int) -> Tensor:
    """The last `tokens` of [B, N, H, D] to the front. Attention does not mind the order, only the layout of the tiles does."""
    return torch.roll(x, tokens, 1) if tokens else x
