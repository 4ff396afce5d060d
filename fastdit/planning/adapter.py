"""What a model family tells of itself: which modules are sites, where tokens sit and how noisy they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from fastdit.core.layout import Grid

REST = -1
"""As a number of tokens before or after the grid: all that the sequence has besides."""


class Facts(NamedTuple):
    """One denoiser call as its adapter reads it: where the tokens sit, and how noisy they are.

    grid: tokens (T, H, W) after patching, in raster order; an int tensor of three where only the call's tensors tell.
    sigma: tensor of noise levels in [0, 1], any shape (per batch element or per token: the largest counts).
    before, after: other tokens of the same sequence (text, reference images), in front of the grid's and behind them; one of
        them may be `REST`.
    ragged: each batch element has its own number of tokens before the grid, and padding behind it.
    unread: nobody reads what becomes of tokens that a mask hides: all layers hide them, and the model's answer is without them.
    coarser: further grids, of the lower resolutions of a UNet; a site's number of tokens tells which is its own.
    timestep: the scheduler's own number, where its scale tells more of the noise level than sigma does (`noise_level.py`).
    missing: why the call must stay dense: what it lacks to tell where its tokens sit.
    """

    grid: Grid | Tensor
    sigma: Tensor
    before: int = 0
    after: int = 0
    ragged: bool = False
    unread: bool = False
    coarser: tuple[Grid, ...] = ()
    timestep: Tensor | None = None
    missing: str | None = None

    @property
    def text_len(self) -> int:
        return max(0, self.before) + max(0, self.after)


class Adapter(Protocol):
    """The facts of one model family (one small file in `pipelines/`)."""

    def sites(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every self-attention, in the order in which they run."""
        ...

    def left(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """(name, why) of every other attention module of the model."""
        ...

    def facts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts:
        """Read one call of the denoiser's forward. Traced by torch.compile: tensor operations and plain Python only."""
        ...


class Join(NamedTuple):
    """A convolution over channels of which the first `varies` depend on the decoder, and the others on skips alone."""

    conv: nn.Module
    varies: int


class Encoder(NamedTuple):
    """The part of a denoiser whose features hardly change from step to step.

    keep: modules whose outputs the decoder reads. skip: other modules, in order. joins: the decoder's, see `Join`.
    """

    keep: list[nn.Module]
    skip: list[nn.Module]
    joins: list[Join]
