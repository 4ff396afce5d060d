"""Which configurations can be trained. Gradients need tiles that do not depend on values, an answer that does not depend on
earlier steps, and kernels with a backward."""

from __future__ import annotations

from torch import Tensor

from fastdit import ops
from fastdit.config import Config
from fastdit.policies import Dense


def always_dense(config: Config) -> bool:
    """Whether every call goes to the model's own attention, which trains as without fastdit."""
    return all(isinstance(phase.policy, Dense) and phase.quant.is_none for phase in config.phases)


def untrainable(config: Config, like: Tensor) -> str | None:
    """Why a configuration cannot be trained with tensors like `like` (their device and dtype count), or None if it can."""
    for number, phase in enumerate(config.phases):
        dense = isinstance(phase.policy, Dense)
        where = f"phase {number} ({phase.policy}{'' if phase.quant.is_none else f' in {phase.quant}'})"
        if not phase.policy.static:
            return f"{where}: this policy chooses its tiles by the values of q and k: train with a static one, such as Window"
        if phase.reuse.kind != "none" and not dense:
            return f"{where}: reuse of {phase.reuse.kind} needs the steps of a run, and training has none: give reuse=Reuse()"
        if dense and phase.quant.is_none:
            continue
        refusal = ops.unsupported(like, phase.quant) or ops.no_gradient(like, phase.quant, "none" if dense else phase.remainder)
        if refusal is not None:
            return f"{where}: {refusal}"
    return None
