"""What the gallery reads of a folder and how often, and what becomes of the copies that people were shown."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'fastdit[ui]'")
import gradio as gr
from gradio.route_utils import delete_files_created_by_app

from fastdit.apps.render import manifest
from fastdit.apps.web import tab_create, tab_gallery
from fastdit.apps.web.limits import Limits
from fastdit.apps.web.page import DAY, SERVED, Copies, Page
from fastdit.apps.web.queue import Studio

NEEDED = {"settings": {}, "seconds": {}, "tokens": 1, "density": 1.0, "seed": 0}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def studio(saved_pipe: Path, out: Path) -> Iterator[Studio]:
    made = Studio(out, {"tiny": str(saved_pipe)}, Limits(), {"device": "cpu"})
    yield made
    made.close()


def add(out: Path, job: str, finished: str = "2026", **more: Any) -> None:
    """A clip and its line."""
    record = {"job": job, "state": "done", "name": job, "file": f"{job}.mp4", "files": [f"{job}.mp4"], "finished": finished}
    for name in (f"{job}.mp4", f"{job}.json"):
        (out / name).write_bytes(job.encode())
    with (out / manifest.FILE).open("a") as file:
        file.write(json.dumps(record | NEEDED | more) + "\n")


def shown(out: Path) -> list[str]:
    return [record["job"] for record in tab_gallery.records(out)]


def test_whole_clips_of_the_folder_alone(out: Path) -> None:
    assert shown(out) == []
    assert shown(out / "nobody") == []
    (out.parent / "secret.mp4").write_bytes(b"secret")
    add(out, "a")
    add(out, "outside", files=["../secret.mp4"], file="../secret.mp4")
    add(out, "link")
    (out / "link.mp4").unlink()
    (out / "link.mp4").symlink_to(out.parent / "secret.mp4")
    add(out, "gone")
    (out / "gone.mp4").unlink()
    add(out, "failed", state="failed")
    with (out / manifest.FILE).open("a") as file:
        file.write(json.dumps({"job": "bare", "state": "done"}) + "\n")
    add(out, "b", finished="2027")
    assert shown(out) == ["b", "a"]
    found = tab_gallery.find(out, "a")
    assert found is not None
    assert found["job"] == "a"
    assert [tab_gallery.find(out, job) for job in ("outside", "link", "gone", "failed", "bare", "none")] == [None] * 6


def test_manifest_is_parsed_when_it_has_changed(out: Path) -> None:
    def parsed() -> int:
        return tab_gallery._parsed.cache_info().misses

    add(out, "a")
    before = parsed()
    for _ in range(5):
        assert shown(out) == ["a"]
        assert tab_gallery.find(out, "a") is not None
    assert parsed() == before + 1
    add(out, "b", finished="2027")
    assert shown(out) == ["b", "a"]
    assert parsed() == before + 2
    (out / "a.mp4").unlink()  # of files nothing is remembered
    assert shown(out) == ["b"]
    assert tab_gallery.find(out, "a") is None
    same = (out / manifest.FILE).stat()
    (out / "other").write_text((out / manifest.FILE).read_text().replace('"job": "b"', '"job": "c"'))
    os.utime(out / "other", ns=(same.st_atime_ns, same.st_mtime_ns))
    (out / "other").rename(out / manifest.FILE)  # of the same size and time
    assert shown(out) == ["c"]


def test_copies_go_after_a_day(studio: Studio, out: Path) -> None:
    add(out, "a")
    page = Page(studio, users=False)
    copy = Path(page.copy(out, "a.mp4"))
    assert copy.is_relative_to(out / SERVED)
    delete_files_created_by_app(page.blocks, DAY)
    assert copy.read_bytes() == b"a"
    killed = Page(studio, users=False)  # another server, after one that could not tidy up
    delete_files_created_by_app(killed.blocks, 0)
    assert not copy.exists()
    assert page.copy(out, "a.mp4") == str(copy)
    delete_files_created_by_app(page.blocks, 0)
    assert not copy.exists()
    assert (out / "a.mp4").exists()


def test_files_are_not_copied_in_the_servers_loop(studio: Studio) -> None:
    """All pages are served by one thread: who hashes a clip there stalls everybody's progress."""
    threads = set[threading.Thread]()

    class Seen(Page):
        def copy(self, folder: Path, name: str) -> str:
            threads.add(threading.current_thread())
            return super().copy(folder, name)

    async def drawn() -> str:
        said = {"prompt": "a red circle", "frames": 5, "height": 32, "width": 32, "steps": 2}
        page, request = Seen(studio, users=False), gr.Request(session_hash="tab")
        return [str(state) async for state in tab_create.draw(page, said, request)][-1]

    assert "<video" in asyncio.run(drawn())
    assert threads
    assert threading.main_thread() not in threads


def test_copies_may_be_added_while_they_are_gone_through() -> None:
    copies = Copies("ab")
    for path in copies:
        copies.add(path * 2)
    assert copies == {"a", "b", "aa", "bb"}
