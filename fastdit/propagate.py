"""Encoder propagation: the features of a denoiser's first half, computed at key steps and used for the steps between.

Faster Diffusion (Li et al., NeurIPS 2024, arXiv 2312.09608). From step to step a UNet's encoder features (the skips and the
middle) hardly change, its decoder's do. At a key step everything runs; at any other, the encoder's modules answer with what
they gave at the last key step, and only the decoder runs, with the step's own time embedding. Its prediction then does not
depend on the latents: the steps up to the next key step may be decoded in one batch, and a ControlNet need not run.

The model's own forward runs at every call; diffusers hooks on its modules (`replay.py`) answer for them.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from fastdit.clock import Clock
from fastdit.facts import Encoder
from fastdit.features import Branches, Running
from fastdit.inject import Injection
from fastdit.replay import ControlHook, DenoiserHook, JoinHook, KeepHook, SkipHook

NAME = "fastdit_encoder"
KEY_STEPS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""The paper's, for 50 steps of DDIM."""


@dataclass
class Counts:
    """Calls of the denoiser, runs of its encoder and of its decoder, runs of the ControlNet, in the latest run."""

    calls: int = 0
    encoder: int = 0
    decoder: int = 0
    control: int = 0


class Propagation:
    """Encoder propagation on one pipeline or model, until `restore`. Also a context manager.

    counts: of the latest run. All that is kept is kept here; it goes when a run begins, ends or raises.
    """

    def __init__(self, key_steps: int | tuple[int, ...], noise: float, batch: int | None, pipeline: Any = None) -> None:
        self.key_steps, self.batch = key_steps, batch
        self.counts = Counts()
        self.running: Running | None = None
        self.clock = Clock()
        self._injection = Injection(noise) if noise else None
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._schedule: Any = None
        self._levels: list[float] = []
        self._once = False
        self._branches: list[Branches] = []
        self._hooked: list[nn.Module] = []

    def __repr__(self) -> str:
        n = self.counts
        control = f", ControlNet {n.control}" if n.control else ""
        return f"Propagation(key_steps={self.key_steps}: {n.calls} calls, encoder {n.encoder}, decoder {n.decoder}{control})"

    def __enter__(self) -> Propagation:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def install(self, model: nn.Module, encoder: Encoder) -> None:
        self._hook(model, DenoiserHook(self, self._new_branches(model)))
        for module in encoder.keep:
            self._hook(module, KeepHook(self))
        for module in encoder.skip:
            self._hook(module, SkipHook(self))
        for join in encoder.joins:
            self._hook(join.conv, JoinHook(self, join.varies))

    def install_control(self, model: nn.Module) -> None:
        self._hook(model, ControlHook(self, self._new_branches(model)))

    def _new_branches(self, model: nn.Module) -> Branches:
        self._branches.append(Branches(model))
        return self._branches[-1]

    def _hook(self, module: nn.Module, hook: ModelHook) -> None:
        with _inside_accelerate(module):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
        self._hooked.append(module)

    def restore(self) -> None:
        """Take every hook off. A second call does nothing."""
        for module in self._hooked:
            registry: Any = module._diffusers_hook
            with _inside_accelerate(module):
                registry.remove_hook(NAME, recurse=False)
            if not registry.hooks:
                del module._diffusers_hook
            if vars(module).get("forward") == types.MethodType(type(module).forward, module):
                del module.forward  # the registry leaves the class's own on the object
        self._hooked.clear()
        self.reset()
        if self._injection is not None:
            self._injection.restore()

    def reset(self) -> None:
        """Forget everything kept: the next call begins a run."""
        self.clock, self.running, self._schedule, self._levels = Clock(), None, None, []
        for branches in self._branches:
            branches.clear()

    def observe(self, timestep: Any) -> tuple[float, bool]:
        """Take in the timestep of a call: it as a number, and whether its step is a key step."""
        now = float(timestep.amax() if isinstance(timestep, Tensor) else timestep)
        scheduler = None if self._pipeline is None else getattr(self._pipeline(), "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)  # a new object in each run
        if self.clock.observe(now) or schedule is not self._schedule:
            self.reset()
            self.clock.observe(now)
            self.counts, self._schedule = Counts(), schedule
            listed = [] if schedule is None else schedule.tolist() if hasattr(schedule, "tolist") else schedule
            times = [float(time) for time in listed]
            self._levels = sorted(set(times), reverse=True)
            self._once = times.count(min(times, default=0)) == 1  # solvers of second order come twice
            if self._injection is not None:
                self._injection.begin(scheduler, self._levels)
        return now, self._is_key(self.clock.step)

    def _is_key(self, step: int) -> bool:
        return step % self.key_steps == 0 if isinstance(self.key_steps, int) else step in self.key_steps

    def together(self, now: float) -> list[float]:
        """The timesteps to decode in one batch: this one and those that follow up to the next key step, at most `batch`."""
        if self.batch == 1 or now not in self._levels:
            return [now]
        times = self._levels[self._levels.index(now) :][: self.batch]
        key = next((i for i in range(1, len(times)) if self._is_key(self.clock.step + i)), len(times))
        return times[:key]

    def ends(self, now: float) -> bool:
        """Whether no other call will follow, so that nothing need be kept. (What an early end leaves, the next run drops.)"""
        return bool(self._levels) and now == self._levels[-1] and self._once


@contextlib.contextmanager
def _inside_accelerate(module: Any) -> Iterator[None]:
    """Change a module's forward beneath accelerate's offloading, which takes its own forward off and on after every run."""
    outer = vars(module).get("forward") if "_old_forward" in vars(module) else None
    if outer is not None:
        module.forward = module._old_forward
    yield
    if outer is not None:
        module._old_forward, module.forward = module.forward, outer


def propagation_of(model: nn.Module) -> Propagation | None:
    """What is installed on a model, if anything is."""
    registry: Any = getattr(model, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(NAME)
    return None if hook is None else hook.propagation
