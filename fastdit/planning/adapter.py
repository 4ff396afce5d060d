"""The interface to a model family: which modules are sites, where the tokens sit, and the noise level of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from fastdit.core.layout import Grid

REST = -1
"""As a number of tokens before or after the grid: all remaining tokens of the sequence."""


class Facts(NamedTuple):
    """One denoiser call as its adapter reads it: where the tokens sit, and the noise level.

    grid: tokens (T, H, W) after patching, in raster order; an int tensor of three if only the call's tensors determine it.
    sigma: noise levels in [0, 1], a tensor of any shape (per batch element or per token: the largest counts).
    before, after: other tokens of the same sequence (text, reference images) before and after the grid's; one may be `REST`.
    ragged: each batch element has its own number of tokens before the grid, and padding after it.
    unread: hidden tokens are never used: every layer masks them, and they are not part of the model's output.
    coarser: more grids, for the lower resolutions of a UNet; a site's number of tokens selects its own.
    timestep: the scheduler's own number, if the noise level follows from it and not from sigma (`noise_level.py`).
    missing: why the position of the tokens is unknown and the call must stay dense; None if it is known.
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
        """(name, module) of every self-attention module, in the order in which they run."""
        ...

    def left(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """(name, reason) of every other attention module of the model."""
        ...

    def facts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts:
        """Read one call of the denoiser's forward. Traced by torch.compile: tensor operations and plain Python only."""
        ...


class Join(NamedTuple):
    """A convolution whose first `varies` input channels depend on the decoder; the others depend on skips only."""

    conv: nn.Module
    varies: int


class Encoder(NamedTuple):
    """The part of a denoiser whose features hardly change from step to step.

    keep: modules whose outputs the decoder reads. skip: the other modules, in order. joins: of the decoder, see `Join`.
    """

    keep: list[nn.Module]
    skip: list[nn.Module]
    joins: list[Join]
