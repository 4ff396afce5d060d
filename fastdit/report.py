"""What ran: per phase and per site, the density achieved, and why each call that stayed dense did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastdit.config import Config, Phase
from fastdit.handle import Handle, Ran, Site


@dataclass(frozen=True)
class PhaseReport:
    """sigma (high, low); density: mean over the phase's calls, in [0, 1] of all query-key pairs; calls: site calls."""

    sigma: tuple[float, float]
    policy: str
    quant: str
    density: float
    calls: int


@dataclass(frozen=True)
class SiteReport:
    """ran: "sparse", "dense", "mixed" or "never"; reason: the most frequent cause of a call that stayed dense."""

    name: str
    ran: str
    density: float
    reason: str | None


@dataclass(frozen=True)
class Report:
    """The latest run of a pipeline. density: mean over all calls of all sites."""

    config: Config
    density: float
    phases: tuple[PhaseReport, ...]
    sites: tuple[SiteReport, ...]

    @classmethod
    def of(cls, handle: Handle) -> Report:
        config = handle.config
        total: Counter[Ran] = Counter()
        for site in handle.sites:
            total.update(site.ran)
        phases = [_phase(phase, _of_phase(total, i)) for i, phase in enumerate(config.phases)]
        if outside := _of_phase(total, None):  # noise levels and layers that no phase names
            phases.append(_phase(Phase(), outside))
        return cls(config, _density(total), tuple(phases), tuple(_site(site) for site in handle.sites))

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "density": self.density,
            "phases": [vars(phase) | {"sigma": list(phase.sigma)} for phase in self.phases],
            "sites": [dict(vars(site)) for site in self.sites],
        }

    def __str__(self) -> str:
        rows = [("noise level", "policy", "quant", "density", "calls")]
        rows += [(f"{p.sigma[0]:g} … {p.sigma[1]:g}", p.policy, p.quant, f"{p.density:.3f}", str(p.calls)) for p in self.phases]
        sites = Counter((site.ran, site.reason or "") for site in self.sites)
        notes = [
            f"{count} sites {ran}" + (f" (dense where: {reason})" if reason else "") for (ran, reason), count in sites.items()
        ]
        return "\n".join([*_table(rows), *notes, f"density over all calls: {self.density:.3f}"])


def _phase(phase: Phase, ran: Counter[Ran]) -> PhaseReport:
    return PhaseReport(phase.sigma, str(phase.policy), str(phase.quant), _density(ran), ran.total())


def _of_phase(ran: Counter[Ran], phase: int | None) -> Counter[Ran]:
    return Counter({r: n for r, n in ran.items() if r.phase == phase})


def _density(ran: Counter[Ran]) -> float:
    return sum(r.density * n for r, n in ran.items()) / ran.total() if ran else 1.0


def _site(site: Site) -> SiteReport:
    dense = Counter({r.reason: n for r, n in site.ran.items() if r.reason is not None})
    if not site.ran:
        reason = site.refusal or "not called yet"
        return SiteReport(site.name, "dense" if site.refusal else "never", 1.0, reason)
    ran = "sparse" if not dense else "dense" if dense.total() == site.ran.total() else "mixed"
    return SiteReport(site.name, ran, _density(site.ran), dense.most_common(1)[0][0] if dense else None)


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
