"""The records and statistics of one site in one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastdit.approx.step_cache import Memory

NEW = "no earlier step of its branch: the conditioning or the noise is new"
"""Why a call took statistics that no step before could serve."""


class CallRecord(NamedTuple):
    """What one call of a site did.

    phase: index into `Config.phases`, None if no phase held. density: share of all query-key pairs, in [0, 1]. how: "dense",
    "sparse" (or quantized), "refresh" (dense, statistics taken), "reuse" (sparse, completed by statistics). reason: why it was
    dense. step, sigma: of the run. quant: number format. trimmed: padded keys cut. error: relative L2 on a few rows, None if
    not measured. rung: level of the guard. seconds: of the attention call, or a pair of CUDA events around it.
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
    """The state of one site in one run. calls: records; memories: statistics by phase, branch, shape, …; peak_bytes: of the
    statistics; level: index into `error_guard.LEVELS`; guarded: why the level was last raised; too_dense: phases whose dynamic
    policy keeps so many tiles that dense attention is faster, with the reason; lost: why the site could not be accelerated."""

    calls: list[CallRecord] = field(default_factory=list)
    memories: dict[tuple[Any, ...], Memory] = field(default_factory=dict)
    peak_bytes: int = 0
    level: int = 0
    guarded: str | None = None
    too_dense: dict[int | None, str] = field(default_factory=dict)
    lost: str | None = None

    def memory(self, phase: int | None, *key: Any) -> Memory:
        """The statistics of a phase and a key (branch, shape, …), created if missing. Drops those of other phases: a phase
        begins with statistics of its own."""
        for other in [other for other in list(self.memories) if other[0] != phase]:
            del self.memories[other]
        return self.memories.setdefault((phase, *key), Memory())

    def bytes(self, device: torch.device | None = None) -> int:
        """Bytes of statistics on a device; None: on all."""
        return sum(memory.bytes(device) for memory in list(self.memories.values()))

    def escalate(self, why: str, level: int) -> str:
        """Raise the guard's level and drop the statistics. Returns the reason, for the report."""
        self.guarded, self.level = f"guard: {why}", max(self.level, level)
        self.memories.clear()
        return self.guarded
