"""The page as a person meets it, in a real browser: drawn, compared, stopped, loaded back, refused.

Nothing may go wrong unseen: every test fails on a console error, and on a request to any other host. SCREENSHOTS=folder keeps
a picture of each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from util import fastdit
from webserver import CHROMIUM, Server, Watched, serve

from fastdit.apps.render import manifest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'fastdit[ui]'")
pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'fastdit[test]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to look at the page: apt-get install chromium")

HTML = "a <b>red</b> circle <img src=x onerror=alert(1)> ${1+1} {{prompt}}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("web") / "out") as found:
        yield found


@pytest.fixture
def visit(chromium: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens tabs, pictures the last one, and sees that nothing went wrong in any."""
    tabs: list[Watched] = []

    def opened(**context: Any) -> Watched:
        tabs.append(Watched(chromium, server.url, **{"viewport": {"width": 1200, "height": 860}} | context))
        return tabs[-1]

    yield opened
    if tabs and (folder := os.environ.get("SCREENSHOTS")):
        tabs[-1].page.wait_for_timeout(300)
        tabs[-1].page.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
    for tab in tabs:
        tab.page.context.close()
        assert tab.wrong == []


def done(server: Server) -> list[dict[str, Any]]:
    return list(manifest.read(server.out).values())


def test_first_clip_from_an_empty_page(visit: Any, server: Server) -> None:
    tab = visit()
    assert "9,216 tokens (9 × 32 × 32)" in tab.page.wait_for_selector("#told:has-text('tokens')").inner_text()
    tab.page.click("#die")
    tab.page.wait_for_function("document.querySelector('#seed input').value != '0'")
    seed = int(tab.page.input_value("#seed input"))
    # seconds of drawing: a busy browser still sees the previews
    tab.draw("a red circle moving right", steps=100, frames=33, width=96, height=96)
    tab.page.wait_for_selector("#result [role=progressbar]")
    tab.page.wait_for_selector("#result .preview")
    tab.page.wait_for_selector("#result video")
    tab.page.wait_for_function("document.querySelector('#result video').readyState >= 2")
    shown = tab.page.inner_text("#result")
    assert re.search(rf"Seed\s+{seed}\b", shown)
    assert re.search(r"Tokens\s+1,296\b", shown)
    record = done(server)[-1]
    assert (record["seed"], record["settings"]["prompt"]) == (seed, "a red circle moving right")
    with tab.page.expect_download() as download:
        tab.page.get_by_role("link", name="Video").click()
    assert Path(download.value.path()).read_bytes() == (server.out / record["file"]).read_bytes()
    tab.set(width=256, height=256, frames=33)
    told = tab.page.wait_for_selector("#told:has-text('9,216 tokens')").inner_text()
    assert re.search(r"Density 0\.\d+: about \d\.\d × as fast as dense", told)


def test_compare(visit: Any, server: Server) -> None:
    tab = visit()
    tab.page.fill("#prompt textarea", "a blue square moving up")
    tab.set(width=64, height=64, frames=9, steps=4)
    tab.tab("Compare")
    tab.page.click("#compare")
    tab.page.wait_for_selector("#compared .pair")
    tab.page.wait_for_selector("canvas[data-drawn]")
    record = done(server)[-1]
    assert record["ratio"] > 0
    shown = tab.page.inner_text("#compared")
    density = f"{record['density']:.3f} of all pairs"
    for words in ("PSNR", "SSIM", "Flicker", density, "Worst layer", "Text", "Denoising", "Decoding"):
        assert words in shown
    tab.page.fill("[data-act=scrub]", "6")
    at = "Array.from(document.querySelectorAll('.pair video')).map(v => [v.paused, v.currentTime])"
    tab.page.wait_for_function(f"{at}.every(([paused, time]) => paused && Math.abs(time - 6.5 / 8) < 1e-3)")
    assert tab.page.inner_text("[data-act=play]") == "Play"
    brightest = """() => {
        const canvas = document.querySelector("canvas[data-drawn]");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return Math.max(...data.filter((_, i) => i % 4 < 3));
    }"""
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate(brightest) > 8  # they do differ, and it is seen
    tab.page.click("[data-act=play]")
    tab.page.wait_for_function(f"{at}.every(([paused]) => !paused)")
    tab.page.wait_for_timeout(1500)
    (_, dense), (_, fast) = tab.page.evaluate(at)
    assert abs(dense - fast) < 1.5 / 8
    tab.tab("Look inside")
    tab.page.get_by_label("Error", exact=True).check()
    tab.page.wait_for_selector("#ran .map")
    assert "Error of 16 calls" in tab.page.inner_text("#ran")  # two sparse steps, eight layers


def test_look_inside(visit: Any) -> None:
    tab = visit()
    tab.set(width=128, height=64, frames=17)
    tab.tab("Look inside")
    tab.page.click("#look")
    assert "Nothing was drawn yet" in tab.page.wait_for_selector("#ran [role=alert]").inner_text()
    tab.page.click("#draw")
    tab.page.wait_for_selector("#kept .map")
    assert "10² pairs of tiles of 1 × 8 × 8 tokens" in tab.page.inner_text("#kept")
    shares = [float(cell) for cell in tab.page.locator("#kept td").all_inner_texts() if cell]
    assert len(shares) == 8 * 4
    assert all(0 < share <= 1 for share in shares)


def test_stop_half_way(visit: Any, server: Server) -> None:
    tab, before = visit(), len(done(server))
    tab.draw("a green triangle", steps=100, frames=33)
    tab.page.wait_for_selector("#result [role=status]:has-text('step ')")
    tab.page.click("#stop")
    tab.page.wait_for_selector("#result :text('Stopped.')")
    assert len(done(server)) == before
    assert not list(server.out.glob("*green-triangle*"))
    tab.draw("a green triangle")
    tab.page.wait_for_selector("#result video")
    assert len(done(server)) == before + 1


def test_gallery_of_the_command_line_is_loaded_back(visit: Any, server: Server) -> None:
    """One source of truth: what another process left in the folder is what the page shows."""
    sizes = ["--frames", 5, "--height", 48, "--width", 80, "--steps", 2, "--guidance", 2.5, "--preset", "fast"]
    made = fastdit("render", HTML, "--seed", 77, "--negative", "blue", *sizes, "--out", server.out)
    assert made.returncode == 0, made.stderr
    tab = visit()
    tab.tab("Gallery")
    first = tab.page.locator("#gallery button").first
    assert first.inner_text().strip() == f"{HTML} (fast, seed 77)"
    first.click()
    tab.page.wait_for_selector("#detail video")
    assert tab.page.locator("#detail .prompt").inner_text() == HTML
    assert tab.page.locator("#gallery b, #detail b, #detail img").count() == 0
    if folder := os.environ.get("SCREENSHOTS"):
        tab.page.screenshot(path=Path(folder) / "gallery.png", full_page=True)
    links = tab.page.locator("#detail .downloads a").all_inner_texts()
    assert links == ["Video", "Contact sheet", "Settings and numbers (JSON)"]
    tab.page.click("#load")
    tab.page.wait_for_function("document.querySelector('#seed input').value == '77'")
    assert tab.page.input_value("#prompt textarea") == HTML
    values = [tab.page.input_value(f"#{name} input[type=number]") for name in ("frames", "height", "width", "steps")]
    assert values == ["5", "48", "80", "2"]
    assert tab.page.get_by_role("tab", name="Create").get_attribute("aria-selected") == "true"


def test_errors_are_sentences_where_one_looks(visit: Any, server: Server) -> None:
    tab, before = visit(), len(done(server))
    tab.page.click("#generate")
    assert "There is no prompt" in tab.page.wait_for_selector("#result [role=alert]").inner_text()
    tab.draw("x" * 10_000)
    assert "10000 characters" in tab.page.wait_for_selector("#result [role=alert]:has-text('longest')").inner_text()
    tab.page.get_by_text("More").click()
    svg = {"name": "a.png", "mimeType": "image/png", "buffer": b"<svg onload=alert(1)>"}
    tab.page.set_input_files("input[type=file]", svg)
    tab.page.wait_for_selector("text=a.png")
    tab.draw(HTML)
    assert "not a PNG" in tab.page.wait_for_selector("#result [role=alert]:has-text('picture')").inner_text()
    assert len(done(server)) == before


def test_sizes_that_nobody_may_have_are_not_computed(visit: Any) -> None:
    """The most that the sliders say: a map of it would have gigabytes, of tokens as of pixels in the picture."""
    tab = visit()
    tab.set(width=2048, height=2048, frames=241)
    assert "921,600 at most" in tab.page.wait_for_selector("#told [role=alert]").inner_text()
    tab.tab("Look inside")
    tab.page.click("#draw")
    assert "921,600 at most" in tab.page.wait_for_selector("#kept [role=alert]").inner_text()
    tab.tab("Create")
    tab.set(width=1280, height=720)
    tab.page.wait_for_selector("#told:has-text('878,400 tokens (61 × 90 × 160). Density 0.')")
    tab.tab("Look inside")
    tab.page.click("#draw")
    assert "2,048 tiles" in tab.page.wait_for_selector("#kept [role=alert]:has-text('14,640')").inner_text()


def test_two_at_once_take_turns_and_see_their_own(visit: Any) -> None:
    first, second = visit(), visit()
    first.draw("a large red circle", steps=100, frames=33, width=96, height=96)
    first.page.wait_for_selector("#result [role=status]:has-text('step ')")
    second.draw("a small blue square")
    second.page.wait_for_selector("#result [role=status]:has-text('You are next')")
    first.page.wait_for_selector("#result video")
    second.page.wait_for_selector("#result video")
    for tab, prompt in ((first, "a large red circle"), (second, "a small blue square")):
        assert tab.page.get_attribute("#result video", "aria-label") == prompt


def test_narrow_screen(visit: Any) -> None:
    tab = visit(viewport={"width": 360, "height": 740})
    for name in ("Gallery", "Look inside", "Compare", "Create"):
        if not tab.page.get_by_role("tab", name=name).is_visible():
            tab.page.get_by_role("button", name="More tabs").or_(tab.page.locator(".overflow-menu > button")).first.click()
            tab.page.locator(".overflow-dropdown button", has_text=name).click()
        else:
            tab.tab(name)
        tab.page.wait_for_timeout(300)
        assert tab.page.evaluate("document.scrollingElement.scrollWidth") <= 360, name
    tab.draw("a red circle", frames=5)
    tab.page.wait_for_selector("#result video")
    tab.page.wait_for_function("document.querySelector('#result').getBoundingClientRect().top < innerHeight")
    assert tab.page.evaluate("document.scrollingElement.scrollWidth") <= 360


def test_dark(visit: Any) -> None:
    tab = visit(color_scheme="dark")
    assert tab.page.evaluate("document.body.classList.contains('dark')")
    rgb = "name => getComputedStyle(document.body)[name].match(/[0-9.]+/g).slice(0, 3).map(Number)"
    light, dark = tab.page.evaluate(f"['color', 'backgroundColor'].map({rgb})")
    assert min(light) > 200
    assert max(dark) < 60
    tab.draw("a yellow square moving left")
    tab.page.wait_for_selector("#result video")


def test_by_keyboard_alone(visit: Any) -> None:
    tab = visit()
    tab.set(width=64, height=64, frames=5, steps=2)
    tab.page.focus("#prompt textarea")
    tab.page.keyboard.type("a gray circle")
    for _ in range(12):
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate("document.activeElement.id") == "generate":
            break
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("#result video")
