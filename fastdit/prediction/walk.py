"""A walk through a run as it will be, step by step and layer by layer, without a forward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from fastdit import ops
from fastdit.approx.memory_budget import free_bytes
from fastdit.approx.residual_store import bytes_of
from fastdit.config import Config
from fastdit.planning.forward_plan import above, dense_because, layout_of
from fastdit.policies import Dense
from fastdit.prediction import cards, cost, shape
from fastdit.prediction.forecast import Forecast, gigabytes
from fastdit.prediction.statistics import HOST, Store
from fastdit.runs.run import STALE

ACTIVATIONS = 22
"""Bytes of a forward beside the weights, for a token and channel: peaks of docs/results/gpu_denoisers.json, .3 of them off."""
CUDA = torch.device("cuda")


class Walk:
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
        self.dense_step: float | None = None
        if self.rates is not None:
            crosses = sum(why == "cross-attention" for _, why in family.left(model))
            heads, dim = self.sites[0][0]
            self.rest = cost.rest_seconds(
                model, self.span.tokens, longest, len(self.sites[0]), heads * dim, crosses, self.rates
            )
            self.dense_step = self.branches * self.seconds([cost.Call(self.span.tokens, h, d) for h, d in self.sites[0]])

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
        store = Store(self.free)
        uses: dict[tuple[int, int], int] = {}
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
        if age % reuse.refresh and reuse.drift is None:
            host = sum(store.kept[(*key, b)].bytes(HOST) for b in range(self.branches)) if self.device == CUDA else 0
            return call.turned("reuse", host // self.branches), 0.0 if call.broadcast else density, None
        if age == 0:
            for branch in range(self.branches):
                if store.add((*key, branch), (1, heads, tokens, dim), reuse) is None:
                    _forget(store, key)
                    uses.pop(key)
                    size = bytes_of((1, heads, tokens, dim), "bfloat16")
                    held = gigabytes(sum(map(store.held, store.free)))
                    return stock, 1.0, f"{reuse.kind}: no room for {gigabytes(size)} beside {held}"
        if reuse.drift is not None:
            return call, None, "its refreshes come by need, while it draws"
        return call.turned("refresh"), 1.0, None


def _forget(store: Store, key: tuple[int, int]) -> None:
    for each in [each for each in store.kept if each[:2] == key]:
        del store.kept[each]
