"""Small real denoisers with random weights, for tests of the seam."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel


def wan(**overrides: Any) -> WanTransformer3DModel:
    """Two layers, two heads of 64; proj_out is drawn too, since at its zero initialisation the output is 0 whatever happens."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    model = WanTransformer3DModel(**config | overrides).eval().requires_grad_(False)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    return model


def wan_inputs(grid: tuple[int, int, int] = (3, 8, 8), sigma: float = 0.5, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """One call of `wan()`: grid in tokens, so latents are twice as high and wide."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w, generator=generator),
        "timestep": torch.full((batch,), 1000 * sigma),
        "encoder_hidden_states": torch.randn(batch, 7, 16, generator=generator),
        "return_dict": False,
    }
