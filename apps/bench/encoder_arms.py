"""What `fastdit bench encoder` measures: UNets of the sizes of Stable Diffusion, stock and with their encoders propagated."""

from __future__ import annotations

import math
from typing import Any

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SDXL: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
"""What differs from the defaults of UNet2DConditionModel. SDXL's embedding of picture sizes is left out: it costs nothing."""
MODELS = {"SD 1.5": SD15, "SDXL": SDXL}


def unet() -> Any:
    """The UNet with random weights. Filled by hand: drawing 860 million numbers as the layers do takes minutes."""
    import torch

    model = twin(None).to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.uniform_(-1, 1).mul_(1 / math.sqrt(parameter[0].numel()))
    return model


def operations(config: dict[str, Any], size: int) -> dict[str, float]:
    """Floating point operations of a step between key steps, as shares of a full one: counted, on tensors without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    with torch.inference_mode():
        x = torch.zeros(1, 4, size, size, device="meta")
        text = torch.zeros(1, 77, config["cross_attention_dim"], device="meta")
        for name, joins in (("decoder alone", False), ("skips convolved once", True)):
            model, _ = propagated(None, (0,), joins=joins, config=config)
            for time in (900, 800, 700):  # the second is the first between, which convolves the skips
                with FlopCounterMode(display=False) as counter:
                    model(x, torch.tensor(time), text)
                counts["full" if time == 900 else name] = counter.get_total_flops()
    return {name: count / counts["full"] for name, count in counts.items() if name != "full"}


def twin(model: Any, config: dict[str, Any] = SD15) -> Any:
    """The same weights in another module, so that hooks in one leave the other alone; None: without weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        found: Any = UNet2DConditionModel(**config)
    found.eval().requires_grad_(False)
    if model is not None:
        found.load_state_dict(model.state_dict(), assign=True)
    return found


def propagated(
    model: Any,
    keys: tuple[int, ...],
    joins: bool = True,
    batch: int | None = 1,
    pipeline: Any = None,
    config: dict[str, Any] = SD15,
) -> tuple[Any, Any]:
    """A twin with its encoder propagated, and the handle. joins: whether the convolutions of skips are kept too."""
    from fastdit.encoder_reuse.propagate import Propagation
    from fastdit.pipelines.encoder import encoder_of

    found = twin(model, config)
    handle = Propagation(keys, 0.0, batch, pipeline)
    encoder = encoder_of(found)
    handle.install(found, encoder if joins else encoder._replace(joins=[]))
    return found, handle


class Schedule:
    """A pipeline as far as `Propagation` needs one: something with a scheduler."""

    def __init__(self, steps: int) -> None:
        import diffusers

        scheduler: Any = diffusers.DDIMScheduler
        self.scheduler = scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
        self.scheduler.set_timesteps(steps)
