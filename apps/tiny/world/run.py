"""The state of a training run, one of several processes that average their gradients, and the clock they share."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.apps.tiny.muon import Muon
from fastdit.apps.tiny.world import store
from fastdit.apps.tiny.world.tasks import Task


class Run:
    """One task's state: models, averages, optimisers and step, and its checkpoint."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.path = task, args.out / f"{task.name}.pt"
        self.params = [p for m in task.models.values() for p in m.parameters()]
        matrices = task.matrices()
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.params if id(p) not in chosen]
        fused = task.device.type == "cuda"
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, 0.0),
            torch.optim.AdamW(rest, 0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=fused),
        ]
        self.step, self.restarted = 0, 0
        saved: dict[str, Any] | None = None
        if self.path.exists():
            saved = torch.load(self.path, map_location=task.device, weights_only=True)
            for opt, state in zip(self.optimizers, saved["optimizers"], strict=True):
                opt.load_state_dict(state)
        elif args.init:
            saved = store.read_light(args.init.parent, args.init.name)
            if task.name == "few":
                saved["models"], saved["step"] = saved["ema"], 0
                for k, m in task.teacher.items():  # type: ignore[union-attr]
                    m.load_state_dict(saved["ema"][k])
            self.restarted = saved["step"]
        if saved:
            for k, m in task.models.items():
                m.load_state_dict(saved["models"][k])
            self.step = saved["step"]
        source = saved["ema"] if saved else {k: m.state_dict() for k, m in task.models.items()}
        self.ema = {k: {n: t.detach().clone().to(task.device) for n, t in s.items()} for k, s in source.items()}
        self.first = self.step

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "ema": self.ema,
            "models": {k: m.state_dict() for k, m in self.task.models.items()},
            "optimizers": [opt.state_dict() for opt in self.optimizers],
        }

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        torch.save(self.state(), part)
        part.replace(self.path)

    def update(self, loss: Tensor, rate: float, decay: float) -> Tensor:
        """One step of both optimisers, AdamW at half of Muon's rate; returns the gradient's norm before clipping."""
        loss.backward()
        if dist.is_initialized():
            grads = [p.grad for p in self.params if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat, op=dist.ReduceOp.AVG if flat.is_cuda else dist.ReduceOp.SUM)
            if not flat.is_cuda:
                flat /= dist.get_world_size()
            parts = flat.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for opt, share in zip(self.optimizers, (1.0, 0.5), strict=True):
            opt.param_groups[0]["lr"] = rate * share
            opt.step()
            opt.zero_grad(set_to_none=True)
        averages = [t for s in self.ema.values() for t in s.values()]
        weights = [t for m in self.task.models.values() for t in m.state_dict().values()]
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (self.step + 1) / (self.step + 10)))
        self.step += 1
        return norm


class Clock:
    """How much of the call is over, the same in all processes: the first one's clock, read every few steps."""

    def __init__(self, args: argparse.Namespace, device: torch.device, start: float) -> None:
        self.args, self.device, self.start, self.value, self.asked = args, device, start, 0.0, 0

    def done(self, steps: int) -> float:
        if self.args.steps:
            return steps / self.args.steps
        if self.asked % 8 == 0:
            now = torch.tensor((time.monotonic() - self.start) / (self.args.minutes * 60), device=self.device)
            if dist.is_initialized():
                dist.broadcast(now, 0)
            self.value = float(now)
        self.asked += 1
        return self.value
