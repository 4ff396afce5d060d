"""A batch as a page: index.html in its folder, with each clip, its settings and its numbers."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastdit.apps.render import manifest
from fastdit.apps.render.outputs import write_bytes

NAME = "index.html"
MARK = "<!-- made by fastdit render -->"
HEAD = f"""<!doctype html>
{MARK}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>fastdit: clips</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ margin: 1.5rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }}
video, img {{ width: 100%; background: #000; }}
figcaption {{ overflow-wrap: anywhere; }}
</style></head><body><h1>Clips</h1><main>
"""


def write(folder: Path) -> None:
    """Write the page of the folder's clips, in the order of their files' names. Somebody else's index.html is left alone."""
    path = folder / NAME
    done = [record for record in manifest.read(folder).values() if record["state"] == "done"]
    there = [record for record in done if (folder / record["file"]).is_file()]
    if not there or (path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")):
        return
    figures = "".join(map(figure, sorted(there, key=lambda record: str(record["file"]))))
    write_bytes(path, f"{HEAD}{figures}</main></body></html>\n".encode())


def figure(record: dict[str, Any]) -> str:
    settings, url = record["settings"], html.escape(quote(record["file"]))
    prompt = html.escape(settings["prompt"])
    if record["file"].endswith((".mp4", ".webm")):
        shown = f'<video src="{url}" aria-label="{prompt}" controls loop muted playsinline preload="metadata"></video>'
    else:
        shown = f'<img src="{url}" alt="{prompt}" loading="lazy">'
    numbers = [
        str(settings["preset"]), f"seed {record['seed']}", f"{settings['width']} × {settings['height']}",
        f"{settings['frames']} frames", f"density {record['density']:.2f}", f"{sum(record['seconds'].values()):.1f} s",
    ]  # fmt: skip
    if "ratio" in record:
        numbers.append(f"{record['ratio']:.2f} × as fast as dense")
    return f"<figure>{shown}<figcaption>{prompt}<br><small>{html.escape(', '.join(numbers))}</small></figcaption></figure>\n"
