"""One attention call of a site: it looks up its plan, runs it, and has the output checked. It makes no decision of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from fastdit import ops
from fastdit.approx import error_guard, placement, step_cache
from fastdit.approx.step_cache import Memory
from fastdit.config import AUTO
from fastdit.planning import key_padding
from fastdit.planning.forward_plan import CallPlan
from fastdit.planning.key_padding import Runs
from fastdit.runs.clock import Stopwatch
from fastdit.runs.forward import Forward
from fastdit.runs.site_state import NEW, CallRecord, SiteState
from fastdit.runs.verdict import Verdict, settle

SDPA = "F.scaled_dot_product_attention"
"""The backend of processors that call SDPA themselves instead of diffusers' `dispatch_attention_fn`."""


@dataclass
class SiteCall:
    """One call of a site; tensors are [B, N, H, D]. at, scale, backend: as in `site_op.attend`. nth: index of the call among
    the site's calls in this forward. again: computed once more, for a backward."""

    forward: Forward
    layer: int
    at: Tensor | None
    scale: float | None
    backend: str
    again: bool = False
    state: SiteState = field(init=False)
    nth: int = field(init=False)

    def __post_init__(self) -> None:
        self.state, self.nth = self.forward.state(self.layer), self.forward.count(self.layer)
        self.again = self.again or self.forward.over

    def answer(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, compiled: bool) -> Tensor:
        """Attention of q, k, v under a mask. Batch elements with the same kept keys are computed together."""
        forward = self.forward
        if (why := forward.plan.sequence.missing) is not None:
            return self.dense(forward.dense(self.layer, why), q, k, v, mask)
        if mask is None:
            return self.run(q, k, v)
        keys = forward.kept_keys(mask, q.shape[0], q.shape[1], k.shape[1], compiled)
        if isinstance(keys, str):
            return self.dense(forward.dense(self.layer, keys), q, k, v, mask)
        groups = key_padding.alike(keys.kept)
        if set(groups) == {((0, k.shape[1]),)}:
            return self.run(q, k, v)
        if len(groups) == 1:
            return self.trimmed(q, k, v, next(iter(groups)), keys.square)
        out = q.new_empty(q.shape)
        for runs, rows in groups.items():
            out[rows] = self.trimmed(q[rows], k[rows], v[rows], runs, keys.square)
        return out

    def trimmed(self, q: Tensor, k: Tensor, v: Tensor, runs: Runs, square: bool) -> Tensor:
        """Attention without the hidden tokens as keys. As queries, hidden tokens attend the kept keys; their rows are 0 if the
        mask is square, or if the model never uses them (`Facts.unread`)."""
        hidden = key_padding.gaps(runs, q.shape[1])
        query, key, value = (key_padding.gather_runs(x, runs) for x in (q, k, v))
        out = q.new_empty(q.shape)
        key_padding.scatter_runs(out, self.run(query, key, value, k.shape[1], runs, key_padding.count(hidden)), runs)
        if hidden:
            sequence = self.forward.plan.sequence
            unread = square or (sequence.unread and not isinstance(sequence.span(k.shape[1], runs), str))
            others = key_padding.gather_runs(q, hidden)
            rest = torch.zeros_like(others) if unread else self.original(others, key, value)
            key_padding.scatter_runs(out, rest, hidden)
        return out

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keys: int | None = None, kept: Runs | None = None, trimmed: int = 0
    ) -> Tensor:
        """Attention as planned, or dense. keys: tokens of the sequence. kept: those that a mask keeps, which are k's tokens.
        trimmed: number of keys cut, for the record."""
        forward, state = self.forward, self.state
        plan = forward.call(self.layer, q.transpose(1, 2), keys or k.shape[1], kept)
        # Also in a dense phase: this drops the statistics of other phases.
        memory = state.memory(plan.phase, forward.branch, self.nth, kept, plan.span, q.shape, q.dtype, plan.level)
        memory.due |= forward.due
        if plan.reason is None and (why := state.too_dense.get(plan.phase)) is not None:
            plan = plan.dense(why)
        if plan.reason is not None:
            return self.dense(plan, q, k, v, trimmed=trimmed)
        watch, roll = Stopwatch(q), plan.roll
        # A subset of the queries is not rolled: `at` gives their positions.
        query = (q if self.at is not None else _roll(q, roll)).transpose(1, 2)
        key, value = (_roll(x, roll).transpose(1, 2) for x in (k, v))
        if plan.policy is not None:
            plan = memory.with_map(plan, query, key, value)
            if plan.reason is not None:
                return self.dense(plan, q, k, v, trimmed=trimmed)
        if self.at is not None and plan.block_mask is not None:
            plan = replace(plan, block_mask=plan.block_mask.for_queries(self.at, roll))
        if forward.train:
            if (refusal := ops.no_gradient(q, plan.quant, plan.remainder)) is not None:
                raise NotImplementedError(f"{forward.names[self.layer]}: {refusal}")
            out, _ = ops.attention(query, key, value, plan.block_mask, plan.quant, self.scale, plan.remainder)
            self.note(self.record(plan, "sparse", None, watch, trimmed)._replace(density=float(plan.density)))
            return self.unrolled(out, roll)

        def dense() -> Tensor:
            return self.original(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

        fault = forward.flag(q.device)
        out, how = step_cache.attention(
            query, key, value, plan, plan.reuse, memory, self.scale, dense, forward.held, forward.run.memories, fault=fault
        )
        note = memory.no_room
        if how == "refresh":
            state.peak_bytes = max(state.peak_bytes, state.bytes())
            if forward.branch.first == forward.run.clock.step > 0:
                note = NEW
            elif memory.form is not None and memory.form != placement.BEST and plan.reuse.store == AUTO:
                note = f"statistics kept in {memory.form}, as memory is short"
        if memory.no_room and forward.run.forget(1):
            memory.no_room = None  # so that the next call of this branch tries again
        if forward.run.last:
            memory.drop()  # decoding comes next and needs the memory
        self.check(query, key, value, out, fault, plan, memory, self.record(plan, how, note, watch, trimmed))
        return self.unrolled(out, roll)

    def unrolled(self, out: Tensor, roll: int) -> Tensor:
        """[B, H, N, D] -> [B, N, H, D], in the order in which the queries came."""
        return out.transpose(1, 2) if self.at is not None else _roll(out.transpose(1, 2), -roll)

    def note(self, record: CallRecord) -> None:
        if not self.again:
            self.state.calls.append(record)

    def check(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, fault: Tensor, plan: CallPlan, memory: Memory, record: CallRecord
    ) -> None:
        """Replace out [B, H, N, D] by dense attention if it is not finite or its error exceeds the budget; store the record."""
        state, budget = self.state, self.forward.config.error_budget
        limit = math.inf if budget is None else budget
        drift = plan.reuse.drift if record.how == "reuse" else None
        error = share = None
        if record.how in ("sparse", "reuse"):
            if budget is not None or drift is not None:
                error = error_guard.probe(q, k, v, out, self.scale)
                fault |= error > limit
            density = 0.0 if record.how == "reuse" and plan.reuse.kind == "broadcast" else plan.density
            if isinstance(density, Tensor):
                share = density
            else:
                record = record._replace(density=density)
        ops.repair(q, k, v, out, q.shape[-1] ** -0.5 if self.scale is None else self.scale, fault)
        state.calls.append(record)
        foresee = None if drift is None else partial(self.forward.branch.foresee, uses=memory.uses, drift=drift)
        verdict = Verdict(state, len(state.calls) - 1, fault, error, share, plan.max_density, limit, foresee)
        if reads_at_once(q.device):
            settle([verdict])
        else:
            self.forward.run.pending.append(verdict)

    def dense(self, plan: CallPlan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, trimmed: int = 0) -> Tensor:
        forward, state = self.forward, self.state
        if plan.wanting:
            forward.config.accept(forward.names[self.layer], str(plan.reason))
        watch = Stopwatch(q)
        out = self.original(q, k, v, mask)
        reason = state.guarded if plan.level == error_guard.DENSE and state.guarded else plan.reason
        self.note(self.record(plan, "dense", reason, watch, trimmed))
        return out

    def record(self, plan: CallPlan, how: str, reason: str | None, watch: Stopwatch, trimmed: int) -> CallRecord:
        forward = self.forward
        return CallRecord(
            plan.phase, 1.0, how, reason, forward.step, forward.sigma, str(plan.quant), trimmed, None, plan.level, watch.stop()
        )

    def original(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense attention by the function and backend of the model's own processor."""
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)  # as autocast does
        if self.backend == SDPA:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale).transpose(1, 2)
        backend = AttentionBackendName(self.backend) if self.backend else None
        return dispatch_attention_fn(q, k, v, mask, scale=self.scale, backend=backend)


def _roll(x: Tensor, tokens: int) -> Tensor:
    """Move the last `tokens` of [B, N, H, D] to the front. Attention ignores the order; the tiles' layout depends on it."""
    return torch.roll(x, tokens, 1) if tokens else x


def reads_at_once(device: torch.device) -> bool:
    """Whether flags are read after each call: only on the CPU, where reading does not block."""
    return device.type == "cpu"
