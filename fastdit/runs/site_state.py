"""What one site did and remembers in one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastdit.approx.step_cache import Memory

NEW = "no earlier step of its branch: the conditioning or the noise is new"
"""Why a call took statistics that no step before could serve."""


class CallRecord(NamedTuple):
    """What one call of a site did.

    phase: index into `Config.phases`, None outside all of them. density: of all query-key pairs. how: "dense", "sparse" (or
    quantized), "refresh" (dense, statistics taken), "reuse" (sparse, completed by statistics). reason: why it was dense. step,
    sigma: of the run. quant: number format. trimmed: padded keys cut. error: relative L2 on a few rows, None if not measured.
    rung: level of the guard. seconds: of the attention call, or a pair of CUDA events that will tell.
    """

    phase: int | None
    density: float
    how: str
    reason: str | None = None
    step: int = 0
    sigma: float = 0.0
    quant: str = "none"
    trimmed: int = 0
    error: float | None = None
    rung: int = 0
    seconds: Any = 0.0


@dataclass(eq=False)
class SiteState:
    """Of one site in one run. calls: what they did; memories: what it remembers by phase, branch, shape; peak_bytes: of them;
    level: of `error_guard.LEVELS`; guarded: why it was last raised; too_dense: phases in which a dynamic policy keeps so many
    tiles that dense attention is faster, each with that reason; lost: why the site was not served."""

    calls: list[CallRecord] = field(default_factory=list)
    memories: dict[tuple[Any, ...], Memory] = field(default_factory=dict)
    peak_bytes: int = 0
    level: int = 0
    guarded: str | None = None
    too_dense: dict[int | None, str] = field(default_factory=dict)
    lost: str | None = None

    def memory(self, phase: int | None, *key: Any) -> Memory:
        """What is remembered for a phase and branch, shape, …: new at first. What another phase left goes: a phase begins with
        statistics of its own."""
        for other in [other for other in list(self.memories) if other[0] != phase]:
            del self.memories[other]
        return self.memories.setdefault((phase, *key), Memory())

    def bytes(self, device: torch.device | None = None) -> int:
        """Of statistics, on a device; None: on all."""
        return sum(memory.bytes(device) for memory in list(self.memories.values()))

    def escalate(self, why: str, level: int) -> str:
        """To a higher level, where statistics begin anew; the reason, for the report."""
        self.guarded, self.level = f"guard: {why}", max(self.level, level)
        self.memories.clear()
        return self.guarded
