"""A fixed linear codec, and the AutoencoderKLWan that learns to reproduce it.

The codec cuts a clip into blocks of 4 frames × 8 × 8 pixels (the first frame counts four times, as in Wan's causal
1 + 4k) and keeps the first principal components of each block. Channel c is divided by a scale between whitening and
the plain projection, scale_c ∝ std_c^½, with mean square 1 over all channels: weak channels, the fine detail, then
drown in noise earlier than strong ones but are not lost. The latent space being fixed beforehand, transformer and
autoencoder train independently. The autoencoder's latents are the codec's: latents_mean is 0 and latents_std 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 48


def to_blocks(video: Tensor) -> Tensor:
    """[B, 3, 4k+1, H, W] -> [B, k+1, H/8, W/8, 768]"""
    B, C, _, H, W = video.shape
    video = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2)
    n = video.shape[2] // 4
    return video.reshape(B, C, n, 4, H // 8, 8, W // 8, 8).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, n, H // 8, W // 8, -1)


def from_blocks(blocks: Tensor) -> Tensor:
    """Inverse of `to_blocks`."""
    B, n, h, w, _ = blocks.shape
    return blocks.view(B, n, h, w, 3, 4, 8, 8).permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(B, 3, 4 * n, 8 * h, 8 * w)[:, :, 3:]


class Codec:
    """`encode`: [B, 3, F, H, W] in [-1, 1] -> [B, C, (F+3)/4, H/8, W/8]; `decode` back, unclamped."""

    def __init__(self, mu: Tensor, basis: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.mu, self.basis, self.mean, self.scale = mu, basis, mean, scale

    def to(self, device: torch.device | str) -> Codec:
        return Codec(*(t.to(device) for t in (self.mu, self.basis, self.mean, self.scale)))

    def encode(self, video: Tensor) -> Tensor:
        z = ((to_blocks(video) - self.mu) @ self.basis - self.mean) / self.scale
        return z.permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, z: Tensor) -> Tensor:
        return from_blocks((z.permute(0, 2, 3, 4, 1) * self.scale + self.mean) @ self.basis.T + self.mu)

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"mu": self.mu, "basis": self.basis, "mean": self.mean, "scale": self.scale}, path)

    @classmethod
    def load(cls, path: Path) -> Codec:
        from safetensors.torch import load_file

        return cls(**load_file(path))

    @classmethod
    def of_blocks(cls, fitted: Tensor, typical: Tensor, channels: int = CHANNELS) -> Codec:
        """Principal components of the blocks [n, 768] `fitted`, scaled as the blocks `typical` need it."""
        X = fitted.double()
        mu = X.mean(0)
        _, vectors = torch.linalg.eigh((X - mu).T @ (X - mu) / len(X))
        basis = vectors[:, -channels:].flip(1).contiguous()
        z = (typical.double() - mu) @ basis
        std = z.std(0)
        scale = std.sqrt()
        scale = scale * (std / scale).square().mean().sqrt()
        return cls(mu.float(), basis.float(), z.mean(0).float(), scale.float())


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over clips of the PSNR in dB of two videos in [-1, 1]."""
    return (10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-10))).mean().item()


# ---- the autoencoder


def make_vae(channels: int = CHANNELS, base_dim: int = 24) -> Any:
    """An untrained AutoencoderKLWan, 8× smaller in space and 4× in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=channels,
        dim_mult=[1, 2, 2],  # two stages are the least that holds Wan's 4× in time; patch_size gives the third 2×
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def _resample(layer: Any, x: Tensor) -> Tensor:
    """`WanResample` on a whole clip, as its cached form treats the chunks 1, 4, 4, … one after another.

    Without a cache the stock forward leaves out the temporal half. The first frame is never resampled in time.
    """
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        B, C, T, H, W = x.shape
        later = layer.time_conv(x[:, :, 1:]).view(B, 2, C, T - 1, H, W)
        later = torch.stack((later[:, 0], later[:, 1]), 3).reshape(B, C, 2 * (T - 1), H, W)
        x = torch.cat([x[:, :, :1], later], 2)
    B, T = x.shape[0], x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1))
    x = x.unflatten(0, (B, T)).transpose(1, 2)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def vae_encode(vae: Any, video: Tensor) -> Tensor:
    """[B, 3, F, H, W] -> [B, 2C, …], means and log variances: what `vae.encode` computes, in one go, with gradients."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify

    net = vae.encoder
    x = net.conv_in(patchify(video, vae.config.patch_size))
    for layer in net.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = net.mid_block(x)
    return vae.quant_conv(net.conv_out(net.nonlinearity(net.norm_out(x))))


def vae_decode(vae: Any, z: Tensor) -> Tensor:
    """[B, C, f, h, w] -> [B, 3, 4f-3, 8h, 8w]: `vae.decode` before it clamps, in one go, with gradients."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    net = vae.decoder
    x = net.mid_block(net.conv_in(vae.post_quant_conv(z)))
    for block in net.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        for layer in block.upsamplers or ():
            x = _resample(layer, x)
    x = net.conv_out(net.nonlinearity(net.norm_out(x)))
    return unpatchify(x, vae.config.patch_size)


def vae_loss(vae: Any, codec: Codec, video: Tensor, noise: Tensor, encoder: bool = True) -> tuple[Tensor, Tensor]:
    """(loss, mean square error of the decoded clip). `noise` is added to the latents: the transformer's are not exact.

    Errors of colour count five times: they are small against errors of brightness and easily left unlearned.
    """
    z = codec.encode(video)
    error = vae_decode(vae, z + noise).float() - video
    chroma = error - error.mean(1, keepdim=True)
    mse = error.square().mean()
    loss = mse + 4 * chroma.square().mean() + 0.2 * error.abs().mean()
    if encoder:
        mean, logvar = vae_encode(vae, video).float().chunk(2, 1)
        weight = codec.scale.view(1, -1, 1, 1, 1) / codec.scale.mean()  # errors in pixels, not in scaled channels
        loss = loss + 0.3 * F.mse_loss(mean * weight, z * weight) + 1e-4 * (logvar + 8).square().mean()
    return loss, mse.detach()
