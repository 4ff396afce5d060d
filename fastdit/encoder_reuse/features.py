"""The features that encoder propagation (`propagate.py`) keeps between key steps, for each branch of a model's calls."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

LATENTS_AND_TIME = ("sample", "hidden_states", "timestep")
RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
"""A ControlNet's outputs. They follow the latents, so they do not identify a branch."""


@dataclass(eq=False)
class Branch:
    """One branch (conditional, unconditional, or both in a batch) since its last full run.

    given: the arguments that identify it. step: of its last call. kept: the encoder's outputs by module, or a ControlNet's
    output. fixed: convolutions of skips (see `adapter.Join`). ahead: outputs computed in advance, by timestep. residuals: the
    ControlNet's, from which `fixed` and `ahead` were computed.
    """

    given: list[Any]
    step: int
    kept: Any = field(default_factory=dict)
    fixed: dict[nn.Module, Tensor] = field(default_factory=dict)
    ahead: dict[float, Any] = field(default_factory=dict)
    residuals: list[Any] = field(default_factory=list)


class Running(NamedTuple):
    """The denoiser call in progress. encodes: the whole model runs and its features are kept. batch: the caller's batch size.
    times: number of steps decoded together."""

    branch: Branch
    encodes: bool
    batch: int = 1
    times: int = 1


class Branches:
    """The branches of one model of class `cls`, identified by conditioning, never by counting calls: guidance in two calls is
    two branches, the second call of a second-order solver is the same branch, and another text or shape is a new one.
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        self._signature = inspect.signature(cls.forward)
        self._found: list[Branch] = []

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        call = dict(self._signature.bind(None, *args, **kwargs).arguments)
        del call["self"]
        return call

    def find(self, call: dict[str, Any]) -> Branch | None:
        given = _given(call)
        return next((branch for branch in self._found if equal_arguments(branch.given, given)), None)

    def renew(self, call: dict[str, Any], step: int) -> Branch:
        """A new branch for a call that is about to run in full. Drops branches not called at this step or the one before."""
        old = self.find(call)
        self._found = [branch for branch in self._found if branch is not old and branch.step >= step - 1]
        self._found.append(Branch(_given(call), step))
        return self._found[-1]

    def drop(self, branch: Branch) -> None:
        self._found.remove(branch)

    def clear(self) -> None:
        self._found.clear()


def latents(call: dict[str, Any]) -> Tensor:
    """The latents [B, ...] of a denoiser's or a ControlNet's call."""
    return call["sample"] if "sample" in call else call["hidden_states"]


def _given(call: dict[str, Any]) -> list[Any]:
    x = latents(call)
    rest = {name: value for name, value in call.items() if name not in LATENTS_AND_TIME + RESIDUALS}
    return [x.shape, x.dtype, x.device, *sorted(rest), *tree_leaves([rest[name] for name in sorted(rest)])]


def equal_arguments(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of arguments are equal, tensors by value. Pipelines mostly pass the same objects at every step."""
    return len(a) == len(b) and all(x is y or _equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)
    return type(x) is type(y) and not isinstance(x, Tensor) and bool(x == y)


def residuals(call: dict[str, Any]) -> list[Any]:
    return tree_leaves([call.get(name) for name in RESIDUALS])


def repeat_batch(tree: Any, batch: int, times: int) -> Any:
    """Every tensor [batch · m, ...] -> [batch · times · m, ...]: each batch element repeated `times` times, in order.

    m is the number of frames if a video's frames are in the batch dimension. Tensors of other sizes are left unchanged.
    """
    if times == 1:
        return tree

    @functools.cache  # a tensor that occurs twice stays one tensor
    def repeat(x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[0] % batch:
            return x
        return x.unflatten(0, (batch, -1)).repeat_interleave(times, 0).flatten(0, 1)

    return tree_map_only(Tensor, repeat, tree)


def first_step(x: Tensor, batch: int, times: int) -> Tensor:
    """Inverse of `repeat_batch`: [batch · times · m, ...] -> [batch · m, ...], the first step of each element."""
    return x if times == 1 else x.unflatten(0, (batch, times, -1))[:, 0].flatten(0, 1)


def clone_writable(tree: Any) -> Any:
    """Kept outputs with the first tensor cloned: a model may write into it (FreeU, T2I-Adapter), and it is often a skip."""
    first = tree[0] if isinstance(tree, tuple) else tree
    mine = first.detach().clone()
    return tree_map_only(Tensor, lambda x: mine if x is first else x.detach(), tree)
