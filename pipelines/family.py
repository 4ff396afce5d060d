"""Base class of the model families: which modules are sites, and how the arguments of a denoiser's call are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdit.core.layout import Grid
from fastdit.planning.adapter import REST, Facts

TRAIN_TIMESTEPS = 1000
LACKING = (KeyError, AttributeError, TypeError, IndexError, ValueError, RuntimeError)
"""Errors raised by reading an argument that is missing or not of the expected form."""

__all__ = ["REST", "Facts", "Family", "grid_of", "length", "noise_level"]


class Family:
    """Facts of one model family. A subclass names the arguments and implements `read`.

    names: leading positional parameters of the denoiser's forward.
    clock: the parameter that is the timestep: `full` in pure noise, 0 at the end; if it `rises`, the reverse.
    skips: parts of the names of modules that are not sites, and why.
    order: first parts of module names in the order in which they run, if that differs from the order of definition.
    packs: latents that the pipelines pack into one token on each side, before the denoiser sees them.
    even: the pipelines hand the scheduler σ from 1 to 1/steps, evenly spaced, before its shift; False: they leave σ to it;
    None: they have a schedule of their own, or it was not looked at.
    text, mask, note: for the table in the docs; the first two also say which text is in the sequence (`fastdit.predict`).
    """

    names: ClassVar[tuple[str, ...]] = ("hidden_states", "encoder_hidden_states", "timestep")
    clock: ClassVar[str] = "timestep"
    full: ClassVar[float] = TRAIN_TIMESTEPS
    rises: ClassVar[bool] = False
    skips: ClassVar[dict[str, str]] = {"attn2": "cross-attention"}
    order: ClassVar[tuple[str, ...]] = ()
    packs: ClassVar[int] = 1
    even: ClassVar[bool | None] = None
    text: ClassVar[str] = "apart (cross-attention)"
    mask: ClassVar[str] = "none"
    note: ClassVar[str] = ""

    def sites(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        found = [(name, module) for name, module in _attentions(model) if self._why_not(name, module) is None]
        if self.order:
            found.sort(key=lambda pair: self._rank(pair[0]))
        yield from found

    def left(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        for name, module in _attentions(model):
            if (why := self._why_not(name, module)) is not None:
                yield name, why

    def facts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts:
        """The facts that `read` returns. If something is missing, the facts hold the reason and still the noise level."""
        named = dict(zip(self.names, args, strict=False)) | kwargs
        call = {name: value for name, value in named.items() if value is not None}  # None counts as missing
        try:
            return self.read(model, call)
        except LACKING as error:
            return Facts((0, 0, 0), self._level(model, call), missing=_lack(error))

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        """Facts of a call. call: its arguments by name, without those that are None. May raise any of `LACKING`."""
        raise NotImplementedError

    def patch(self, model: Any) -> Grid:
        """Latents (t, h, w) of a token, from the denoiser's configuration."""
        size: Any = getattr(model.config, "patch_size", None) or 1
        *front, h, w = (size, size) if isinstance(size, int) else size
        t = front[0] if front else getattr(model.config, "patch_size_t", None) or 1
        return t, h * self.packs, w * self.packs

    def latents(self, frames: int, scale: int) -> int:
        """Frames of latents that the autoencoder, with this scale in time, makes of a clip. Raises ValueError for a clip that
        the pipelines would not draw as it is, naming the nearest."""
        if frames < 1 or ((frames - 1) % scale and frames % scale):
            nearest = scale * max(0, round((frames - 1) / scale)) + 1
            raise ValueError(f"num_frames must be {scale}k + 1 for this model, got {frames}: nearest is {nearest}")
        return (frames - 1) // scale + 1

    def noise(self, model: Any, call: dict[str, Any]) -> Tensor:
        """σ of a call, as in `Facts`."""
        level = noise_level(call[self.clock], self.full)
        return 1 - level if self.rises else level

    def _level(self, model: Any, call: dict[str, Any]) -> Tensor:
        try:
            return self.noise(model, call)
        except LACKING:
            return torch.zeros((), dtype=torch.float32, device="cpu")

    def _why_not(self, name: str, module: nn.Module) -> str | None:
        for part in name.split("."):
            if part in self.skips:
                return self.skips[part]
        return "cross-attention" if getattr(module, "is_cross_attention", None) else None

    def _rank(self, name: str) -> int:
        return next((i for i, start in enumerate(self.order) if name.split(".")[0] == start), len(self.order))


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if getattr(module, "processor", None) is not None:
            yield name, module


def _lack(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the call gives no {error.args[0]}"
    return f"the call's arguments are not those of the model's own pipelines: {error}"


def grid_of(x: Tensor, patch: tuple[int, int, int], frames: int | None = 2) -> Grid:
    """The grid, in tokens, of latents [..., H, W] cut into patches (t, h, w). frames: the time axis; None: an image."""
    t = 1 if frames is None else x.shape[frames] // patch[0]
    return t, x.shape[-2] // patch[1], x.shape[-1] // patch[2]


def noise_level(timestep: Any, full: float = TRAIN_TIMESTEPS) -> Tensor:
    """σ, a float32 tensor, of a timestep (number or tensor) that runs from `full` (noise) to 0.

    For flow matching this is σ itself. For models trained on ᾱ (Stable Diffusion, CogVideoX, PixArt) it is the share of the
    training steps, which is also monotonic and by which their schedulers choose steps.
    """
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor(timestep, dtype=torch.float32, device="cpu")
    return timestep.to(torch.float32) / full


def length(x: Tensor | None) -> int:
    """Number of tokens N of [B, N, C]; 0 for None."""
    return 0 if x is None else x.shape[1]
