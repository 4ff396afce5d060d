"""Known before the run: what each preset will do for a clip, without loading weights again and without a forward.

    tokens        the autoencoder's scale and the denoiser's patch: exact
    density       the scheduler's own noise levels, the tile maps of static policies: as `report` counts it
    statistics    by `approx.placement`'s arithmetic, in the order of a run
    ratio         of denoising, dense over accelerated, by `cost.py`; "measured" rates or "estimated" ones (`cards.py`)

What depends on the data is None, which is shown as "unknown": the density of policies that read q and k, and noise levels that
a scheduler does not tell. An error budget is not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdit import ops
from fastdit.api import _config, _denoisers
from fastdit.approx.memory_budget import free_bytes
from fastdit.approx.residual_store import bytes_of
from fastdit.config import Config
from fastdit.core.layout import Grid
from fastdit.planning.forward_plan import above, dense_because, layout_of
from fastdit.policies import Dense
from fastdit.prediction import cards, cost, shape
from fastdit.prediction.statistics import HOST, Store
from fastdit.presets import PRESETS
from fastdit.runs.run import STALE

ACTIVATIONS = 22
"""Bytes of a forward beside the weights, for a token and channel: peaks of docs/results/gpu_denoisers.json, .3 of them off."""
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Forecast:
    """One configuration. density: mean over all calls of all sites, in [0, 1], None: unknown. dense: (reason, number of sites)
    of those that never are sparse. gpu_bytes, host_bytes: most that statistics take. forms: (form, residuals). about: the bytes
    depend on errors that only a run measures. ratio: seconds of denoising, dense over accelerated, None: unknown. sure:
    "measured", "estimated" or "unknown". why: what is unknown, or that nothing is gained."""

    name: str
    config: Config
    density: float | None
    dense: tuple[tuple[str, int], ...]
    gpu_bytes: int
    host_bytes: int
    forms: tuple[tuple[str, int], ...]
    about: bool
    ratio: float | None
    sure: str
    why: str | None = None

    @property
    def speed(self) -> str:
        """The ratio in words."""
        return "unknown" if self.ratio is None else f"{self.ratio:.2f} × ({self.sure})"


@dataclass(frozen=True)
class Prediction:
    """What `predict` returns. grid: tokens (T, H, W). text: other tokens in the same sequence, "at most" where not `exact`.
    tokens: grid and text together. levels: σ of every step, None: unknown. branches: calls a step for one clip. gpu: a name,
    or "cpu". weights, free: bytes of the pipeline, and free for the run before statistics, on the GPU (or the CPU).
    step_seconds: of one dense step with all branches, None: not measured on such a device. forecasts: one a configuration."""

    pipeline: str
    grid: Grid
    text: int
    exact: bool
    steps: int
    levels: tuple[float, ...] | None
    branches: int
    gpu: str
    weights: int
    free: int
    step_seconds: float | None
    forecasts: tuple[Forecast, ...]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) + self.text

    def __getitem__(self, name: str) -> Forecast:
        """The forecast of a preset. Raises KeyError."""
        return {each.name: each for each in self.forecasts}[name]

    def line(self, name: str | None = None) -> str:
        """One forecast in a line; None: the first."""
        found = self.forecasts[0] if name is None else self[name]
        density = "unknown" if found.density is None else f"{found.density:.2f}"
        text = f"{self.tokens:,} tokens, {found.name}: density {density}, statistics {_memory(found)}, {found.speed}"
        return f"{text}{f' ({found.why})' if found.why else ''}"

    def __str__(self) -> str:
        t, h, w = self.grid
        text = "" if not self.text else f" and {'' if self.exact else 'at most '}{self.text} of text"
        step = "" if self.step_seconds is None else f", about {self.step_seconds:.2f} s a dense step"
        head = (
            f"{self.pipeline} on {self.gpu}: {t}×{h}×{w} = {t * h * w:,} tokens{text}, {self.steps} steps, "
            f"{self.branches} call{'s' * (self.branches > 1)} each{step}\n"
            f"weights {_gb(self.weights)}, free beside the run {_gb(self.free)}"
        )
        rows = [("preset", "density", "statistics", "speed of denoising", "stays dense, and why")]
        for each in self.forecasts:
            why = "; ".join([f"{count} sites: {reason}" for reason, count in each.dense] + ([each.why] if each.why else []))
            density = "unknown" if each.density is None else f"{each.density:.3f}"
            rows.append((each.name, density, _memory(each), each.speed, why))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        found = {name: value for name, value in vars(self).items() if name != "forecasts"}
        rows = [{**vars(each), "config": each.config.to_dict()} for each in self.forecasts]
        return found | {"tokens": self.tokens, "forecasts": rows}


def predict(
    pipe: Any,
    height: int,
    width: int,
    num_frames: int | None = None,
    steps: int = 50,
    preset_or_config: str | Config | None = None,
    gpu: str | None = None,
    *,
    guidance: float | None = None,
    text_tokens: int | None = None,
    memory: float | None = None,
) -> Prediction:
    """What a run of a pipeline will take, for one configuration or every preset. Calls nothing of the pipeline and allocates
    nothing of its size; its weights may be on the meta device.

    height, width: pixels; num_frames: None for a picture. gpu: "H100", "RTX 4090", …, or "cpu"; None: where the pipeline is, or
    this machine's GPU for one on the meta device. guidance: the scale; None: the pipeline's default. text_tokens: of the
    prompt; None: the longest that the pipeline reads. memory: GB of the GPU that the process may use; None: all of a named one,
    or what is free now.

    Raises ValueError for sizes that the model does not take, steps below 1, an unknown GPU or preset, and a denoiser whose
    tokens are not known without a call (UNets, models described by `install`).

    Example:
        >>> print(fastdit.predict(pipe, 720, 1280, 81, steps=50, gpu="RTX 4090"))  # doctest: +SKIP
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 up, got {steps!r}")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory must be above 0 GB, got {memory}")
    named = dict(PRESETS) if preset_or_config is None else {
        preset_or_config if isinstance(preset_or_config, str) else "config": _config(preset_or_config)
    }  # fmt: skip
    models = [model for _, model in _denoisers(pipe)]
    models = models if getattr(getattr(pipe, "config", None), "boundary_ratio", None) else models[:1]
    run = _Run(pipe, models, height, width, num_frames, steps, gpu, guidance, text_tokens, memory)
    forecasts = tuple(run.forecast(name, config) for name, config in named.items())
    levels = None if run.levels is None else tuple(run.levels)
    return Prediction(
        type(pipe).__name__, run.grid, run.text, run.exact, steps, levels, run.branches, run.name, run.weights,
        run.free[run.device], run.dense_step if run.card is not None and run.card.measured else None, forecasts,
    )  # fmt: skip


class _Run:
    """What all configurations share: sizes, levels, device."""

    def __init__(
        self, pipe: Any, models: list[Any], height: int, width: int, num_frames: int | None, steps: int, gpu: str | None,
        guidance: float | None, text_tokens: int | None, memory: float | None,
    ) -> None:  # fmt: skip
        self.models, model = models, models[0]
        family = shape.family(model)
        self.grid = shape.grid(pipe, model, height, width, num_frames)
        self.text, longest, self.exact = shape.text_of(pipe, family, text_tokens)
        self.span = shape.span(family, self.grid, self.text)
        self.branches = shape.branches(pipe, model, guidance)
        self.levels = shape.noise_levels(pipe, family, steps, math.prod(self.grid))
        self.steps = steps
        boundary = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
        self.boundary = boundary if len(models) > 1 else None
        self.sites = [[shape.heads_of(each, module) for _, module in family.sites(each)] for each in models]
        self._device(pipe, model, gpu, memory)
        self.rates = None if self.unmeasured else cards.rates(self.card)
        if self.rates is not None:
            crosses = sum(why == "cross-attention" for _, why in family.left(model))
            heads, dim = self.sites[0][0]
            self.rest = cost.rest_seconds(
                model, self.span.tokens, longest, len(self.sites[0]), heads * dim, crosses, self.rates
            )
            self.dense_step = self.branches * self.seconds([cost.Call(self.span.tokens, h, d) for h, d in self.sites[0]])
        else:
            self.dense_step = None

    def _device(self, pipe: Any, model: Any, gpu: str | None, memory: float | None) -> None:
        """card, name, device, weights, free."""
        here = next(model.parameters()).device
        parts = {id(part): part for part in vars(pipe).values() if isinstance(part, torch.nn.Module)} or {0: model}
        self.weights = sum(x.nbytes for part in parts.values() for x in part.parameters())
        self.unmeasured = False
        at = CUDA if here.type == "meta" and torch.cuda.is_available() else here
        if gpu is None and at.type == "cuda":
            self.name, self.device = torch.cuda.get_device_name(at), CUDA
            try:
                self.card: cards.Card | None = cards.card(self.name)
            except ValueError:
                self.card, self.unmeasured = None, True
        elif gpu is None or gpu.lower() == cards.CPU:
            self.card, self.name, self.device = None, cards.CPU, HOST
        else:
            self.card = cards.card(gpu)
            self.name, self.device = self.card.name, CUDA
        heads, dim = self.sites[0][0]
        working = ACTIVATIONS * self.span.tokens * heads * dim
        host = free_bytes(HOST)
        if self.device == HOST:
            self.free = {HOST: max(0, host - (self.weights if here.type == "meta" else 0))}
            return
        if memory is None and gpu is None:
            free = free_bytes(at) - (0 if here.type == "cuda" else self.weights) - working
        else:
            total = memory if memory is not None else self.card.memory if self.card is not None else 0.0
            free = int(total * 1e9) - self.weights - working
        self.free = {CUDA: max(0, free), HOST: host}

    def seconds(self, calls: Sequence[cost.Call]) -> float:
        """One forward."""
        assert self.rates is not None
        counted = Counter(calls)
        busy = self.rest + sum(count * cost.attention_seconds(call, self.rates) for call, count in counted.items())
        return max(busy, self.rates.host * len(calls))

    def why_dense(self, config: Config, index: int | None, dim: int) -> str | None:
        if index is None:
            return "no phase holds" if config.phases else "the configuration is dense"
        phase, tokens, device = config.phases[index], self.span.tokens, self.device.type
        if (why := dense_because(config, phase, tokens, dim, device)) is not None:
            return why
        if self.device == HOST and (why := ops.unsupported(torch.empty(1, 1, 64, dim), phase.quant)) is not None:
            return why
        if self.card is not None and self.card.dense8 is None and "fp8" in str(phase.quant):
            return f"{self.card.name} has no FP8"
        return None

    def forecast(self, name: str, config: Config) -> Forecast:
        """Walk through the run as it will be: step by step, layer by layer."""
        if self.levels is None:
            return Forecast(name, config, None, (), 0, 0, (), False, None, "unknown", "the scheduler does not tell its steps")
        store, uses = Store(self.free), {}
        latest: dict[tuple[int, int], tuple[int | None, int]] = {}  # (model, layer) -> phase, step
        shares: list[float] = []
        reasons: Counter[tuple[int, int, str]] = Counter()
        sparse: set[tuple[int, int]] = set()
        fast = dense = 0.0
        unknown = None
        for step, sigma in enumerate(self.levels):
            which = int(self.boundary is not None and sigma < self.boundary)
            sites, calls = self.sites[which], []
            for key in [key for key, (_, last) in latest.items() if last < step - STALE]:
                del latest[key]
                _forget(store, key)
            for layer, (heads, dim) in enumerate(sites):
                key, index = (which, layer), config.at(sigma, layer, len(sites))
                if key in latest and latest[key][0] != index:
                    _forget(store, key)
                    uses.pop(key, None)
                latest[key] = index, step
                call, share, why = self._call(config, index, heads, dim, key, store, uses)
                calls.append(call)
                if share is None:
                    unknown = why
                    continue
                shares.append(share)
                if call.how == "dense" and why is not None:
                    reasons[(*key, why)] += 1
                else:
                    sparse.add(key)
            if self.rates is not None:
                fast += self.seconds(calls)
                dense += self.seconds([cost.Call(self.span.tokens, h, d) for h, d in sites])
        left = Counter(why for (model, layer, why) in reasons if (model, layer) not in sparse)
        ratio, sure = self._sure(unknown, fast, dense)
        density = None if unknown else sum(shares) / len(shares)
        if ratio is not None and not sparse:
            ratio, unknown = 1.0, "all attention stays dense"
        elif unknown is None and self.rates is None:
            unknown = f"{self.name} is not in the table: name one like it"
        on_gpu = store.peak.get(CUDA, 0)
        return Forecast(
            name, config, density, tuple(left.most_common()), on_gpu, store.peak[HOST], tuple(store.forms.items()),
            store.shared, ratio, sure, unknown,
        )  # fmt: skip

    def _sure(self, unknown: str | None, fast: float, dense: float) -> tuple[float | None, str]:
        if unknown or self.rates is None:
            return None, "unknown"
        measured = self.card is not None and self.card.measured and self.sites[0][0][1] in (64, 128)
        return dense / fast, "measured" if measured else "estimated"

    def _call(
        self, config: Config, index: int | None, heads: int, dim: int, key: tuple[int, int], store: Store,
        uses: dict[tuple[int, int], int],
    ) -> tuple[cost.Call, float | None, str | None]:  # fmt: skip
        """One call of a site: what it costs, its density (None: unknown), and why it is dense or unknown."""
        tokens = self.span.tokens
        stock = cost.Call(tokens, heads, dim)
        if (why := self.why_dense(config, index, dim)) is not None or index is None:
            return stock, 1.0, why
        phase = config.phases[index]
        if isinstance(phase.policy, Dense):
            return cost.Call(tokens, heads, dim, quant=phase.quant), 1.0, None
        if not phase.policy.static:
            return stock, None, f"{phase.policy} decides while it draws"
        layout = layout_of(config, self.span.grid, self.span.others, self.span.before > 0)
        found = cost.kept(phase.policy, layout, config.first_frame)
        if found is None:
            return stock, None, f"{phase.policy} has too many tiles there to count"
        density, pairs = found
        if density > config.max_density:
            return stock, 1.0, above(density, config.max_density)
        reuse = phase.reuse
        call = cost.Call(
            tokens, heads, dim, "sparse", pairs, phase.quant, phase.remainder == "pooled", reuse.kind == "broadcast"
        )
        if reuse.kind == "none":
            return call, density, None
        age = uses.get(key, -1) + 1
        uses[key] = age
        if age % reuse.refresh:
            host = sum(store.kept[(*key, b)].bytes(HOST) for b in range(self.branches)) if self.device == CUDA else 0
            return call.turned("reuse", host // self.branches), 0.0 if call.broadcast else density, None
        if age == 0:
            for branch in range(self.branches):
                if store.add((*key, branch), (1, heads, tokens, dim), reuse) is None:
                    _forget(store, key)
                    uses.pop(key)
                    size = bytes_of((1, heads, tokens, dim), "bfloat16")
                    return stock, 1.0, f"{reuse.kind}: no room for {_gb(size)} beside {_gb(sum(map(store.held, store.free)))}"
        return call.turned("refresh"), 1.0, None


def _forget(store: Store, key: tuple[int, int]) -> None:
    for each in [each for each in store.kept if each[:2] == key]:
        del store.kept[each]


def _memory(found: Forecast) -> str:
    if not found.gpu_bytes + found.host_bytes:
        return "none"
    places = [f"{_gb(size)} {where}" for size, where in ((found.gpu_bytes, "GPU"), (found.host_bytes, "host")) if size]
    names = "+".join(form for form, _ in found.forms)
    return f"{'about ' if found.about else ''}{', '.join(places)} ({names})"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
