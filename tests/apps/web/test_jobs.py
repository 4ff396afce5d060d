"""Clips are the server's: the browser that asked for them finds them again, and nobody else does. And the page can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from webserver import CHROMIUM, Server, Watched, serve

from fastdit.apps.render import manifest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'fastdit[ui]'")
pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'fastdit[test]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to look at the page: apt-get install chromium")

CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
SIZES = {"desktop": {"width": 1440, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("jobs") / "out") as found:
        yield found


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """A browser of its own: its cookies are not the others'."""
    found = chromium.new_context(viewport=SIZES["desktop"])
    yield found
    found.close()


def picture(tab: Watched, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        tab.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def states(tab: Watched) -> list[str]:
    return tab.page.eval_on_selector_all("#jobs li", "rows => rows.map((row) => row.dataset.state)")


def test_a_reload_finds_the_clip_its_progress_and_its_settings(browser: Any, server: Server) -> None:
    tab = Watched(browser, server.url)
    tab.draw("a red circle moving right", frames=33, width=96, height=96, steps=100)
    tab.page.wait_for_selector("#result [role=status]:has-text('step ')")
    tab.page.reload()
    tab.page.wait_for_selector("#generate")
    tab.wrong.clear()  # of the old document, whose stream was cut
    tab.page.wait_for_selector("#result [role=status]:has-text('step ')")
    tab.page.wait_for_function("document.querySelector('#prompt textarea').value == 'a red circle moving right'")
    values = [tab.page.input_value(f"#{name} input[type=number]") for name in ("frames", "height", "width", "steps")]
    assert values == ["33", "96", "96", "100"]
    tab.page.wait_for_selector("#jobs li[data-state=denoising]")
    picture(tab, "running")
    assert tab.wrong == []
    tab.page.close()  # and with nobody there it goes on
    again = Watched(browser, server.url)
    again.page.wait_for_selector("#result video")
    again.page.wait_for_selector("#jobs li[data-state=done]")
    assert [record["settings"]["steps"] for record in manifest.read(server.out).values()] == [100]
    assert again.wrong == []


def test_a_list_of_clips_to_stop_and_remove(browser: Any, chromium: Any, server: Server) -> None:
    tab = Watched(browser, server.url)
    tab.draw("a blue square", frames=33, width=96, height=96, steps=100)
    tab.page.wait_for_selector("#jobs li[data-state=denoising]")
    tab.draw("a green triangle", steps=3)
    tab.page.wait_for_selector("#result [role=status]:has-text('You are next')")
    tab.page.wait_for_selector("#jobs li[data-state=waiting]")
    assert states(tab) == ["waiting", "denoising"]
    stranger = Watched(chromium, server.url)
    stranger.page.wait_for_timeout(2500)
    assert states(stranger) == []
    assert "Say what to draw" in stranger.page.inner_text("#result")
    tab.page.get_by_role("button", name="Stop: a green triangle").click()
    tab.page.wait_for_selector("#result :text('Stopped.')")
    assert states(tab) == ["stopped", "denoising"]
    tab.page.get_by_role("button", name="Remove from list: a green triangle").click()
    tab.page.wait_for_function("document.querySelectorAll('#jobs li').length == 1")
    tab.page.get_by_role("button", name="Show: a blue square").click()
    tab.page.wait_for_selector("#result [role=status]:has-text('step ')")
    tab.page.get_by_role("button", name="Stop: a blue square").click()
    tab.page.wait_for_selector("#jobs li[data-state=stopped]")
    stranger.page.context.close()
    assert tab.wrong == stranger.wrong == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(chromium: Any, server: Server, size: str, scheme: str) -> None:
    context = chromium.new_context(viewport=SIZES[size], color_scheme=scheme)
    tab = Watched(context, server.url)
    tab.page.wait_for_selector("#told p")
    pale = {"empty": tab.page.evaluate(CONTRAST)}
    tab.page.click("#generate")
    tab.page.wait_for_selector("#result [role=alert]")
    pale["refused"] = tab.page.evaluate(CONTRAST)
    tab.draw("a yellow circle moving down")
    tab.page.wait_for_selector("#result video")
    tab.page.wait_for_selector("#jobs li[data-state=done]")
    pale["done"] = tab.page.evaluate(CONTRAST)
    picture(tab, f"create-{size}-{scheme}")
    for name in ("Compare", "Look inside", "Gallery"):
        if not tab.page.get_by_role("tab", name=name).is_visible():
            tab.page.locator(".overflow-menu > button").click()
            tab.page.locator(".overflow-dropdown button", has_text=name).click()
        else:
            tab.tab(name)
        tab.page.wait_for_timeout(500)
        pale[name] = tab.page.evaluate(CONTRAST)
        picture(tab, f"{name.split()[-1].lower()}-{size}-{scheme}")
    context.close()
    assert pale == {key: [] for key in pale}
    assert tab.wrong == []
