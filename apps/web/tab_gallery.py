"""The tab of finished clips: the manifest of the output folder, newest first, also those of the command line."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from fastdit.apps.render import manifest
from fastdit.apps.web import compare_options, html
from fastdit.apps.web.page import Page
from fastdit.apps.web.queue import EMBEDDED

MANY = 24  # clips shown at first, and added by each press of Older
LABEL = 120  # characters of a prompt under its picture
CHOSEN = """element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-job]");
    if (button) trigger("select", { index: 0, value: button.dataset.job });
})"""


def build(page: Page, tabs: Any, tab: Any) -> None:
    count, chosen = gr.State(MANY), gr.State("")
    with gr.Row():
        refresh = gr.Button("Refresh", elem_id="refresh")
        older = gr.Button("Older", elem_id="older")
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            pictures = gr.HTML(elem_id="gallery", js_on_load=CHOSEN)
        with gr.Column(scale=2, min_width=300):
            load = gr.Button("Load these settings", variant="primary", elem_id="load", interactive=False)
            detail = gr.HTML(html.note("Choose a clip to see its settings and files."), elem_id="detail")

    def show(request: gr.Request, most: int) -> str:
        folder = page.folder(request)
        found = records(folder)
        if not found:
            return html.note("Nothing was made yet.")
        more = html.note(f"The newest {most} of {len(found)}.") if len(found) > most else ""
        return f'<div class="grid">{"".join(_button(page, folder, record) for record in found[:most])}</div>{more}'

    def choose(request: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
        folder = page.folder(request)
        record = find(folder, str(event.value))
        if record is None:
            return html.error("That clip was removed: press Refresh."), "", gr.update(interactive=False)
        prompt = f'<p class="prompt">{html.text(record["settings"]["prompt"])}</p>'
        return prompt + page.result(folder, record), record["job"], gr.update(interactive=True)

    def settings(request: gr.Request, job: str) -> tuple[Any, ...]:
        record = find(page.folder(request), job)
        fields = [gr.skip() for _ in range(len(page.inputs) + len(page.knobs))]
        if record is None:
            return *fields, gr.skip()
        made = compare_options.knobs(record["settings"]["config"])
        values = [loaded(page, record["settings"], name) for name in page.inputs]
        return (
            *values,
            *(fields[len(page.inputs) :] if made is None else made),
            gr.Tabs(selected="create" if made is None else "compare"),
        )

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    for event in (tab.select, refresh.click):
        event(show, count, pictures, **quiet)
    older.click(lambda most: most + MANY, count, count, **quiet).then(show, count, pictures, **quiet)
    pictures.select(choose, None, [detail, chosen, load], **quiet)
    load.click(settings, chosen, [*page.inputs.values(), *page.knobs, tabs], **quiet)


def records(folder: Path) -> list[dict[str, Any]]:
    """Records of the clips in a folder whose files all exist, newest first."""
    there = _files(folder)
    return [record for record in _done(folder) if _names(record) <= there]


def find(folder: Path, job: str) -> dict[str, Any] | None:
    found = next((record for record in _done(folder) if record["job"] == job), None)
    return found if found is not None and _names(found) <= _files(folder) else None


def _done(folder: Path) -> list[dict[str, Any]]:
    """Records of clips, newest first, whether their files exist or not. They are shared: do not change them."""
    try:
        now = (folder / manifest.FILE).stat()
    except OSError:
        return []
    return _parsed(folder, now.st_ino, now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=16)
def _parsed(folder: Path, *state: int) -> list[dict[str, Any]]:
    """Cached while the manifest is unchanged: it has some 10 kB for each clip. state: tells versions of the file apart."""
    needed = {"file", "files", "name", "settings", "finished", "seconds", "tokens", "density", "seed"}
    done = [record for record in manifest.read(folder).values() if record["state"] == "done" and needed <= set(record)]
    return sorted(done, key=lambda record: str(record["finished"]), reverse=True)


def _names(record: dict[str, Any]) -> set[str]:
    return {*record["files"], f"{record['name']}.json"}


def _files(folder: Path) -> set[str]:
    """Names of the plain files in a folder. Links do not count, and no name leads out of the folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    except FileNotFoundError:  # a user's folder is created with the first clip
        return set()


def _button(page: Page, folder: Path, record: dict[str, Any]) -> str:
    url = html.address(page.copy(folder, cover(record)))
    picture = f'<video src="{url}" muted></video>' if url.endswith(".mp4") else f'<img loading="lazy" alt="" src="{url}">'
    job, said = html.text(record["job"]), html.text(caption(record))
    return f'<button type="button" data-job="{job}">{picture}<span>{said}</span></button>'


def cover(record: dict[str, Any]) -> str:
    """The file shown for a clip: its contact sheet, or the clip itself."""
    return next((name for name in record["files"] if name.endswith("-sheet.png")), record["file"])


def caption(record: dict[str, Any]) -> str:
    said = record["settings"]
    prompt = said["prompt"] if len(said["prompt"]) <= LABEL else said["prompt"][: LABEL - 1] + "…"
    how = "compared" if "ratio" in record else said["preset"]
    return f"{prompt} ({how}, seed {record['seed']})"


def loaded(page: Page, settings: dict[str, Any], name: str) -> Any:
    """The value to load into a setting of Create. A value that this page does not offer is left alone."""
    if name == "model":
        offered = {path: label for label, path in page.studio.models.items()}
        return offered.get(settings["model"], EMBEDDED if settings["model"] is None else gr.skip())
    if name == "preset":
        return gr.skip() if settings["preset"] == "custom" else settings["preset"]
    return None if name == "image" else settings[name]
