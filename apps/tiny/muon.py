"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, then the nearest orthogonal matrix to it.

Orthogonalisation is five Newton-Schulz steps, run in one batch for all matrices of a shape. Convolution kernels count
as matrices [out, in · kernel]. The update's root mean square is set to 0.2 · lr · √(max side), that of AdamW
(Liu et al. 2025, arXiv 2502.16982 §2.2), so that both optimisers share one learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalize(X: Tensor) -> Tensor:
    """[batch, rows, columns], rows <= columns -> the same with singular values near 1."""
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        G = X @ X.mT
        X = 3.4445 * X + (-4.7750 * G + 2.0315 * G @ G) @ X
    return X


class Muon(torch.optim.Optimizer):
    """For tensors of two or more dimensions; give the others to AdamW."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, beta = group["lr"], group["momentum"]
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - beta)
            updates = torch._foreach_lerp(grads, buffers, beta)
            by_shape: dict[tuple[int, int], list[tuple[int, bool]]] = {}
            flat = [u.flatten(1) for u in updates]
            for i, u in enumerate(flat):
                tall = u.shape[0] > u.shape[1]
                by_shape.setdefault((min(u.shape), max(u.shape)), []).append((i, tall))
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for (_, longest), members in by_shape.items():
                X = torch.stack([flat[i].T if tall else flat[i] for i, tall in members])
                X = orthogonalize(X.bfloat16() if X.is_cuda else X).to(flat[0].dtype)
                for (i, tall), x in zip(members, X, strict=True):
                    params[i].add_((x.T if tall else x).reshape(params[i].shape), alpha=-0.2 * lr * longest**0.5)
