"""The embedded pipeline: it loads, draws what it is asked, and what it was trained on and is judged by is right."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdit.apps.bench.quality import locality
from fastdit.apps.tiny import clips, evaluate, model, tasks
from fastdit.apps.tiny.clips import HELD_OUT, Clip, Thing, pack, render, sample
from fastdit.apps.tiny.codec import Codec, from_blocks, psnr, to_blocks, vae_decode, vae_encode
from fastdit.apps.tiny.judge import ask, judge, judge_clip, pieces, summary
from fastdit.apps.tiny.words import caption
from fastdit.pipelines import embedded

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe: Any = embedded.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(embedded.PATH / "codec.safetensors")


def some(n: int, seed: int = 3, **how: Any) -> list[Clip]:
    rng = random.Random(seed)
    return [sample(rng, **how) for _ in range(n)]


def red(motion: str = "moving right", shape: str = "circle", **change: Any) -> Clip:
    x, y = clips.MOTIONS[motion]
    thing = Thing("red", shape, motion, "", 0.19, 0.5, 0.5, 0.4 * x, 0.4 * y)
    return Clip((replace(thing, **change),))


# ---- what ships


def test_it_loads_offline_as_real_classes_in_float32(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [type(m).__name__ for m in (pipe, pipe.transformer, pipe.vae, pipe.text_encoder)]
    assert names == ["WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"]
    assert pipe.transformer.config.attention_head_dim == 64
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert all(p.isfinite().all() for p in module.parameters())


def test_it_is_small_and_names_no_place_of_the_machine_that_made_it() -> None:
    files = [f for f in embedded.PATH.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 18e6
    texts = "".join(f.read_text() for f in files if f.suffix == ".json" and f.name != "tokenizer.json")
    assert "/tmp" not in texts
    assert "_name_or_path" not in texts
    assert "TokenizersBackend" not in texts  # transformers 4 does not know it
    assert (embedded.PATH / "MODEL.md").is_file()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        embedded.load(tmp_path)


def test_it_draws_what_is_asked(pipe: Any) -> None:
    asked = [red(), *some(1, seed=8, triple=sorted(HELD_OUT)[0], kind="plain")]
    videos = evaluate.generate(pipe, [caption(c) for c in asked], (17, 64, 64), steps=10, seed=1)
    assert all(row["all"] for row in judge(videos, asked))
    assert not judge_clip(videos[0], red("moving left"))["direction"]


def test_the_sample_prompts_use_only_known_words(pipe: Any) -> None:
    prompts = (embedded.PATH.parent / "prompts.txt").read_text().splitlines()
    assert len(prompts) >= 10
    for prompt in prompts:
        words = prompt.split()
        assert len(pipe.tokenizer(prompt).input_ids) == len(words) + 1, prompt  # a token a word, and the end


# ---- autoencoder and codec


@pytest.mark.parametrize(("size", "floor"), [((17, 64, 64), 34.0), ((9, 128, 128), 38.0)])
def test_the_autoencoder_keeps_30_db_and_the_codecs_latents(pipe: Any, codec: Codec, size: tasks.Size, floor: float) -> None:
    real = render(pack(some(4)), *size)
    with torch.no_grad():
        z = pipe.vae.encode(real).latent_dist.mode()
        fixed = codec.encode(real)
        assert psnr(pipe.vae.decode(z).sample, real) > floor
        assert psnr(pipe.vae.decode(fixed).sample, real) > floor
    assert (z - fixed).square().mean() < 0.02 * fixed.square().mean()
    assert psnr(codec.decode(fixed).clamp(-1, 1), real) > 27


def test_the_whole_clip_forward_of_the_autoencoder_is_the_chunked_one(pipe: Any) -> None:
    video = render(pack(some(2)), 13, 32, 48)
    with torch.no_grad():
        chunked = pipe.vae._encode(video)
        torch.testing.assert_close(vae_encode(pipe.vae, video), chunked, atol=1e-4, rtol=1e-4)
        z = chunked[:, :48]
        whole = vae_decode(pipe.vae, z).clamp(-1, 1)
        torch.testing.assert_close(whole, pipe.vae.decode(z).sample, atol=1e-4, rtol=1e-4)


def test_blocks_come_back() -> None:
    video = torch.rand(2, 3, 9, 16, 24)
    torch.testing.assert_close(from_blocks(to_blocks(video)), video)


# ---- clips, words, judge


def test_clips_follow_from_the_seed_and_stay_in_the_frame() -> None:
    assert some(50) == some(50)
    assert torch.equal(render(pack(some(3)), 5, 32, 48), render(pack(some(3)), 5, 32, 48))
    for clip in some(500):
        for t in clip.things:
            for c, d in ((t.x, t.dx), (t.y, t.dy)):
                margin = min(c, 1 - c) - abs(d) / 2 - clips.REACH * t.radius
                assert margin > -0.02  # the tips of the largest may just be cut at the end of their path
    assert {c.kind for c in some(200)} == {"plain", "diagonal", "size", "background", "two"}


def test_captions_are_plain_or_varied_and_fit(pipe: Any) -> None:
    assert caption(red()) == "a red circle moving right"
    rng = random.Random(0)
    words = [caption(c, rng) for c in some(400)]
    assert len({caption(red(), rng) for _ in range(200)}) > 30
    ids, mask = model.tokenize(pipe.tokenizer, words)
    assert ids.shape == (400, model.MAX_TOKENS)
    assert mask.sum(1).max() < model.MAX_TOKENS - 1  # none was cut, and the pad key has its place
    assert pipe.tokenizer.unk_token_id not in ids


def test_held_out_combinations_are_judged_but_never_trained_on(pipe: Any) -> None:
    assert len(HELD_OUT) == round(0.05 * len(clips.TRIPLES))
    data = tasks.Batches([((17, 64, 64), 1.0)], 6400, pipe.tokenizer)
    assert not any(c.held_out for step in range(60) for c in data.clips(step)[1])
    assert sum(c.held_out for c in ask(200)[0]) == 20


def test_the_judge_passes_real_clips_and_no_others() -> None:
    asked = ask(40)[0]
    real = [render(pack([c]), 17, 64, 64)[0] for c in asked]
    assert summary(judge(real, asked), asked)["everything"]["all"] == 1
    assert summary(judge(real, asked[1:] + asked[:1]), asked)["everything"]["all"] == 0

    def verdict(clip: Clip, seen: torch.Tensor) -> list[str]:
        return [m for m, right in judge_clip(seen, clip).items() if not right and m != "all"]

    still = red("standing still", "square")
    video = render(pack([still]), 17, 64, 64)[0]
    assert verdict(still, video) == []
    assert "aspect" in verdict(still, torch.nn.functional.interpolate(video, (40, 64)))
    assert verdict(still, torch.where(torch.arange(64).view(1, 1, 1, 64) == 32, video[..., :1], video)) != []
    other = render(pack([red("standing still", radius=0.1, x=0.15, y=0.15)]), 17, 64, 64)[0]
    assert "count" in verdict(still, torch.maximum(video, other))
    growing = torch.cat([render(pack([red("standing still", "square", radius=r)]), 5, 64, 64)[0] for r in (0.15, 0.2)], 1)
    assert "size" in verdict(still, growing)
    assert "color" in verdict(still, video.flip(0))
    assert verdict(replace(still, background="white"), video) == ["background"]


def test_pieces_touching_at_a_corner_are_one() -> None:
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[0, 4:20, 4:20] = mask[0, 20:40, 20:40] = mask[1, 4:20, 4:20] = mask[1, 40:60, 10:60] = True
    assert pieces(mask).tolist() == [1, 2]


# ---- measurements


def test_evaluation_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "judge.json"
    options = f"--sizes 5x32x32:2 --steps 2 --ceilings 2 --device cpu --json {report} --sheets {tmp_path / 'sheets'}"
    evaluate.main(options.split())
    (row,) = json.loads(report.read_text())
    assert row["judge"]["everything"]["n"] == 2
    assert row["psnr"]["autoencoder"] > 25
    assert (tmp_path / "sheets" / "5x32x32.png").is_file()


def test_attention_is_local(pipe: Any, codec: Codec) -> None:
    stock = [b.attn1.processor for b in pipe.transformer.blocks]
    found = locality.measure(pipe.transformer, pipe, codec, (17, 64, 64), 2, [0.8])
    assert found["noise level 0.8"]["mean"]["3x3x3"] > 3 * found["uniform"]["3x3x3"]
    assert [b.attn1.processor for b in pipe.transformer.blocks] == stock
