"""The teacher-forced velocity error: inputs of a dense run, fed once more to the accelerated denoiser.

Two clips of one seed drift apart the longer they are denoised, so closeness of the results says little about a single step.
Here every step begins where dense was: |v − v_dense| / |v_dense|, averaged over up to three steps of each phase, or over all of
them where statistics of one step serve the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from fastdit import Config
from fastdit.api import adapters_of, unwrapped
from fastdit.apps.render.load import denoisers
from fastdit.core.reference import relative_error
from fastdit.runs.noise_level import Scale

if TYPE_CHECKING:
    from fastdit.planning.adapter import Adapter, Facts

STEPS_A_PHASE = 3


@dataclass(frozen=True)
class Call:
    """The first call of the denoiser in a step of a dense run, and the velocity that it returned, in main memory.

    leaves: (device, value) of its arguments, flattened; the device of what is no tensor is None. tokens: length of the sequence
    of self-attention, None if the call does not tell."""

    model: nn.Module
    leaves: list[tuple[torch.device | None, Any]]
    spec: Any
    sigma: float
    velocity: Tensor
    tokens: int | None

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments, on their devices."""
        leaves = [value if device is None else value.to(device) for device, value in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs

    def again(self) -> Tensor:
        """The velocity, computed once more, in main memory."""
        args, kwargs = self.inputs()
        with torch.no_grad():
            return velocity_of(self.model(*args, **kwargs)).cpu()


def velocity_of(out: Any) -> Tensor:
    """The first answer of a denoiser; a list of tensors of several shapes (one an image) becomes one."""
    leaves = tree_leaves(out[0])
    return leaves[0] if len(leaves) == 1 else torch.cat([leaf.flatten() for leaf in leaves])


class FirstCalls:
    """Context manager: appends the first denoiser call at every noise level to `calls`, as copies in main memory.

    parts: what `adapters_of` the pipeline finds, if it was restored since. seconds: what copying took.
    """

    def __init__(self, pipe: Any, calls: list[Call], parts: Sequence[tuple[str, nn.Module, Adapter]] | None = None) -> None:
        self.pipe, self.calls, self.seconds = pipe, calls, 0.0
        self.adapters = {id(model): adapter for _, model, adapter in (adapters_of(pipe) if parts is None else parts)}
        self.copies = WeakIdKeyDictionary()  # the text's embedding is the same tensor in every step

    def __enter__(self) -> FirstCalls:
        self.hooks = [model.register_forward_hook(self._seen, with_kwargs=True) for model in denoisers(self.pipe)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.copies.clear()

    @torch.compiler.disable
    def _seen(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        facts = self.adapters[id(unwrapped(model))].facts(unwrapped(model), args, kwargs)
        sigma = self._level(facts)
        if not self.calls or sigma != self.calls[-1].sigma:
            leaves, spec = tree_flatten((args, kwargs))
            kept: list[tuple[torch.device | None, Any]] = [
                (leaf.device, self._copy(leaf)) if isinstance(leaf, Tensor) else (None, leaf) for leaf in leaves
            ]
            velocity = velocity_of(out)
            self.calls.append(Call(model, kept, spec, sigma, self._copy(velocity), tokens_of(facts)))
        self.seconds += time.perf_counter() - start

    def _level(self, facts: Facts) -> float:
        """The noise level as a run sees it."""
        if facts.timestep is None:
            return facts.sigma.amax().item()
        time = facts.timestep.amax().item()
        return Scale.of(getattr(self.pipe, "scheduler", None), time)(time)

    def _copy(self, x: Tensor) -> Tensor:
        if x.is_inference():  # counts no versions: nobody could tell that it was changed in place
            return x.detach().to("cpu", copy=True)
        version, found = self.copies.get(x, (-1, None))
        if found is None or version != x._version:
            found = x.detach().to("cpu", copy=True)
            self.copies[x] = (x._version, found)
        return found


def tokens_of(facts: Facts) -> int | None:
    if facts.missing is not None:
        return None
    grid = facts.grid.tolist() if isinstance(facts.grid, Tensor) else facts.grid
    return math.prod(grid) + facts.text_len


def velocity_error(
    config: Config,
    calls: list[Call],
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
) -> list[dict[str, Any]]:
    """The error in each phase that the run passed: {"sigma", "policy", "error", "steps"}. The pipeline is accelerated by the
    configuration. on_step: called after each step, with 0 and the dense velocity."""
    rows = []
    for index in (None, *range(len(config.phases))):
        inside = [call for call in calls if config.at(call.sigma) == index]
        if not inside:
            continue
        phase = None if index is None else config.phases[index]
        chosen = {round(i * (len(inside) - 1) / (STEPS_A_PHASE - 1)) for i in range(STEPS_A_PHASE)}
        if phase is not None and phase.reuse.kind != "none":
            chosen = set(range(len(inside)))
        errors = []
        for call in (inside[i] for i in sorted(chosen)):
            errors.append(relative_error(call.again(), call.velocity))
            on_step(0, call.velocity)
        rows.append(
            {
                "sigma": [1.0, 0.0] if phase is None else list(phase.sigma),
                "policy": "dense" if phase is None else str(phase.policy),
                "error": sum(errors) / len(errors),
                "steps": len(errors),
            }
        )
    return rows


def worst(rows: Sequence[Mapping[str, Any]]) -> float:
    """The error of the worst phase; 0 without any."""
    return max((row["error"] for row in rows), default=0.0)
