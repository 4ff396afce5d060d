"""Where a site's residual goes and in which form: what a device has room for, shared by the byte.

All statistics together take at most half of the memory that was free. A form that is named is kept as named, on the GPU if
there is room, else in the host's memory, else not at all. ``Reuse(store="auto")`` is bfloat16 while there is room on the GPU.
Once there is not, all that remember something there (sites and branches, those that came first as well) give way to those that
come: each gets the form that saves most error a byte (`allocation`), by what every form would do to its own residual, measured
once on a sample of rows, relative to its attention's answer. Only where not even everybody's smallest form has room is the
host's memory shared out in the same way, and only where that is full as well does a site stay dense. What a refresh was given,
the next ones keep. Sharing waits for the GPU, once for each residual that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdit.approx.allocation import Option, allocate
from fastdit.approx.memory_budget import free_bytes
from fastdit.approx.residual_store import Stored, bytes_of, parts
from fastdit.config import AUTO, Reuse

if TYPE_CHECKING:
    from fastdit.approx.step_cache import Memory

BEST = "bfloat16"
FORMS = (BEST, "fp8", "int4", "pca4", "pca2", "pca1", "mean4", "mean16")
"""That "auto" chooses from."""
RUNS, RUN = 64, 16
"""Of a sample: runs of so many consecutive tokens, evenly spread."""
Held = Callable[[torch.device], int]
Sharers = Callable[[], Iterable["Memory"]]
"""The memories of a run. (Another thread's may be in use just now.)"""


@dataclass(frozen=True)
class Room:
    """place: None where there is none, and why. form: None where `share` has to say it. budget: bytes that all who share the
    place, and one more, may take together."""

    place: torch.device | None
    form: str | None = None
    budget: int = 0
    why: str | None = None


def find(q: Tensor, reuse: Reuse, held: Held, sharers: Sharers) -> Room:
    """Room for what a refresh of q [B, H, N, D] leaves, before it runs: what it allocates is not free afterwards."""
    host = torch.device("cpu")
    places = (host,) if reuse.host or not q.is_cuda else (q.device, host)
    shape = tuple(q.shape)
    for place in places:
        others = [(kept.bytes(), min(_smaller(kept))[0]) for kept in _others(place, sharers).values()]
        room = room_at(place, shape, reuse, q.is_cuda and place == host, free_bytes(place), held(place), others)
        if room.place is not None:
            return room
    needs = needed(shape, reuse, q.is_cuda and host in places)
    why = f"{reuse.kind}: no room for {needs / 2**20:.0f} MB beside {held(places[-1]) / 2**20:.0f} MB remembered"
    return Room(None, why=why)


def room_at(
    place: torch.device, shape: tuple[int, ...], reuse: Reuse, pinned: bool, free: int, held: int, others: list[tuple[int, int]]
) -> Room:
    """The room of one place for a residual of a shape [B, H, N, D]. free: bytes; held: bytes of all statistics there; others:
    (bytes, least bytes) of those whose form may change. Also what `fastdit.predict` asks, without tensors."""
    theirs = sum(size for size, _ in others)
    beside = max(held, theirs)
    budget = (free + beside) // 2 - (beside - theirs) - ratio_bytes(shape, reuse)  # less what does not share
    form = BEST if reuse.store == AUTO else reuse.store
    if theirs + bytes_of(shape, form, pinned) <= budget:
        return Room(place, form, budget)
    if reuse.store == AUTO and sum(least for _, least in others) + least_bytes(shape, pinned) <= budget:
        return Room(place, None, budget)
    return Room(None)


def ratio_bytes(shape: tuple[int, ...], reuse: Reuse) -> int:
    """What ρ, float32 [B, H, N], takes beside a residual."""
    return 4 * math.prod(shape[:-1]) * (reuse.kind == "retention")


def least_bytes(shape: tuple[int, ...], pinned: bool) -> int:
    return min(bytes_of(shape, form, pinned) for form in FORMS)


def needed(shape: tuple[int, ...], reuse: Reuse, pinned: bool) -> int:
    """The least that a refresh takes."""
    size = least_bytes(shape, pinned) if reuse.store == AUTO else bytes_of(shape, reuse.store, pinned)
    return size + ratio_bytes(shape, reuse)


def share(q: Tensor, room: Room, errors: list[float], sharers: Sharers) -> str:
    """The form of one more residual like q, with `errors` of `FORMS`, in a room without one; the others there give way."""
    assert room.place is not None
    others, pinned = _others(room.place, sharers), q.is_cuda and room.place.type == "cpu"
    choices: list[list[Option]] = [
        [(bytes_of(tuple(q.shape), form, pinned), error) for form, error in zip(FORMS, errors, strict=True)]
    ]
    for memory, kept in others.items():
        if memory.errors is None:
            memory.errors = measure(_sampled(kept, q), memory.power)
        known = dict(zip(FORMS, memory.errors, strict=True))
        choices.append([(size, known[form]) for size, form in _smaller(kept)])
    found = allocate(choices, room.budget)
    assert found is not None  # `find` has counted the same
    for (memory, kept), option in zip(others.items(), found[1:], strict=True):
        if (form := _smaller(kept)[option][1]) != kept.form:
            memory.kept = kept.to(form, q.device)
    return FORMS[found[0]]


def measure(x: Tensor, power: Tensor | None) -> list[float]:
    """What each of `FORMS` would do to a sample x [B, H, n, D] of a residual: mean squared error over `power`, the mean square
    of the attention's answer in those rows. Waits for the GPU."""
    assert power is not None
    errors = torch.stack([(Stored.of(x, form).load(x) - x).square().mean() for form in FORMS]) / power.clamp(min=1e-30)
    return errors.nan_to_num(0, 0, 0).tolist()


def sample(tokens: int, device: torch.device) -> Tensor:
    """Which tokens, int64 [n], ascending: all of them where there are few."""
    if tokens <= RUNS * RUN:
        return torch.arange(tokens, device=device)
    first = torch.arange(RUNS, device=device) * (tokens - RUN) // (RUNS - 1)
    return (first[:, None] + torch.arange(RUN, device=device)).flatten()


def _sampled(kept: Stored, like: Tensor) -> Tensor:
    whole = like.new_empty(1, dtype=torch.float32).expand(kept.shape)
    rows = sample(kept.shape[2], like.device)
    some = [(part, kept.load(whole, part)[:, :, rows].float()) for part in parts(whole)]
    out = like.new_empty((*kept.shape[:2], len(rows), kept.shape[3]), dtype=torch.float32)
    for part, x in some:
        out[part] = x
    return out


def _smaller(kept: Stored) -> list[tuple[int, str]]:
    """Bytes and names of the forms that take no more than what is there."""
    pinned = kept.data.is_pinned()
    sizes = [(bytes_of(kept.shape, form, pinned), form) for form in FORMS]
    return [(size, form) for size, form in sizes if size < kept.bytes() or form == kept.form]


def _others(place: torch.device, sharers: Sharers) -> dict[Memory, Stored]:
    """Those that share a place, and whose form may change."""
    return {
        memory: memory.kept
        for memory in sharers()
        if memory.kept is not None and memory.power is not None and memory.kept.data.device == place
    }
