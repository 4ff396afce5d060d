"""The tiny transformer and its text encoder, and a forward that trains them fast.

`forward` computes what `WanTransformer3DModel.forward` computes, from the same parameters: projections that share an
input are one product, the matrix products run in `dtype` while residual, norms and modulation stay float32, and one
block is a pure function of tensors, so that compiling it once serves every layer.

`WanPipeline` pads a caption's n token states with zero vectors to 512 and never masks them. The zeros all become the
same key and value, so one of them with log(512 - n) added to its score is the same mathematics: `encode_text`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIPELINE_TOKENS = 512  # WanPipeline's default max_sequence_length


def make_text_encoder(vocab: int, dim: int = 128, layers: int = 2, seed: int = 0) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": vocab, "d_model": dim, "d_kv": 32, "d_ff": 2 * dim, "num_layers": layers, "num_heads": dim // 32,
        "dropout_rate": 0.0, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return UMT5EncoderModel(UMT5Config(**options))


def make_transformer(channels: int, heads: int = 3, layers: int = 6, ffn: int = 768, text_dim: int = 128, seed: int = 0) -> Any:
    """WanTransformer3DModel with heads of 64, one token per latent, initialised to train fast (see below)."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model: Any = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=heads, attention_head_dim=64, in_channels=channels,
        out_channels=channels, text_dim=text_dim, freq_dim=128, ffn_dim=ffn, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
    )  # fmt: skip
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        model.condition_embedder.time_proj.weight.mul_(0.1)
        model.condition_embedder.time_proj.bias.zero_()
        model.scale_shift_table.zero_()
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 0.5  # the two gates, half open
            for attn in (block.attn1, block.attn2):
                for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
                    torch.nn.init.xavier_uniform_(layer.weight)
                    layer.bias.zero_()
    return model


def encode_text(encoder: Any, ids: Tensor, mask: Tensor, padded: int = PIPELINE_TOKENS) -> tuple[Tensor, Tensor]:
    """States [B, L, text_dim], zero where padded, and the scores' bias [B, 1, 1, L] that stands for `padded` tokens."""
    states = encoder(ids, mask).last_hidden_state * mask[..., None]
    n = mask.sum(1, keepdim=True)
    place = torch.arange(ids.shape[1], device=ids.device)
    bias = torch.where(place < n, 0.0, -math.inf)
    bias = torch.where(place == n, torch.log((padded - n).float()), bias)
    return states, bias[:, None, None, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def block_tensors(block: Any) -> list[Tensor]:
    """What `block_forward` needs of a WanTransformerBlock, in its order."""
    a, c, f = block.attn1, block.attn2, block.ffn.net
    linears = [a.to_q, a.to_k, a.to_v, a.to_out[0], c.to_q, c.to_k, c.to_v, c.to_out[0], f[0].proj, f[2]]
    rest = [a.norm_q.weight, a.norm_k.weight, c.norm_q.weight, c.norm_k.weight, block.norm2.weight, block.norm2.bias]
    return [t for layer in linears for t in (layer.weight, layer.bias)] + rest + [block.scale_shift_table]


def block_forward(
    y: Tensor, time: Tensor, text: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, *w: Tensor
) -> Tensor:
    """One layer. y: float32 [B, N, D]; time: [B, 6, D]; text: [B, L, D]; cos, sin: [N, 1, 32]."""
    qw, qb, kw, kb, vw, vb, ow, ob, cqw, cqb, ckw, ckb, cvw, cvb, cow, cob, f1w, f1b, f2w, f2b = (t.to(dtype) for t in w[:20])
    nq, nk, cnq, cnk, n2w, n2b, table = w[20:]
    B, N, D = y.shape
    H = D // 64
    shift, scale, gate, shift2, scale2, gate2 = (table + time).chunk(6, 1)

    x = (F.layer_norm(y, (D,), eps=1e-6) * (1 + scale) + shift).to(dtype)
    q, k, v = F.linear(x, torch.cat([qw, kw, vw]), torch.cat([qb, kb, vb])).split(D, -1)
    q = _rotate(F.rms_norm(q.float(), (D,), nq, 1e-6).view(B, N, H, 64), cos, sin).to(dtype)
    k = _rotate(F.rms_norm(k.float(), (D,), nk, 1e-6).view(B, N, H, 64), cos, sin).to(dtype)
    v = v.reshape(B, N, H, 64)
    x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    y = y + F.linear(x.transpose(1, 2).reshape(B, N, D), ow, ob).float() * gate

    x = F.layer_norm(y, (D,), n2w, n2b, 1e-6).to(dtype)
    text = text.to(dtype)
    q = F.rms_norm(F.linear(x, cqw, cqb).float(), (D,), cnq, 1e-6).to(dtype).view(B, N, H, 64).transpose(1, 2)
    k = F.rms_norm(F.linear(text, ckw, ckb).float(), (D,), cnk, 1e-6).to(dtype).view(B, -1, H, 64).transpose(1, 2)
    v = F.linear(text, cvw, cvb).view(B, -1, H, 64).transpose(1, 2)
    p = torch.softmax((q @ k.mT).float() * 0.125 + bias, -1).to(dtype)
    y = y + F.linear((p @ v).transpose(1, 2).reshape(B, N, D), cow, cob).float()

    x = (F.layer_norm(y, (D,), eps=1e-6) * (1 + scale2) + shift2).to(dtype)
    return y + F.linear(F.gelu(F.linear(x, f1w, f1b), approximate="tanh"), f2w, f2b).float() * gate2


def rotary(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [N, 1, 32], of every token's rotation for latents like `x`."""
    cos, sin = model.rope(x)
    return cos[0, ..., 0::2].float().contiguous(), sin[0, ..., 1::2].float().contiguous()


def forward(
    model: Any,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    bias: Tensor,
    rope: tuple[Tensor, Tensor],
    dtype: torch.dtype = torch.float32,
    block: Callable[..., Tensor] = block_forward,
) -> Tensor:
    """Velocity [B, C, f, h, w] of latents `x` at timesteps `t` [B] in [0, 1000]; `text`, `bias` from `encode_text`."""
    B, C, f, h, w = x.shape
    patch, embed = model.patch_embedding, model.condition_embedder
    y = F.linear(x.flatten(2).transpose(1, 2), patch.weight.flatten(1), patch.bias)
    temb = embed.time_embedder(embed.timesteps_proj(t))
    time = embed.time_proj(F.silu(temb)).unflatten(1, (6, -1))
    states = embed.text_embedder(text)
    for layer in model.blocks:
        y = block(y, time, states, bias, *rope, dtype, *block_tensors(layer))
    shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, 1)
    y = F.layer_norm(y, (y.shape[-1],), eps=1e-6) * (1 + scale) + shift
    return model.proj_out(y).transpose(1, 2).reshape(B, C, f, h, w)
