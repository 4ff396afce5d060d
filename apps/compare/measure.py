"""Dense against accelerated, from the same seed: time, closeness of the result, and error of each phase.

Time is the denoising loop's: denoiser, guidance and scheduler, with everything fastdit does in it (planning, block
masks, permutation, quantization); text encoding, decoding and writing are the same for both and left out. Runs are
interleaved, so that a machine that slows down slows both, and the best of each counts. No speed is given beside a wrong
result.

Two clips of one seed drift apart the longer they are denoised. So the teacher-forced velocity error is given beside PSNR and
SSIM of the results: inputs of the dense run are fed to the accelerated denoiser, one step each,
and |v − v_dense| / |v_dense| is averaged over up to three steps of each phase, or all of them where statistics of one step
serve the next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fastdit
from fastdit.apps.errors import UserError
from fastdit.apps.render.generate import Clip, generate
from fastdit.apps.render.load import denoisers
from fastdit.apps.render.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastdit import Config, Report

STEPS_A_PHASE = 3


@dataclass(frozen=True)
class Call:
    """The first call of the denoiser in a step of a dense run, and the velocity that it returned."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sigma: float
    velocity: Tensor

    def again(self) -> Tensor:
        """The velocity, computed once more."""
        import torch

        with torch.no_grad():
            return self.model(*self.args, **self.kwargs)[0]


@dataclass
class Variant:
    """The runs of one preset. seconds: best denoising loop; velocity: mean relative error in each phase that ran."""

    clip: Clip
    report: Report
    seconds: float
    psnr: float = math.nan
    ssim: float = math.nan
    velocity: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dense_because(self) -> str | None:
        """Why no sparse attention ran at all; None if some did."""
        if self.report.density < 1 or any(site.ran == "sparse" for site in self.report.sites):
            return None
        reasons = Counter(site.reason for site in self.report.sites if site.reason)
        return reasons.most_common(1)[0][0] if reasons else "the configuration is dense"

    def to_dict(self, dense_seconds: float) -> dict[str, Any]:
        """For JSON; psnr_db None: equal to dense."""
        return {
            "fast_s": self.seconds,
            "ratio": dense_seconds / self.seconds,
            "density": self.report.density,
            "psnr_db": self.psnr if math.isfinite(self.psnr) else None,
            "ssim": self.ssim,
            "velocity_error": self.velocity,
            "stayed_dense": self.dense_because,
        }


@dataclass
class Comparison:
    """dense_seconds: best denoising loop; kernel: name of the dense attention kernel; tokens: in the denoiser's sequence."""

    dense: Clip
    dense_seconds: float
    kernel: str
    tokens: int
    variants: dict[str, Variant]


def measure(
    pipe: Any,
    settings: Settings,
    configs: Mapping[str, Config],
    repeats: int = 2,
    show: bool = True,
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
) -> Comparison:
    """Run every configuration and dense in turn, `repeats` times. The pipeline is left without acceleration.

    Where dense runs but once, its first step is computed again instead, to see that the machine repeats itself.

    on_step: called as by `generate` in every run; step 0 is a call that measures the velocity error.

    Raises UserError if an output is not finite, or if dense runs of one seed differ: no time means anything then.
    """
    import torch

    from fastdit.apps.compare.metrics import psnr, ssim

    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}", 2)
    fastdit.restore(pipe)
    dense: list[Clip] = []
    variants: dict[str, Variant] = {}
    calls: list[Call] = []
    for turn in range(1, repeats + 1):
        for name, config in configs.items():
            with fastdit.accelerate(pipe, config):
                clip = generate(pipe, settings, f"{name} {turn}/{repeats}", show, on_step)
                report = fastdit.report(pipe)
            check_finite(clip, name)
            best = min(clip.seconds["denoise"], variants[name].seconds if turn > 1 else math.inf)
            variants[name] = Variant(clip, report, best)
        with FirstCalls(pipe, calls if turn == 1 else []):
            dense.append(generate(pipe, settings, f"dense {turn}/{repeats}", show, on_step))
        check_finite(dense[-1], "dense")
        check_equal(dense[-1].latents, dense[0].latents, settings.seed)
    if repeats == 1:
        check_equal(calls[0].again(), calls[0].velocity, settings.seed)
    reference = torch.from_numpy(dense[0].frames)
    for name, variant in variants.items():
        frames = torch.from_numpy(variant.clip.frames)
        variant.psnr, variant.ssim = psnr(frames, reference), ssim(frames, reference)
        variant.velocity = velocity_error(pipe, configs[name], calls, on_step)
    seconds = min(clip.seconds["denoise"] for clip in dense)
    return Comparison(dense[0], seconds, kernel_name(pipe), tokens(calls[0]), variants)


def check_equal(again: Tensor, first: Tensor, seed: int) -> None:
    """Raise UserError if a dense run does not repeat itself."""
    import torch

    if not torch.equal(again, first):
        off = (again - first).abs().max().item()
        raise UserError(
            f"two dense runs of seed {seed} differ (by up to {off:.2g}), so no comparison means anything: "
            "use a deterministic device and model, such as --device cpu"
        )


def check_finite(clip: Clip, what: str) -> None:
    """Raise UserError if the decoded frames of a run contain NaN or infinity (`generate` checks the latents)."""
    import numpy as np

    if not np.isfinite(clip.frames).all():
        raise UserError(f"the {what} run decoded to NaN or infinity: check the model's autoencoder; no speed is given for it")


class FirstCalls:
    """Context manager: appends the first denoiser call at every noise level to `calls`, by reference, which costs nothing."""

    def __init__(self, pipe: Any, calls: list[Call]) -> None:
        self.pipe, self.calls = pipe, calls

    def __enter__(self) -> None:
        self.hooks = [model.register_forward_hook(self._seen, with_kwargs=True) for model in denoisers(self.pipe)]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _seen(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        sigma = _facts(model, args, kwargs).sigma.amax().item()
        if not self.calls or sigma != self.calls[-1].sigma:
            self.calls.append(Call(model, args, kwargs, sigma, out[0]))


def _facts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from fastdit.pipelines.registry import adapter_for

    return adapter_for(model).facts(model, args, kwargs)


def tokens(call: Call) -> int:
    """Length of the sequence of self-attention."""
    facts = _facts(call.model, call.args, call.kwargs)
    return math.prod(facts.grid) + facts.text_len


def velocity_error(
    pipe: Any,
    config: Config,
    calls: list[Call],
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
) -> list[dict[str, Any]]:
    """Teacher-forced relative error in each phase that the run passed: {"sigma", "policy", "error", "steps"}."""
    import torch

    from fastdit.core.reference import relative_error

    rows = []
    with torch.no_grad(), fastdit.accelerate(pipe, config):
        for index in (None, *range(len(config.phases))):
            inside = [call for call in calls if config.at(call.sigma) == index]
            if not inside:
                continue
            phase = None if index is None else config.phases[index]
            chosen = {round(i * (len(inside) - 1) / (STEPS_A_PHASE - 1)) for i in range(STEPS_A_PHASE)}
            if phase is not None and phase.reuse.kind != "none":
                chosen = set(range(len(inside)))
            errors = []
            for call in (inside[i] for i in sorted(chosen)):
                errors.append(relative_error(call.again(), call.velocity))
                on_step(0, call.velocity)
            rows.append(
                {
                    "sigma": [1.0, 0.0] if phase is None else list(phase.sigma),
                    "policy": "dense" if phase is None else str(phase.policy),
                    "error": sum(errors) / len(errors),
                    "steps": len(errors),
                }
            )
    return rows


def kernel_name(pipe: Any) -> str:
    """The attention kernel that stock diffusers runs for this pipeline, by name."""
    import torch
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    model: Any = next(denoisers(pipe))
    backend = str(getattr(_AttentionBackendRegistry.get_active_backend()[0], "value", "native"))
    if backend != "native":
        return f"diffusers' {backend}"
    x = torch.zeros(
        1,
        model.config.num_attention_heads,
        256,
        model.config.attention_head_dim,
        device=model.device,
        dtype=model.dtype,
    )
    try:
        chosen = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(x, x, x)).name.lower()
    except (AttributeError, ValueError):
        chosen = "kernel unknown"
    return f"F.scaled_dot_product_attention ({chosen.replace('_', ' ')}, {model.device.type})"
