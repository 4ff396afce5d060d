"""Whose turn it is, what may be asked for, and what is shown of it: the page without a browser."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from util import call

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'fastdit[ui]'")

from fastdit import PRESETS
from fastdit.apps.errors import UserError
from fastdit.apps.render import manifest
from fastdit.apps.web import compare_options, html, tab_create, tab_inspect
from fastdit.apps.web.limits import Limits
from fastdit.apps.web.page import Page
from fastdit.apps.web.passwords import matches, read_users
from fastdit.apps.web.preview import preview
from fastdit.apps.web.queue import Studio, Ticket
from fastdit.apps.web.server import loopback

SMALL = {"frames": 5, "height": 32, "width": 32, "steps": 2}


@pytest.fixture
def studio(saved_pipe: Path, tmp_path: Path) -> Any:
    made = Studio(tmp_path / "out", {"tiny": str(saved_pipe)}, Limits(each=2, queue=5), {"device": "cpu"})
    yield made
    made.close()


async def end(studio: Studio, user: str, **said: Any) -> Any:
    """The ticket as it was at last, and the states that it went through."""
    job, states = studio.job(SMALL | {"prompt": "a red circle"} | said), []
    async for ticket in studio.follow(user, job, studio.out):
        states.append(ticket.state)
    return ticket, states


def test_served_in_the_order_of_coming(studio: Studio) -> None:
    async def all_at_once() -> Any:
        return await asyncio.gather(*(end(studio, f"user {i}", seed=i) for i in range(5)))

    found = asyncio.run(all_at_once())
    assert [ticket.state for ticket, _ in found] == ["done"] * 5
    finished = [ticket.record["seed"] for ticket, _ in sorted(found, key=lambda one: one[0].marks[-1])]
    assert finished == [0, 1, 2, 3, 4]
    assert studio.queue == []
    assert list(manifest.read(studio.out)) == [ticket.job.hash for ticket, _ in found]
    assert {"waiting", "denoising", "done"} <= set(found[-1][1])


def test_same_settings_are_not_drawn_again(studio: Studio) -> None:
    first, _ = asyncio.run(end(studio, "a"))
    again, states = asyncio.run(end(studio, "b"))
    assert again.record["frames_sha256"] == first.record["frames_sha256"]
    assert again.marks == []
    assert "denoising" not in states


def test_stop_within_a_step(studio: Studio) -> None:
    async def stopped() -> Any:
        job = studio.job(SMALL | {"prompt": "a red circle", "steps": 90})
        async for ticket in studio.follow("a", job, studio.out):
            if ticket.step == 3:
                studio.stop("someone else")
            if ticket.step >= 5 and not ticket.stop.is_set():
                studio.stop("a")
                at = ticket.step
        return ticket, at

    ticket, at = asyncio.run(stopped())
    assert ticket.state == "stopped"
    assert 5 <= at <= ticket.step <= at + 1
    assert manifest.read(studio.out) == {}
    assert asyncio.run(end(studio, "a"))[0].state == "done"


def test_who_goes_frees_the_place(studio: Studio) -> None:
    async def gone() -> None:
        jobs = [studio.job(SMALL | {"prompt": "a red circle", "steps": 90, "seed": seed}) for seed in (1, 2)]
        running, waiting = (studio.follow(user, job, studio.out) for user, job in zip("ab", jobs, strict=True))
        await anext(running)
        await anext(waiting)
        assert len(studio.queue) == 2
        await waiting.aclose()
        assert [ticket.user for ticket in studio.queue] == ["a"]
        await running.aclose()
        until = time.monotonic() + 20
        while studio.queue and time.monotonic() < until:
            await asyncio.sleep(0.02)
        assert studio.queue == []

    asyncio.run(gone())
    assert manifest.read(studio.out) == {}


def test_limits_of_a_user_and_of_the_queue(studio: Studio) -> None:
    job = studio.job(SMALL | {"prompt": "a"})
    for user in ("a", "a", "b", "b"):
        studio.enter(Ticket(user, job, studio.out, 2))
    with pytest.raises(UserError, match="2 clips waiting already"):
        studio.enter(Ticket("a", job, studio.out, 2))
    studio.enter(Ticket("c", job, studio.out, 2))
    with pytest.raises(UserError, match="too many people"):
        studio.enter(Ticket("d", job, studio.out, 2))


def test_a_look_inside_takes_its_turn_and_a_place(studio: Studio) -> None:
    studio.warm.result()
    go = threading.Event()
    running, _ = studio.call("a", go.wait)
    waiting, ahead = studio.call("a", lambda: "drawn")
    assert ahead == 1
    with pytest.raises(UserError, match="2 clips waiting already"):
        studio.call("a", lambda: "too many")
    last, _ = studio.call("b", lambda: "gone")
    studio.stop("b")
    go.set()
    assert running.result(60)
    assert waiting.result(60) == "drawn"
    with pytest.raises(UserError, match="stopped"):
        last.result(60)
    studio.worker.submit(int).result(60)  # what a future calls at its end has been called
    assert studio.queue == []


def test_a_crash_is_a_sentence_and_the_next_clip_is_drawn(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.warm.result()
    decoder = studio.renderer.pipe.vae

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(decoder, "decode", broken)
    ticket, _ = asyncio.run(end(studio, "a"))
    assert ticket.state == "failed"
    assert "illegal memory access" in ticket.error
    assert asyncio.run(end(studio, "a"))[0].state == "done"  # by a pipeline loaded anew


def test_what_nobody_foresaw_is_in_the_log(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    async def failed() -> Any:
        job = studio.job(SMALL | {"prompt": "a"})
        return [ticket async for ticket in studio.follow("a", job, Path("a\0b"))][-1]

    assert "its log says more" in asyncio.run(failed()).error
    assert "ValueError: embedded null byte" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"prompt": ""}, "no prompt"), ({"prompt": "x" * 10_000}, "10000 characters"), ({"frames": -5}, "frames"),
        ({"steps": math.nan}, "steps must be a whole number"), ({"guidance": math.inf}, "guidance"), ({"seed": -1}, "seed"),
        ({"steps": 101}, "100 at most"), ({"frames": 1001}, "241 at most"), ({"height": 10_000, "width": 10_000}, "pixels"),
        ({"model": "/etc"}, "no model"), ({"preset": "../x"}, "unknown preset"), ({"lora": "x"}, "unknown setting 'lora'"),
        ({"device": "cuda"}, "unknown setting"), ({"width": "32; rm"}, "width"), ({"prompt": {"path": "/etc/passwd"}}, "text"),
        ({"image": "/nowhere.png"}, "no file"),
    ],
)  # fmt: skip
def test_refused_before_the_queue(studio: Studio, said: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        studio.job(SMALL | {"prompt": "a"} | said)
    assert studio.queue == []


def test_pictures_that_are_refused(tmp_path: Path) -> None:
    huge, text, fine = tmp_path / "huge.png", tmp_path / "text.png", tmp_path / "fine.png"
    Image.new("1", (20_000, 10_000)).save(huge)
    text.write_text("<svg onload=alert(1)>")
    Image.new("RGB", (64, 64)).save(fine)
    limits = Limits()
    limits.check_picture(str(fine))
    with pytest.raises(UserError, match="more than 16 million pixels"):
        limits.check_picture(str(huge))
    with pytest.raises(UserError, match="not a PNG"):
        limits.check_picture(str(text))
    with text.open("wb") as file:
        file.truncate(21 * 2**20)
    with pytest.raises(UserError, match="larger than 20 MB"):
        limits.check_picture(str(text))


def test_limits_come_before_the_prediction(studio: Studio) -> None:
    studio.warm.result()
    page = Page(studio, users=False)
    assert "921,600 at most" in tab_create.estimate_line(page, "a red ball", "tiny", "balanced", 1, 2048, 2048, 20)
    assert "241 at most" in tab_create.estimate_line(page, "a red ball", "tiny", "balanced", 10**9, 64, 64, 20)
    assert "tokens" in tab_create.estimate_line(page, "a red ball", "tiny", "balanced", 9, 64, 64, 20)
    with pytest.raises(ValueError, match="at most 2,048 tiles"):
        tab_inspect.tile_map("power_of_two", 0.125, (33, 64, 64), 0.6)


@pytest.mark.parametrize("remainder", compare_options.REMAINDER)
@pytest.mark.parametrize("policy", compare_options.POLICY)
def test_knobs_come_back_from_the_record(policy: str, remainder: str) -> None:
    for precision in compare_options.PRECISIONS:
        knobs = compare_options.Knobs(policy, 0.25, precision, remainder, precision == "FP8")
        recorded = json.loads(json.dumps(compare_options.config(knobs).to_dict()))
        assert compare_options.knobs(recorded) == knobs
    assert compare_options.knobs(PRESETS["fps"].to_dict()) is None
    with pytest.raises(ValueError, match="density"):
        compare_options.config(compare_options.Knobs(density=math.nan))


def test_preview_is_a_picture_of_three_frames() -> None:
    image = html.data_url(Image.new("RGB", (4, 4)))
    found = preview(torch.randn(1, 16, 5, 8, 12))
    assert found.startswith("data:image/jpeg;base64,")
    assert len(found) > len(image)
    assert preview(torch.randn(1, 64, 16)) == ""


def test_words_are_shown_literally() -> None:
    said = "<img src=x onerror=alert(1)> ${alert(2)} {{prompt}} `\\`"
    shown = html.error(said)
    assert "<img" not in shown
    assert not set("${`\\") & set(shown)
    assert said[1:] in unescape(shown)


def test_who_may_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(loopback(host) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"))
    assert not any(loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))
    assert call(monkeypatch, "web", "--host", "0.0.0.0", "--out", tmp_path) == 2
    assert "--auth" in capsys.readouterr().err
    users = tmp_path / "users"
    users.write_text("# who\nada:pass:word\n\ncy:x\n")
    found = read_users(users)
    assert found.keys() == {"ada", "cy"}
    assert matches("pass:word", found["ada"])
    users.write_bytes("\ufeffada:pass\u2028word\r\ncy:x\x0cy\r\n".encode())
    found = read_users(users)
    assert matches("pass\u2028word", found["ada"])
    assert matches("x\x0cy", found["cy"])
    for wrong in (
        "../x:pass",
        "ada",
        "ada:",
        "",
        "ada:scrypt$15$8$1$short$pass",
        "ada:scrypt$40$8$1$" + "A" * 24 + "$" + "A" * 44,
    ):
        users.write_text(wrong)
        with pytest.raises(UserError) as refused:
            read_users(users)
        assert "pass" not in str(refused.value).replace("name:password", "")
    assert call(monkeypatch, "web", "--max-steps", 0) == 2
    assert call(monkeypatch, "web", "--port", 99999) == 2
