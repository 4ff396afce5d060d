"""The diffusers hooks of encoder propagation (`propagate.py`): on the denoiser, its ControlNet, and modules of its encoder.

One exact addition to the paper: where the decoder convolves a skip joined to its own feature, the skip's part of the
convolution stays the same until the next key step and is computed once (`JoinHook`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from fastdit.encoder_reuse.features import (
    Branch,
    Branches,
    Running,
    clone_writable,
    equal_arguments,
    first_step,
    latents,
    repeat_batch,
    residuals,
)

if TYPE_CHECKING:
    from fastdit.encoder_reuse.propagate import Propagation


class Hook(ModelHook):
    """A hook that holds its propagation and its module."""

    fn_ref: Any

    def __init__(self, propagation: Propagation) -> None:
        super().__init__()
        self.propagation = propagation

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.module = module
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if module is not self.module:  # diffusers' hooks of a copy call the original's modules
            raise RuntimeError("this model is a copy of one with encoder propagation: call fastdit.restore(copy) first")
        return args, kwargs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hooked module's original forward."""
        return self.fn_ref.original_forward(*args, **kwargs)


class WholeHook(Hook):
    """A hook around a whole model, with its branches."""

    _is_stateful = True

    def __init__(self, propagation: Propagation, index: int) -> None:
        super().__init__(propagation)
        self.index = index

    @property
    def branches(self) -> Branches:
        return self.propagation.state.branches[self.index]

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.propagation.reset()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.call(self.branches.arguments(args, kwargs))
        except BaseException:
            self.propagation.reset()
            raise
        finally:
            self.propagation.state.running = None

    def call(self, call: dict[str, Any]) -> Any:
        raise NotImplementedError


class DenoiserHook(WholeHook):
    def call(self, call: dict[str, Any]) -> Any:
        ours = self.propagation
        now, key = ours.observe(call["timestep"])
        ours.state.counts.calls += 1
        branch = self.branches.find(call)
        if key or branch is None:
            branch = self.branches.renew(call, ours.state.clock.step)
            ours.state.counts.encoder += 1
            ours.state.counts.decoder += 1
            ours.state.running = Running(branch, encodes=True)
            found = self.forward(**call)
        else:
            branch.step = ours.state.clock.step
            found = self.decode(branch, call, now)
        if ours.ends(now):
            self.branches.drop(branch)
        return found

    def decode(self, branch: Branch, call: dict[str, Any], now: float) -> Any:
        ours = self.propagation
        if not equal_arguments(branch.residuals, residuals(call)):
            branch.ahead.clear()
            branch.fixed.clear()
            branch.residuals = residuals(call)
        if now in branch.ahead:
            return branch.ahead.pop(now)
        times, batch = ours.together(now), len(latents(call))
        ours.state.counts.decoder += 1
        ours.state.running = Running(branch, False, batch, len(times))
        if len(times) == 1:
            return self.forward(**call)
        given = call["timestep"]
        if not isinstance(given, Tensor):  # converted as the models do
            kind = torch.float64 if isinstance(given, float) else torch.int64
            given = torch.tensor(given, dtype=kind, device=latents(call).device)
        several = repeat_batch(call, batch, len(times)) | {
            "timestep": torch.tensor(times, dtype=given.dtype, device=given.device).repeat(batch)
        }
        out = self.forward(**several)
        pieces = out[0].unflatten(0, (batch, len(times))).unbind(1)
        branch.ahead = {
            time: (piece,) if isinstance(out, tuple) else type(out)(sample=piece)
            for time, piece in zip(times, pieces, strict=True)
        }
        return branch.ahead.pop(now)


class ControlHook(WholeHook):
    """A ControlNet runs at key steps; until the next one its residuals are reused, like the encoder's features."""

    def call(self, call: dict[str, Any]) -> Any:
        ours = self.propagation
        now, key = ours.observe(call["timestep"])
        branch = self.branches.find(call)
        if key or branch is None:
            branch = self.branches.renew(call, ours.state.clock.step)
            ours.state.counts.control += 1
            branch.kept = self.forward(**call)
        branch.step = ours.state.clock.step
        if ours.ends(now):
            self.branches.drop(branch)
        return branch.kept


class KeepHook(Hook):
    """A module of the encoder: its outputs are kept at key steps and returned at other steps."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = self.propagation.state.running
        if running is None:
            return self.forward(*args, **kwargs)
        if running.encodes:
            found = self.forward(*args, **kwargs)
            running.branch.kept[module] = clone_writable(found)
            return found
        return clone_writable(repeat_batch(running.branch.kept[module], running.batch, running.times))


class SkipHook(Hook):
    """A module of the encoder whose output is not used at other steps: it returns its input then."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = self.propagation.state.running
        if running is None or running.encodes:
            return self.forward(*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]


class JoinHook(Hook):
    """A convolution of decoder features joined to skips, split into a sum; the skips' term is computed once per key step."""

    def __init__(self, propagation: Propagation, varies: int) -> None:
        super().__init__(propagation)
        self.varies = varies

    def new_forward(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        running, n, weight = self.propagation.state.running, self.varies, conv.weight
        # If the weights are stored on another device or in another format, a hook below this one loads them.
        if running is None or running.encodes or weight.dtype != x.dtype or weight.device != x.device:
            return self.forward(x)
        fixed = running.branch.fixed.get(conv)
        if fixed is None:
            skips = first_step(x, running.batch, running.times)[:, n:]
            fixed = conv._conv_forward(skips, weight[:, n:], None if n else conv.bias).detach()
            running.branch.fixed[conv] = fixed
        fixed = repeat_batch(fixed, running.batch, running.times)
        return conv._conv_forward(x[:, :n], weight[:, :n], conv.bias) + fixed if n else fixed
