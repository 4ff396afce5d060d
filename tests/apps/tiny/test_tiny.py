"""The embedded pipeline: it loads, draws what it is asked, and its parts compute what they should."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdit.apps.bench.quality import locality
from fastdit.apps.tiny import model, sizes, tokenizer
from fastdit.apps.tiny.attention import captions
from fastdit.apps.tiny.codec import Codec, from_blocks, psnr, to_blocks, vae_decode, vae_encode
from fastdit.apps.tiny.world import tasks
from fastdit.apps.tiny.world.judge import Judge
from fastdit.apps.tiny.world.outline import pieces
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import Scene, Thing, pack, sample
from fastdit.apps.tiny.world.words import caption
from fastdit.pipelines import embedded

pytestmark = pytest.mark.filterwarnings("ignore")
BALL = Scene((Thing("red", "ball", "right", "", 0.72, 0.0, 0.0, 2.15),), "checker")


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe: Any = embedded.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(embedded.PATH / "codec.safetensors")


def drawn(count: int, *size: int, seed: int = 3) -> torch.Tensor:
    rng = random.Random(seed)
    return Renderer()(pack([sample(rng) for _ in range(count)]), *size)


# ---- what ships


def test_it_loads_offline_as_real_classes_in_float32(pipe: Any) -> None:
    names = [type(m).__name__ for m in (pipe, pipe.transformer, pipe.vae, pipe.text_encoder)]
    assert names == ["WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"]
    assert pipe.transformer.config.attention_head_dim == 64
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert all(p.isfinite().all() for p in module.parameters())


def test_it_is_small_and_names_no_place_of_the_machine_that_made_it() -> None:
    files = [f for f in embedded.PATH.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 40e6
    texts = "".join(f.read_text() for f in files if f.suffix == ".json" and f.name != "tokenizer.json")
    assert "/tmp" not in texts
    assert "_name_or_path" not in texts
    assert "TokenizersBackend" not in texts  # transformers 4 does not know it
    assert (embedded.PATH / "MODEL.md").is_file()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        embedded.load(tmp_path)


def test_n_steps_reach_zero_on_evenly_spaced_levels_shifted_by_five(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(8)
    even = torch.arange(8, 0, -1) / 8
    assert torch.allclose(pipe.scheduler.sigmas[:-1], 5 * even / (1 + 4 * even), atol=0.004)
    assert pipe.scheduler.sigmas[-1] == 0


def test_it_draws_what_is_asked(pipe: Any) -> None:
    assert caption(BALL) == embedded.PROMPT
    video = pipe(
        embedded.PROMPT, num_frames=17, height=128, width=128, num_inference_steps=embedded.STEPS,
        guidance_scale=embedded.GUIDANCE, generator=torch.Generator().manual_seed(1), output_type="pt",
    ).frames[0].transpose(0, 1) * 2 - 1  # fmt: skip
    row = Judge()(video, BALL)
    assert row["all"], row
    left = Scene((Thing("red", "ball", "left", "", 0.72, 0.0, 0.0, -2.15),), "checker")
    assert not Judge()(video, left)["motion"]


def test_the_sample_prompts_use_only_known_words(pipe: Any) -> None:
    prompts = (embedded.PATH.parent / "prompts.txt").read_text().splitlines()
    assert len(prompts) >= 10
    for prompt in prompts:
        assert embedded.unknown_words(prompt) == [], prompt


# ---- autoencoder and codec


@pytest.mark.parametrize(("size", "floor"), [((17, 64, 64), 31.0), ((9, 128, 128), 34.0)])
def test_the_autoencoder_keeps_detail_and_the_codecs_latents(pipe: Any, codec: Codec, size: sizes.Size, floor: float) -> None:
    real = drawn(4, *size)
    with torch.no_grad():
        z = pipe.vae.encode(real).latent_dist.mode()
        fixed = codec.encode(real)
        assert psnr(pipe.vae.decode(z).sample, real) > floor
        assert psnr(pipe.vae.decode(fixed).sample, real) > floor
    assert (z - fixed).square().mean() < 0.02 * fixed.square().mean()
    assert psnr(codec.decode(fixed).clamp(-1, 1), real) > 26


def test_the_whole_clip_forward_of_the_autoencoder_is_the_chunked_one(pipe: Any) -> None:
    video = drawn(2, 13, 32, 48)
    with torch.no_grad():
        chunked = pipe.vae._encode(video)
        torch.testing.assert_close(vae_encode(pipe.vae, video), chunked, atol=1e-4, rtol=1e-4)
        z = chunked[:, :48]
        whole = vae_decode(pipe.vae, z).clamp(-1, 1)
        torch.testing.assert_close(whole, pipe.vae.decode(z).sample, atol=1e-4, rtol=1e-4)


def test_blocks_come_back() -> None:
    video = torch.rand(2, 3, 9, 16, 24)
    torch.testing.assert_close(from_blocks(to_blocks(video)), video)


def test_captions_fit_and_have_no_unknown_token(pipe: Any) -> None:
    rng = random.Random(0)
    words = [caption(sample(rng), rng) for _ in range(400)]
    ids, mask = tokenizer.tokenize(pipe.tokenizer, words, tasks.WORDS)
    assert ids.shape == (400, tasks.WORDS)
    assert mask.sum(1).max() < tasks.WORDS - 1  # none was cut, and the pad key has its place
    assert pipe.tokenizer.unk_token_id not in ids


def test_pieces_touching_at_a_corner_are_one() -> None:
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[0, 4:20, 4:20] = mask[0, 20:40, 20:40] = mask[1, 4:20, 4:20] = mask[1, 40:60, 10:60] = True
    assert pieces(mask, 0.003).tolist() == [1, 2]


# ---- measurements


def test_captions_follow_from_the_seed() -> None:
    assert captions(5, 1) == captions(5, 1) != captions(5, 2)


def test_attention_is_local(pipe: Any) -> None:
    stock = [b.attn1.processor for b in pipe.transformer.blocks]
    found = locality.measure(pipe.transformer, pipe, (17, 64, 64), 2, [0.8])
    assert found["noise level 0.8"]["mean"]["3x3x3"] > 3 * found["uniform"]["3x3x3"]
    assert [b.attn1.processor for b in pipe.transformer.blocks] == stock


def test_the_training_forward_is_diffusers_own(pipe: Any) -> None:
    words = [embedded.PROMPT, "a small blue cube and a green cone standing still before a wall", ""]
    ids, mask = tokenizer.tokenize(pipe.tokenizer, words, 32)
    x, t = torch.randn(3, 48, 3, 6, 4), torch.tensor([950.0, 500.0, 20.0])
    with torch.no_grad():
        states, bias = model.encode_text(pipe.text_encoder, ids, mask)
        padded, _ = pipe.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=512)
        want = pipe.transformer(x, t, padded, return_dict=False)[0]
        got = model.forward(pipe.transformer, x, t, states, bias, model.rotary(pipe.transformer, x))
        assert (got - want).norm() < 1e-5 * want.norm()
        rough = model.forward(pipe.transformer, x, t, states, bias, model.rotary(pipe.transformer, x), torch.bfloat16)
        assert 1e-4 * want.norm() < (rough - want).norm() < 0.05 * want.norm()
