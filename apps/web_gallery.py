"""The tab of what was made: the manifest of the output folder, newest first, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from fastdit.apps import manifest, web_html, web_knobs
from fastdit.apps.web_studio import EMBEDDED

if TYPE_CHECKING:
    from fastdit.apps.web_page import Page

MANY = 24  # clips shown at first, and with every press of Older
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
            detail = gr.HTML(web_html.note("Choose a clip to see its settings and files."), elem_id="detail")

    def show(request: gr.Request, most: int) -> str:
        folder = page.folder(request)
        found = records(folder)
        if not found:
            return web_html.note("Nothing was made yet.")
        more = web_html.note(f"The newest {most} of {len(found)}.") if len(found) > most else ""
        return f'<div class="grid">{"".join(_button(page, folder, record) for record in found[:most])}</div>{more}'

    def choose(request: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
        folder = page.folder(request)
        record = find(folder, str(event.value))
        if record is None:
            return web_html.error("That clip is not there any more: press Refresh."), "", gr.update(interactive=False)
        prompt = f'<p class="prompt">{web_html.text(record["settings"]["prompt"])}</p>'
        return prompt + page.result(folder, record), record["job"], gr.update(interactive=True)

    def settings(request: gr.Request, job: str) -> tuple[Any, ...]:
        record = find(page.folder(request), job)
        fields = [gr.skip() for _ in range(len(page.inputs) + len(page.knobs))]
        if record is None:
            return *fields, gr.skip()
        made = web_knobs.knobs(record["settings"]["config"])
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
    """Clips of a folder whose files are there, newest first."""
    done = [record for record in manifest.read(folder).values() if record["state"] == "done" and _whole(folder, record)]
    return sorted(done, key=lambda record: str(record["finished"]), reverse=True)


def _whole(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a record is one of ours, its files plain names in the folder."""
    if not {"file", "files", "name", "settings", "finished", "seconds", "tokens", "density", "seed"} <= set(record):
        return False
    names = [*record["files"], f"{record['name']}.json"]
    return all(Path(name).name == name and (folder / name).is_file() and not (folder / name).is_symlink() for name in names)


def find(folder: Path, job: str) -> dict[str, Any] | None:
    return next((record for record in records(folder) if record["job"] == job), None)


def _button(page: Page, folder: Path, record: dict[str, Any]) -> str:
    url = web_html.address(page.copy(folder, cover(record)))
    picture = f'<video src="{url}" muted></video>' if url.endswith(".mp4") else f'<img loading="lazy" alt="" src="{url}">'
    job, said = web_html.text(record["job"]), web_html.text(caption(record))
    return f'<button type="button" data-job="{job}">{picture}<span>{said}</span></button>'


def cover(record: dict[str, Any]) -> str:
    """The file that stands for a clip: its contact sheet, or itself."""
    return next((name for name in record["files"] if name.endswith("-sheet.png")), record["file"])


def caption(record: dict[str, Any]) -> str:
    said = record["settings"]
    prompt = said["prompt"] if len(said["prompt"]) <= LABEL else said["prompt"][: LABEL - 1] + "…"
    how = "compared" if "ratio" in record else said["preset"]
    return f"{prompt} ({how}, seed {record['seed']})"


def loaded(page: Page, settings: dict[str, Any], name: str) -> Any:
    """The value of one of Create's settings; what this page does not offer stays as it is."""
    if name == "model":
        offered = {path: label for label, path in page.studio.models.items()}
        return offered.get(settings["model"], EMBEDDED if settings["model"] is None else gr.skip())
    if name == "preset":
        return gr.skip() if settings["preset"] == "custom" else settings["preset"]
    return None if name == "image" else settings[name]
