"""The report of a run: density, number format, error and time per phase and per site, and why calls stayed dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdit.approx import error_guard
from fastdit.attach.handle import Handle, Site
from fastdit.config import Config, Phase
from fastdit.runs.site_state import NEW, CallRecord, SiteState

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PhaseReport:
    """One phase. sigma: (high, low). density: mean over its calls, share of all query-key pairs in [0, 1]. calls: of its
    sites. seconds: of their attention. error: mean relative L2 on the guard's rows, None if not measured. reused: calls
    completed by statistics."""

    sigma: tuple[float, float]
    policy: str
    quant: str
    remainder: str
    reuse: str
    density: float
    calls: int
    seconds: float
    error: float | None
    reused: int


@dataclass(frozen=True)
class SiteReport:
    """One site. ran: "sparse", "dense", "mixed" or "never". quant: the number format of most calls. reason: the most frequent
    cause of calls that stayed dense or of statistics not kept. error: the largest measured. rung: the guard's level, in words.
    reused: calls completed by statistics. memory: peak bytes of statistics."""

    name: str
    ran: str
    density: float
    quant: str
    reason: str | None
    seconds: float
    error: float | None
    rung: str
    reused: int
    memory: int


@dataclass(frozen=True)
class Report:
    """The latest run of a pipeline. density: mean over all calls of all sites. memory: sum of the sites' peak bytes of
    statistics, which are freed after the run's last step."""

    config: Config
    density: float
    phases: tuple[PhaseReport, ...]
    sites: tuple[SiteReport, ...]
    memory: int
    calls: tuple[tuple[int, CallRecord], ...]
    """(index of the site, its record), ordered by step."""
    left: tuple[tuple[str, int], ...] = ()
    """(reason, count) of the attention modules that are not self-attention of the picture and were left unchanged."""

    @classmethod
    def of(cls, handle: Handle, pipeline: Any = None) -> Report:
        """The report of the latest run. pipeline: whose run, if several pipelines share a model."""
        config, run = handle.config, handle.run_of(pipeline)
        run.settle()
        timed = [[_timed(ran) for ran in state.calls] for state in run.sites]
        calls = [(site.index, ran) for site, rans in zip(handle.sites, timed, strict=True) for ran in rans]
        calls.sort(key=lambda call: call[1].step)
        total = [ran for _, ran in calls]
        phases = [_phase(phase, [ran for ran in total if ran.phase == i]) for i, phase in enumerate(config.phases)]
        if outside := [ran for ran in total if ran.phase is None]:  # noise levels and layers outside all phases
            phases.append(_phase(Phase(), outside))
        unserved = {site.index: why for denoiser in handle.denoisers for site, why in denoiser.unserved()}
        sites = tuple(
            _site(site, state, rans, unserved.get(site.index))
            for site, state, rans in zip(handle.sites, run.sites, timed, strict=True)
        )
        left = sum((denoiser.skipped_modules for denoiser in handle.denoisers), Counter())
        memory = sum(site.memory for site in sites)
        return cls(config, _density(total), tuple(phases), sites, memory, tuple(calls), tuple(left.most_common()))

    def to_dict(self, calls: bool = False) -> dict[str, Any]:
        """A dictionary for JSON. calls: include one row per call of each site."""
        found: dict[str, Any] = {
            "config": self.config.to_dict(),
            "density": self.density,
            "memory": self.memory,
            "phases": [vars(phase) | {"sigma": list(phase.sigma)} for phase in self.phases],
            "sites": [dict(vars(site)) for site in self.sites],
            "left": dict(self.left),
            "trimmed": self.trimmed,
            "verdict": self.verdict,
        }
        return found | {"calls": [{"site": site} | ran._asdict() for site, ran in self.calls]} if calls else found

    @property
    def verdict(self) -> str:
        """What ran, in one line: how many fewer pairs of tokens, which layers stayed dense and why, the largest measured error.

        Example: "2.3 × fewer pairs; 12 of 40 layers dense because 197 tokens where the denoiser's input makes 192; largest
        measured error .04", or "nothing was accelerated: 2,304 tokens, this CPU needs 4,096".
        """
        called = [site for site in self.sites if site.ran != "never"]
        if not called:
            return "not called yet: nothing ran"
        dense = [site for site in called if site.ran == "dense"]
        if len(dense) == len(called):
            return f"nothing was accelerated: {_most(dense) or 'the configuration is dense'}"
        said = [f"{1 / self.density:.2g} × fewer pairs" if self.density < 1 else "all pairs"]
        formats = Counter(ran.quant for _, ran in self.calls if ran.quant != "none")
        if formats:
            said[0] += f", {sum(formats.values()) / len(self.calls):.0%} of calls in {formats.most_common(1)[0][0]}"
        if dense:
            said.append(f"{len(dense)} of {len(self.sites)} layers dense because {_most(dense)}")
        elif lost := [site for site in called if site.ran == "mixed"]:
            share = sum(ran.density == 1 for _, ran in self.calls) / len(self.calls)
            said.append(f"{share:.0%} of calls dense because {_most(lost)}" if share else "some calls dense")
        if never := len(self.sites) - len(called):
            said.append(f"{never} of {len(self.sites)} layers not called")
        errors = [site.error for site in called if site.error is not None]
        if errors:
            said.append(f"largest measured error {short(max(errors))}")
        return "; ".join(said)

    @property
    def trimmed(self) -> int:
        """Number of padded keys cut, summed over all calls."""
        return sum(ran.trimmed for _, ran in self.calls)

    def heatmap(self, what: str = "density") -> Image:
        """A heatmap of "density", "error" or "seconds" over steps (x) and sites (y). Raises ValueError for anything else."""
        from fastdit.reporting.heatmap import of_calls

        return of_calls(self.calls, what, len(self.sites))

    def __str__(self) -> str:
        rows = [("noise level", "policy", "quant", "remainder", "reuse", "density", "error", "seconds", "calls", "reused")]
        rows += [
            (
                f"{p.sigma[0]:g} … {p.sigma[1]:g}", p.policy, p.quant, p.remainder, p.reuse, f"{p.density:.3f}",
                _number(p.error), f"{p.seconds:.3f}", str(p.calls), str(p.reused),
            )
            for p in self.phases
        ]  # fmt: skip
        sites = Counter((site.ran, site.reason or "", site.rung) for site in self.sites)
        notes = [
            f"{count} sites {ran}"
            + (f" ({reason})" if reason else "")
            + (f", now {rung}" if rung != error_guard.LEVELS[0] else "")
            for (ran, reason, rung), count in sites.items()
        ]
        notes += [f"{count} modules left alone ({why})" for why, count in self.left]
        if gaps := self.config.gaps():
            named = ", ".join(f"{high:g} … {low:g}" for high, low in gaps)
            notes.append(f"no phase names the noise levels {named}: dense there")
        if self.trimmed:
            notes.append(f"padded text cut: {self.trimmed / len(self.calls):.0f} keys a call")
        if self.memory:
            notes.append(f"statistics held: {self.memory / 2**20:.1f} MB")
        return "\n".join([self.verdict, *table(rows), *notes, f"density over all calls: {self.density:.3f}"])

    def layers(self) -> str:
        """A table with one row per site; `str` of the report only counts them."""
        rows = [("site", "ran", "quant", "density", "error", "seconds", "reused", "MB held", "guard", "reason")]
        rows += [
            (
                s.name, s.ran, s.quant, f"{s.density:.3f}", _number(s.error), f"{s.seconds:.3f}", str(s.reused),
                f"{s.memory / 2**20:.1f}", s.rung, s.reason or "",
            )
            for s in self.sites
        ]  # fmt: skip
        return "\n".join(table(rows))


def _timed(ran: CallRecord) -> CallRecord:
    if not isinstance(ran.seconds, tuple):
        return ran
    start, end = ran.seconds
    end.synchronize()
    return ran._replace(seconds=start.elapsed_time(end) / 1000)


def _phase(phase: Phase, ran: Sequence[CallRecord]) -> PhaseReport:
    measured = [r.error for r in ran if r.error is not None]
    return PhaseReport(
        phase.sigma, str(phase.policy), str(phase.quant), phase.remainder, str(phase.reuse), _density(ran), len(ran),
        sum(r.seconds for r in ran), sum(measured) / len(measured) if measured else None, sum(r.how == "reuse" for r in ran),
    )  # fmt: skip


def _density(ran: Sequence[CallRecord]) -> float:
    return sum(r.density for r in ran) / len(ran) if ran else 1.0


def _site(site: Site, state: SiteState, timed: Sequence[CallRecord], unserved: str | None) -> SiteReport:
    lost = state.lost or unserved
    if not timed:
        lost = lost or site.refusal
        ran = "dense" if lost else "never"
        return SiteReport(
            site.name, ran, 1.0, "none", lost or "not called yet", 0.0, None, error_guard.LEVELS[state.level], 0, 0
        )
    # A refresh counts as dense where its branch was new: no statistics served it, and it served none.
    dense = sum(r.how == "dense" or (r.how == "refresh" and r.reason == NEW) for r in timed)
    reasons = Counter(r.reason for r in timed if r.reason is not None)
    return SiteReport(
        site.name,
        "dense" if dense == len(timed) else "mixed" if dense or lost else "sparse",
        _density(timed),
        Counter(r.quant for r in timed).most_common(1)[0][0],
        lost or (reasons.most_common(1)[0][0] if reasons else None),
        sum(r.seconds for r in timed),
        max((r.error for r in timed if r.error is not None), default=None),
        error_guard.LEVELS[state.level],
        sum(r.how == "reuse" for r in timed),
        state.peak_bytes,
    )


def _most(sites: Sequence[SiteReport]) -> str | None:
    """The most frequent reason of these sites."""
    reasons = Counter(site.reason for site in sites if site.reason)
    return reasons.most_common(1)[0][0] if reasons else None


def short(value: float) -> str:
    """Two digits, without a zero before the point: .04, 1.2, 3e-05."""
    said = f"{value:.2g}"
    return said[1:] if said.startswith("0.") else said


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The rows as lines, cells below each other."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
