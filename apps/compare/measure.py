"""Dense against accelerated, from the same seed: time, memory, closeness of the result, and error of each phase.

Time is the denoising loop's: denoiser, guidance and scheduler, with everything fastdit does in it (planning, block
masks, permutation, quantization); text encoding and decoding are the same for both. Runs are interleaved, so that a machine
that slows down slows both. Before the first of each the denoiser is called once, so that nothing is paid for in a time that
is paid for only once: dense by itself, a configuration by the velocity error (`recorded.py`). No speed is given beside a wrong
result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn

import fastdit
from fastdit.api import adapters_of, attach, unwrapped
from fastdit.apps.compare import metrics
from fastdit.apps.compare.machine import Watch
from fastdit.apps.compare.recorded import Call, FirstCalls, velocity_error
from fastdit.apps.compare.timed import Comparison, Timed, Variant
from fastdit.apps.errors import UserError
from fastdit.apps.render.draw import Clip, draw
from fastdit.apps.render.generate import arguments
from fastdit.apps.render.load import denoisers
from fastdit.apps.render.settings import Settings
from fastdit.core.reference import relative_error

if TYPE_CHECKING:
    from fastdit import Config
    from fastdit.planning.adapter import Adapter


def measure(
    pipe: Any,
    settings: Settings,
    configs: Mapping[str, Config],
    repeats: int = 2,
    show: bool = True,
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
) -> Comparison:
    """`measure_call` with the call that a clip's settings make. The pipeline is left without acceleration."""
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}", 2)
    call = partial(arguments, pipe, settings)
    last = None
    for last in measure_call(pipe, call, configs, repeats, settings.seed, show, on_step):  # noqa: B007
        pass
    assert last is not None
    return last


def measure_call(
    pipe: Any,
    call: Callable[[], Mapping[str, Any]],
    configs: Mapping[str, Config],
    repeats: int = 2,
    seed: int = 0,
    show: bool = True,
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
    latents: bool = False,
    parts: Sequence[tuple[str, nn.Module, Adapter]] | None = None,
) -> Iterator[Comparison]:
    """Draw densely, then by every configuration, `repeats` times in turn. Gives the comparison as it is after each run of a
    configuration, so that what was measured stays when it is interrupted. The pipeline is left without acceleration.

    call: makes the arguments of one run, with a generator of their own. seed: of PyTorch's own noise, set before every run.
    latents: do not decode; there are no frames to compare then. parts: see `FirstCalls`. on_step: as in `draw`; step 0 is a
    call that measures the velocity error. A configuration that stays dense runs once. Dense runs again only beside one that
    does not; where it runs but once, its first step is computed again instead, to see that the machine repeats itself.

    Raises UserError if an output is not finite, or if dense runs of one seed differ: no time means anything then.
    """
    parts = adapters_of(pipe) if parts is None else parts
    fastdit.restore(pipe)
    calls: list[Call] = []

    def run(name: str, turn: int) -> tuple[Clip, Watch]:
        with seeded(seed), Watch() as watch:
            clip = draw(pipe, call(), f"{name} {turn}/{repeats}", show, on_step, latents)
        check_finite(clip, name)
        return clip, watch

    with seeded(seed):
        warm_up(pipe, call())
    with FirstCalls(pipe, calls, parts) as recorder:
        clip, watch = run("dense", 1)
    clip.seconds["denoise"] -= recorder.seconds
    if not calls:
        raise UserError(f"{type(pipe).__name__} did not call its denoiser")
    found = Comparison(Timed(clip), kernel_name(pipe), calls[0].tokens)
    found.dense.add(clip, watch)
    found.others.append(watch.others)
    compiled = any(is_compiled(model) for model in denoisers(pipe))
    for turn in range(1, repeats + 1):
        again = [name for name in configs if turn == 1 or found.variants[name].dense_because is None]
        if turn > 1 and again:
            clip, watch = run("dense", turn)
            check_equal(clip, found.dense.clip, seed)
            found.dense.add(clip, watch)
            found.others.append(watch.others)
        elif turn == 1 and (repeats == 1 or not configs):
            check_repeats(calls[0], seed)
        for name in again:
            with attach(pipe, configs[name], parts) as handle:
                velocity = velocity_error(configs[name], calls, on_step) if turn == 1 or compiled else []
                handle.reset()
                clip, watch = run(name, turn)
                report = fastdit.report(pipe)
            if turn == 1:
                variant = Variant(clip, report=report, velocity=velocity)
                closeness(variant, found.dense.clip)
                found.variants[name] = variant
            found.variants[name].add(clip, watch)
            found.others.append(watch.others)
            yield found
        if turn == 1 and repeats > 1 and all(variant.dense_because is not None for variant in found.variants.values()):
            check_repeats(calls[0], seed)
    if not configs:
        yield found


def closeness(variant: Variant, dense: Clip) -> None:
    """Compare a configuration's clip with the dense one of the same seed."""
    clip = variant.clip
    if clip.latents is not None and dense.latents is not None:
        variant.latents = relative_error(clip.latents, dense.latents)
    if clip.clips is None or dense.clips is None:
        return
    frames, reference = torch.from_numpy(clip.all_frames), torch.from_numpy(dense.all_frames)
    variant.psnr = metrics.psnr(frames, reference)
    if min(frames.shape[1:3]) >= metrics.WINDOW:
        variant.ssim = metrics.ssim(frames, reference)
    changes = [metrics.flicker_change(torch.from_numpy(a), torch.from_numpy(b))
               for a, b in zip(clip.clips, dense.clips, strict=True)]  # fmt: skip
    known = [change for change in changes if change is not None]
    variant.flicker = sum(known) / len(known) if known else math.nan


class _Enough(Exception):  # noqa: N818, as StopIteration
    """The denoiser was called once."""


def warm_up(pipe: Any, call: Mapping[str, Any]) -> None:
    """Run the pipeline until the denoiser has been called once, and no further."""

    def stop(*_: Any) -> None:
        raise _Enough

    hooks = [model.register_forward_hook(stop) for model in denoisers(pipe)]
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # modular pipelines report every exception
    try:
        pipe(**call)
    except _Enough:
        pass
    finally:
        logging.disable(quiet)
        for hook in hooks:
            hook.remove()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's own noise from this seed; as it was before at the end."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def is_compiled(model: Any) -> bool:
    inner = unwrapped(model)
    return inner is not model or any(getattr(each, "_compiled_call_impl", None) is not None for each in inner.modules())


def check_equal(again: Clip, first: Clip, seed: int) -> None:
    """Raise UserError if a dense run does not repeat itself."""
    if again.latents is not None and first.latents is not None:
        _check_equal(again.latents, first.latents, seed)
    else:
        _check_equal(torch.from_numpy(again.all_frames), torch.from_numpy(first.all_frames), seed)


def check_repeats(call: Call, seed: int) -> None:
    """Raise UserError if a step of a dense run does not repeat itself. The pipeline is not accelerated."""
    _check_equal(call.again(), call.velocity, seed)


def _check_equal(again: Tensor, first: Tensor, seed: int) -> None:
    if not torch.equal(again, first):
        off = (again - first).abs().max().item()
        raise UserError(
            f"two dense runs of seed {seed} differ (by up to {off:.2g}), so no comparison means anything: "
            "use a deterministic device and model, such as --device cpu"
        )


def check_finite(clip: Clip, what: str) -> None:
    """Raise UserError if what a run drew contains NaN or infinity (`draw` checks the latents of each step)."""
    if clip.clips is not None and not bool(torch.from_numpy(clip.clips).isfinite().all()):
        raise UserError(f"the {what} run decoded to NaN or infinity: check the model's autoencoder; no speed is given for it")
    if clip.latents is not None and not bool(clip.latents.isfinite().all()):
        raise UserError(f"the {what} run ended in NaN or infinity: check the model's weights; no speed is given for it")


def kernel_name(pipe: Any) -> str:
    """The attention kernel that stock diffusers runs for this pipeline, by name."""
    model: Any = next(denoisers(pipe))
    backend = str(getattr(_AttentionBackendRegistry.get_active_backend()[0], "value", "native"))
    if backend != "native":
        return f"diffusers' {backend}"
    shape = [found if isinstance(found := getattr(model.config, name, None), int) else usual
             for name, usual in (("num_attention_heads", 8), ("attention_head_dim", 64))]  # fmt: skip
    x = torch.zeros(1, shape[0], 256, shape[1], device=model.device, dtype=model.dtype)
    try:
        chosen = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(x, x, x)).name.lower()
    except (AttributeError, ValueError):
        chosen = "kernel unknown"
    return f"F.scaled_dot_product_attention ({chosen.replace('_', ' ')}, {model.device.type})"
