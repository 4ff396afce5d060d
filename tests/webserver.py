"""For tests of the page: `fastdit web` in a process of its own, and Debian's Chromium, kept offline."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from util import command, environment

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
READY = 600  # seconds, of which importing PyTorch on a busy machine takes most


class Server:
    """url: of the page; out: its folder; process: to look at and to kill."""

    def __init__(self, url: str, out: Path, process: subprocess.Popen[str], log: Path) -> None:
        self.url, self.out, self.process, self.log = url, out, process, log


@contextmanager
def serve(out: Path, *arguments: object) -> Iterator[Server]:
    """A page on a free port, ended as Ctrl-C ends it."""
    log = out.parent / f"{out.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command("web", "--out", out, "--port", 0, *arguments), stdout=file, stderr=file, text=True,
            env=environment(),
        )  # fmt: skip
    try:
        end = time.monotonic() + READY
        while (found := re.search(r"fastdit: (http://\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield Server(found[1], out, process, log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(180)


class Watched:
    """A browser tab that notes console errors and whatever it asks other hosts for."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.wrong: list[str] = []
        self.page = browser.new_page(**context)
        self.page.set_default_timeout(180_000)
        self.page.on("console", lambda said: said.type == "error" and self.wrong.append(f"console: {said.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("request", lambda asked: asked.url.startswith((url, "data:", "blob:")) or self.wrong.append(asked.url))
        self.page.goto(url)
        self.page.wait_for_selector("#generate")

    def set(self, **values: int) -> None:
        """Type numbers into sliders."""
        for name, value in values.items():
            self.page.fill(f"#{name} input[type=number], #{name} input", str(value))
            self.page.keyboard.press("Tab")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def draw(self, prompt: str, **sizes: int) -> None:
        """Press Generate."""
        self.page.fill("#prompt textarea", prompt)
        self.set(**{"width": 64, "height": 64, "frames": 9, "steps": 3} | sizes)
        self.page.click("#generate")
