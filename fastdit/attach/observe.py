"""The start of a denoiser call: its arguments are read once, before its first attention site.

In a compiled model the pre-hook is traced, so it only passes on values derived from the arguments. The opaque op
`fastdit::begin_forward` begins the call (`Handle.enter`) and returns a token, by which the sites find it. The token is data:
the order of the ops is a data dependence of the graph, sizes are not constants of it, and two threads have two tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.attach import recompute
from fastdit.attach.cuda_graphs import STAYS_OUT, refuse_capture
from fastdit.attach.handle import Denoiser, Handle
from fastdit.planning.sequence import SequenceSpec
from fastdit.runs import fingerprint, loops
from fastdit.runs.branches import Call
from fastdit.runs.verdict import to_host


@dataclass(eq=False)
class Hook:
    """A hook on a denoiser. It pickles as `None.__init__`, which takes any arguments and does nothing: a pickled model is the
    stock model, and loads without fastdit. A copy has its own hook."""

    denoiser: Denoiser

    def __reduce__(self) -> Any:
        return getattr, (None, "__init__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return type(self)(copy.deepcopy(self.denoiser, memo))


@dataclass(eq=False)
class Observe(Hook):
    """Forward pre-hook: reads what the denoiser is called with."""

    def __post_init__(self) -> None:
        # A tensor: integers would be constants of a graph that several copies of a model share.
        self.ids = torch.tensor([self.denoiser.handle.number, self.denoiser.number], dtype=torch.int64, device="cpu")

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        denoiser = self.denoiser
        call = dict(zip(denoiser.names, args, strict=False)) | kwargs
        facts = denoiser.adapter.facts(model, args, kwargs)
        where = facts.grid if isinstance(facts.grid, Tensor) else None
        sides = [side for grid in (facts.grid, *facts.coarser) if not isinstance(grid, Tensor) for side in grid]
        denoiser.call.facts = facts
        if denoiser.handle.trains and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            recompute.watch(model, denoiser)
        # A training has no branches to tell apart.
        latents = None if denoiser.handle.train else fingerprint.latents_of(call)
        conditioning = [] if denoiser.handle.train else fingerprint.conditioning_of(call)
        denoiser.call.token = _begin_forward(
            facts.sigma, facts.timestep, where, latents, conditioning, self.ids, sides, facts.before, facts.after, facts.ragged,
            facts.unread, facts.missing,
        )  # fmt: skip


class Over(Hook):
    """Forward hook: ends the call. A layer that is called on its own later finds no token."""

    def __call__(self, *_: Any) -> None:
        call = self.denoiser.call
        if not torch.compiler.is_compiling() and (forward := getattr(call, "forward", None)) is not None:
            forward.over = True
        call.token = None


@torch.library.custom_op("fastdit::begin_forward", mutates_args=(), **STAYS_OUT)
def _begin_forward(
    sigma: Tensor,
    timestep: Tensor | None,
    where: Tensor | None,
    latents: Tensor | None,
    conditioning: list[Tensor],
    ids: Tensor,
    sides: list[int],
    before: int,
    after: int,
    ragged: bool,
    unread: bool,
    missing: str | None,
) -> Tensor:
    number, model = ids.tolist()
    handle = Handle.find(number)
    denoiser = handle.denoisers[model]
    with ops.without_autocast(sigma):  # sums of the conditioning in float32
        given = (
            [sigma.amax()] + ([] if timestep is None else [timestep.amax()]) + ([] if where is None else list(where.unbind()))
        )
        pieces = [fingerprint.summed(each) for each in conditioning] + (
            [] if latents is None else [fingerprint.sampled(latents)]
        )
        read = to_host([*given, *pieces])
    numbers = [float(piece) for piece in read[: len(given)]]
    grids = [(sides[i], sides[i + 1], sides[i + 2]) for i in range(0, len(sides), 3)]
    if where is not None:
        t, h, w = (int(side) for side in numbers[-3:])
        if t * h * w == 0:
            missing = missing or "the tokens' coordinates are not those of one image"
        grids.insert(0, (t, h, w))
    read = read[len(given) :]
    sample = torch.zeros(0, dtype=torch.float32) if latents is None else read.pop()
    call = Call(
        model, loops.name_of(denoiser.model()), b"".join(piece.numpy().tobytes() for piece in read),
        () if latents is None else tuple(latents.shape), sample,
    )  # fmt: skip
    sequence = SequenceSpec(tuple(grids), before, after, ragged, unread, missing)
    time = None if timestep is None else numbers[1] if timestep.is_floating_point() else round(numbers[1])
    with ops.without_autocast(sample):  # cosines of latents in float32
        forward = denoiser.call.forward = handle.enter(numbers[0], time, call, sequence)
    return torch.tensor([forward.number], dtype=torch.int64, device="cpu")


@_begin_forward.register_fake
def _(*_: Any) -> Tensor:
    refuse_capture()
    return torch.empty(1, dtype=torch.int64, device="cpu")
