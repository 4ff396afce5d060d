"""Small real denoisers with random weights, for tests of the seam."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from fastdit import Facts


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


def state(model):
    """Everything an installation could leave behind."""
    return [(key, sorted(vars(module)), vars(module).get("forward")) for key, module in model.named_modules()]


class Pipe:
    """As much of a pipeline as tells the scheduler."""

    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler


GRID, TEXT = (3, 8, 8), 5


class Mine(nn.Module):
    """A denoiser of nobody's but ours: clips [B, T, H, W, C], text in front, noise in percent, and a look at the text."""

    def __init__(self):
        super().__init__()
        self.mix = nn.ModuleList(Attention(query_dim=64, heads=2, dim_head=32) for _ in range(2))
        self.look = Attention(query_dim=64, cross_attention_dim=64, heads=2, dim_head=32)

    def forward(self, clip, words, percent):
        x = torch.cat([words, clip.flatten(1, 3)], 1) * (1 + percent / 100)
        for layer in self.mix:
            x = x + layer(x)
        x = x + self.look(x, encoder_hidden_states=words)
        return x[:, words.shape[1] :].reshape(clip.shape)


def layout(call):
    return Facts(tuple(call["clip"].shape[1:4]), sigma=call["percent"] / 100, before=call["words"].shape[1])


def given(percent=50.0):
    generator = torch.Generator().manual_seed(0)
    clip, words = torch.randn(2, *GRID, 64, generator=generator), torch.randn(2, TEXT, 64, generator=generator)
    return clip, words, torch.tensor(percent)
