"""The branches of a run: the calls that it makes at every step, and which of them a given call is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.runs import fingerprint


class Call(NamedTuple):
    """What identifies a call of a denoiser. model: index among the pipeline's denoisers. name: given by the pipeline, or None.
    conditioning: its fingerprint. shape: of the latents. latents: a sample of them (`fingerprint.sampled`)."""

    model: int
    name: str | None
    conditioning: bytes
    shape: tuple[int, ...]
    latents: Tensor

    @property
    def key(self) -> tuple[Any, ...]:
        return self[:4]

    @property
    def content(self) -> bytes:
        """The sampled latents as bytes."""
        return self.latents.numpy().tobytes()


@dataclass(eq=False)
class Branch:
    """One of the calls that a run makes at every step (conditional, unconditional, one of several windows, …). latents, sigma
    and step: of its last call."""

    key: tuple[Any, ...]
    latents: Tensor
    sigma: float
    step: int
    first: int = 0
    """The step of its first call."""
    foreseen: list[float] = field(default_factory=list)
    """Errors that the answers of the next call would have, in units of `Reuse.drift`."""

    def foresee(self, error: float, uses: int, drift: float) -> None:
        """Note the error of a layer's answer, completed by statistics for the `uses`-th time: it grows about in proportion."""
        self.foreseen.append(error * (uses + 1) / (uses * drift))

    def due(self) -> bool:
        """Whether the next call must refresh its statistics: the root mean square of what was foreseen, which this forgets, is
        above 1.

        All layers refresh together. Each for itself gives 1.45 times the velocity error at equal cost: a layer's residual then
        stems from inputs that the layers before it had bent otherwise than they do now.
        """
        found, self.foreseen = self.foreseen, []
        return bool(found) and math.fsum(x * x for x in found) > len(found)

    def cosine(self, call: Call) -> float:
        return fingerprint.cosine(self.latents, call.latents)


class Branches:
    """All branches of a run, identified by name, conditioning and the latents that they continue."""

    def __init__(self) -> None:
        self.known: list[Branch] = []
        self._now: dict[tuple[Any, ...], set[bytes]] = {}  # latents by key, at this noise level
        self._before: dict[tuple[Any, ...], set[bytes]] = {}  # and at the previous one

    def move(self) -> None:
        """Begin the next noise level."""
        self._before, self._now = self._now, {}

    def seen(self, call: Call) -> bool:
        """Whether an identical call was made at this noise level."""
        return call.content in self._now.get(call.key, ())

    def goes_on(self, sigma: float, call: Call) -> bool:
        """Whether a call continues latents of the run. Identical latents at another noise level do not: they belong to a new
        run with the same seed."""
        return any(
            fingerprint.likely(branch.cosine(call), sigma, branch.sigma) and not torch.equal(branch.latents, call.latents)
            for branch in self.known
            if branch.key == call.key
        )

    def find(self, sigma: float, step: int, call: Call) -> tuple[Branch, Branch | None]:
        """(the branch of a call, which may be new; the branch that it ends, or None).

        Guidance may call twice with the same latents and conditioning (skipping layers); order then separates the calls. Calls
        with several latents are windows or views, and each must find its own branch.
        """
        now = self._now.setdefault(call.key, set())
        now.add(call.content)
        several = max(len(now), len(self._before.get(call.key, ()))) > 1
        free = [branch for branch in self.known if branch.key == call.key and branch.step != step]
        found = max(free, key=lambda branch: branch.cosine(call), default=None)
        accept = fingerprint.near if several else fingerprint.likely
        if found is not None and accept(found.cosine(call), sigma, found.sigma):
            found.latents, found.sigma, found.step = call.latents, sigma, step
            return found, None
        new = Branch(call.key, call.latents, sigma, step, step)
        self.known.append(new)
        return new, None if several else found  # its noise was drawn anew: no call will continue it

    def drop(self, gone: list[Branch]) -> None:
        self.known = [branch for branch in self.known if branch not in gone]
