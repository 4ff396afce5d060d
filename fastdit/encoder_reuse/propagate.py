"""Encoder propagation: a denoiser's encoder features are computed at key steps and reused in the steps between.

Faster Diffusion (Li et al., NeurIPS 2024, arXiv 2312.09608). From step to step a UNet's encoder features (the skips and the
middle) hardly change, while its decoder's do. At a key step the whole model runs. At other steps the encoder's modules return
their outputs of the last key step, and only the decoder runs, with the step's own time embedding. Its prediction then does not
depend on the latents: the steps up to the next key step can be decoded in one batch, and a ControlNet need not run.

The model's own forward runs in every call; diffusers hooks on its modules (`hooks.py`) return the kept outputs.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from fastdit.encoder_reuse.features import Branches, Running
from fastdit.encoder_reuse.hooks import ControlHook, DenoiserHook, JoinHook, KeepHook, SkipHook
from fastdit.encoder_reuse.noise_injection import Injection
from fastdit.planning.adapter import Encoder
from fastdit.runs import loops
from fastdit.runs.clock import Clock

NAME = "fastdit_encoder"
KEY_STEPS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""The paper's key steps, for 50 steps of DDIM."""


@dataclass
class Counts:
    """In the latest run: calls of the denoiser, and how often its encoder, its decoder and the ControlNet were computed."""

    calls: int = 0
    encoder: int = 0
    decoder: int = 0
    control: int = 0


@dataclass(eq=False)
class State:
    """State of one run. branches: of each hooked model. running: the denoiser call in progress. schedule: the scheduler's list
    of timesteps. levels: its distinct values, falling. once: whether the last one occurs once in it."""

    branches: list[Branches]
    running: Running | None = None
    clock: Clock = field(default_factory=Clock)
    counts: Counts = field(default_factory=Counts)
    schedule: Any = None
    levels: list[float] = field(default_factory=list)
    once: bool = False

    def clear(self) -> None:
        """Drop everything kept; the next call begins a run."""
        self.clock, self.running, self.schedule, self.levels = Clock(), None, None, []
        for branches in self.branches:
            branches.clear()


class Propagation:
    """Encoder propagation on one pipeline or model, until `restore`. Also a context manager.

    counts: of the latest run. Features belong to a run (a denoising loop, or the calling thread of a model called by hand) and
    are freed when it ends or raises, or when another begins.
    """

    def __init__(self, key_steps: int | tuple[int, ...], noise: float, batch: int | None, pipeline: Any = None) -> None:
        self.key_steps, self.batch = key_steps, batch
        self._injection = Injection(noise) if noise else None
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._models: list[type[nn.Module]] = []
        self._hooked: list[nn.Module] = []
        self.latest = State([])
        self._forget()

    def _forget(self) -> None:
        self.latest.clear()
        self._by_loop: WeakKeyDictionary[loops.Loop, State] = WeakKeyDictionary()
        self._by_hand = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Propagation:
        """For a copied model. It keeps no features, and its hooks raise until the copy is restored."""
        twin = memo[id(self)] = copy.copy(self)
        twin.latest, twin._injection = State([]), None
        twin._forget()
        twin._hooked = copy.deepcopy(self._hooked, memo)
        return twin

    @property
    def state(self) -> State:
        """The state of this thread's run, created if missing."""
        loop = loops.loop()
        found = getattr(self._by_hand, "state", None) if loop is None else self._by_loop.get(loop)
        if found is None:
            found = State([Branches(model) for model in self._models])
            if loop is None:
                self._by_hand.state = found
            else:
                self._by_loop[loop] = found
                loop.at_end(found.clear)
        return found

    @property
    def counts(self) -> Counts:
        return self.latest.counts

    def __repr__(self) -> str:
        n = self.counts
        control = f", ControlNet {n.control}" if n.control else ""
        return f"Propagation(key_steps={self.key_steps}: {n.calls} calls, encoder {n.encoder}, decoder {n.decoder}{control})"

    def __enter__(self) -> Propagation:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def install(self, model: nn.Module, encoder: Encoder) -> None:
        self._hook(model, DenoiserHook(self, self._index(model)))
        for module in encoder.keep:
            self._hook(module, KeepHook(self))
        for module in encoder.skip:
            self._hook(module, SkipHook(self))
        for join in encoder.joins:
            self._hook(join.conv, JoinHook(self, join.varies))

    def install_control(self, model: nn.Module) -> None:
        self._hook(model, ControlHook(self, self._index(model)))

    def _index(self, model: nn.Module) -> int:
        """Register a model; its index in `State.branches`."""
        self._models.append(type(model))
        return len(self._models) - 1

    def _hook(self, module: nn.Module, hook: ModelHook) -> None:
        with _inside_accelerate(module):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
        self._hooked.append(module)

    def restore(self) -> None:
        """Remove every hook. A second call does nothing."""
        for module in self._hooked:
            registry: Any = module._diffusers_hook
            with _inside_accelerate(module):
                registry.remove_hook(NAME, recurse=False)
            if not registry.hooks:
                del module._diffusers_hook
            if vars(module).get("forward") == types.MethodType(type(module).forward, module):
                del module.forward  # the registry leaves the class's forward on the object
        self._hooked.clear()
        self._forget()
        if self._injection is not None:
            self._injection.restore()

    def reset(self) -> None:
        """Drop everything kept for this thread's run; the next call begins a run."""
        self.state.clear()

    def observe(self, timestep: Any) -> tuple[float, bool]:
        """Record the timestep of a call. Returns it as a number, and whether its step is a key step."""
        now = float(timestep.amax() if isinstance(timestep, Tensor) else timestep)
        state, loop, own = self.state, loops.loop(), None if self._pipeline is None else self._pipeline()
        pipeline = own if loop is None or not hasattr(loop.pipeline, "scheduler") else loop.pipeline
        scheduler = getattr(pipeline, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)  # a new object in each run
        if state.clock.observe(now) or schedule is not state.schedule:
            state.clear()
            state.clock.observe(now)
            state.counts, state.schedule, self.latest = Counts(), schedule, state
            times = [] if schedule is None else [float(time) for time in torch.as_tensor(schedule).tolist()]
            state.levels = sorted(set(times), reverse=True)
            state.once = times.count(min(times, default=0)) == 1  # second-order solvers repeat timesteps
            if self._injection is not None and scheduler is getattr(own, "scheduler", None):
                self._injection.begin(scheduler, state.levels)
        return now, self._is_key(state.clock.step)

    def _is_key(self, step: int) -> bool:
        return step % self.key_steps == 0 if isinstance(self.key_steps, int) else step in self.key_steps

    def together(self, now: float) -> list[float]:
        """The timesteps to decode in one batch: this one and those that follow up to the next key step, at most `batch`."""
        state = self.state
        if self.batch == 1 or now not in state.levels:
            return [now]
        times = state.levels[state.levels.index(now) :][: self.batch]
        key = next((i for i in range(1, len(times)) if self._is_key(state.clock.step + i)), len(times))
        return times[:key]

    def ends(self, now: float) -> bool:
        """Whether this is a branch's last call, after which its features can go. After an early end the next run frees them."""
        state = self.state
        return bool(state.levels) and now == state.levels[-1] and state.once


@contextlib.contextmanager
def _inside_accelerate(module: Any) -> Iterator[None]:
    """Change a module's forward beneath accelerate's offloading hook, which removes and restores its own after every run."""
    outer = vars(module).get("forward") if "_old_forward" in vars(module) else None
    if outer is not None:
        module.forward = module._old_forward
    yield
    if outer is not None:
        module._old_forward, module.forward = module.forward, outer


def propagation_of(model: nn.Module) -> Propagation | None:
    """The propagation installed on a model, or None."""
    registry: Any = getattr(model, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(NAME)
    return None if hook is None else hook.propagation
