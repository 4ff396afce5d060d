"""The HTML that the page shows besides Gradio's widgets: progress, clips, errors. Text from people is escaped here."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

PICTURES = (".png", ".webp", ".gif")
STATES = {
    "starting": "Starting", "denoising": "Drawing", "finishing": "Decoding and saving",
    "stopped": "Stopped. Nothing was kept.",
}  # fmt: skip
STAGES = (("text", "Text", "#0072b2"), ("denoise", "Denoising", "#009e73"), ("decode", "Decoding", "#e69f00"))
"""Okabe and Ito's colours, which colour-blind people can tell apart."""


def text(said: Any) -> str:
    """Escape text: tags, and the marks that Gradio's templates interpret."""
    return re.sub(r"[${}`\\]", lambda mark: f"&#{ord(mark[0])};", html.escape(str(said)))


def error(sentence: str) -> str:
    """An error as HTML. The options that it names lose their dashes: --height becomes height."""
    sentence = re.sub(r"(^|\s)--([a-z])", r"\1\2", sentence)
    return f'<div class="error" role="alert">{text(sentence[:1].upper() + sentence[1:])}</div>'


def note(sentence: str) -> str:
    return f'<p class="note">{text(sentence)}</p>'


def progress(ticket: Any, ahead: int, preview: str = "") -> str:
    """A line of words, a bar, and the latest preview."""
    if ticket.state == "waiting":
        line = "You are next" if ahead < 2 else f"{ahead} clips come first"
        line = line if ahead else "Starting"
    else:
        line = STATES.get(ticket.state, ticket.state)
    if ticket.state == "denoising":
        line += f": step {ticket.step} of {ticket.steps}"
        if (left := ticket.seconds_left) is not None:
            line += f", about {duration(left)} left"
    bar = (
        f'<div class="bar" role="progressbar" aria-label="Denoising" aria-valuemin="0" aria-valuemax="{ticket.steps}" '
        f'aria-valuenow="{ticket.step}"><div style="width:{100 * ticket.step / max(1, ticket.steps):.1f}%"></div></div>'
    )
    picture = f'<img class="preview" alt="What the latents look like now" src="{preview}">' if preview else ""
    return f'<div class="progress"><p role="status">{text(line)}</p>{bar}{picture}</div>'


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def data_url(image: Any, kind: str = "JPEG") -> str:
    """A small picture as a data URL, which leaves no file behind."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, format=kind, quality=80)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(stream.getvalue()).decode()


def clip(url: str, label: str, key: str = "") -> str:
    """A player or a picture. key: its side in a pair of players."""
    if Path(url).suffix in PICTURES:
        return f'<img class="clip" data-side="{key}" alt="{text(label)}" src="{text(url)}">'
    return (
        f'<video class="clip" data-side="{key}" aria-label="{text(label)}" src="{text(url)}" controls loop muted autoplay '
        "playsinline></video>"
    )


def result(record: dict[str, Any], urls: dict[str, str], again: bool = False) -> str:
    """A finished clip with its settings and files. urls: {name of a file in the record: url}."""
    settings = record["settings"]
    seconds = sum(record["seconds"].values())
    facts = [
        ("Seed", record["seed"]),
        ("Size", f"{settings['frames']} frames of {settings['width']} × {settings['height']}"),
        ("Tokens", f"{record['tokens']:,}"),
        ("Preset", settings["preset"]),
        ("Density", f"{record['density']:.2f}"),
        ("Time", f"{seconds:.1f} s" + (" (drawn earlier: the same settings give the same clip)" if again else "")),
    ]
    if dropped := record.get("dropped_tokens"):
        facts.append(("Prompt", f"its last {dropped} tokens were not read: it is too long for this model"))
    if unknown := record.get("not_understood"):
        facts.append(("Not understood", ", ".join(unknown)))
    return f'<div class="result">{clip(urls[record["file"]], settings["prompt"])}{table(facts)}{downloads(urls)}</div>'


def comparison(record: dict[str, Any], urls: dict[str, str]) -> str:
    """Two synchronised players, their difference, and the numbers. urls: {name of a file in the record: url}."""
    settings = record["settings"]
    dense = next((url for name, url in urls.items() if "-dense." in name), urls[record["file"]])
    fps, frames = settings["fps"], settings["frames"]
    moving = frames > 1 and record["file"].endswith(".mp4")
    controls = (
        '<button type="button" class="play" data-act="play">Pause</button>'
        f'<label>Frame <input type="range" data-act="scrub" min="0" max="{frames - 1}" value="0" step="1"></label>'
        if moving
        else ""
    )
    return (
        f'<div class="pair" data-fps="{fps}" data-frames="{frames}"><div class="sides">'
        f"<figure>{_side(dense, 'dense', moving)}<figcaption>Dense</figcaption></figure>"
        f"<figure>{_side(urls[record['file']], 'fast', moving)}<figcaption>Fast</figcaption></figure>"
        f'<figure><canvas class="clip" data-side="difference" role="img" aria-label="Difference of the two"></canvas>'
        "<figcaption>Difference, brightened</figcaption></figure></div>"
        f'<div class="controls">{controls}<label>Brighten difference '
        '<input type="range" data-act="gain" min="1" max="20" value="4" step="1"></label></div>'
        f"{bars(record)}{table(numbers(record))}{downloads(urls)}</div>"
    )


def _side(url: str, side: str, moving: bool) -> str:
    return clip(url, side, side).replace(" controls", "") if moving else clip(url, side, side)


def numbers(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Closeness, density, error and speed, in words."""
    said = [("Speed", f"{record['ratio']:.2f} × ({record['dense_s']:.2f} s and {record['fast_s']:.2f} s of denoising)")]
    if (why := record.get("stayed_dense")) is not None:
        said.append(("No sparse attention", why))
    psnr, flicker = record["psnr_db"], record.get("flicker_db")
    said += [
        ("PSNR", "identical" if psnr is None else f"{psnr:.1f} dB"),
        ("SSIM", f"{record['ssim']:.4f}"),
        ("Flicker", "same changes from frame to frame" if flicker is None else f"{flicker:.1f} dB between changes of frames"),
        ("Density", f"{record['density']:.3f} of all pairs, all steps and layers"),
    ]
    if (worst := max((row["error"] for row in record["velocity_error"]), default=None)) is not None:
        said.append(("Error", f"{worst:.1%} of the velocity, worst phase"))
    if record.get("error") is not None:
        said.append(("Worst layer", f"{record['error']:.1%} of attention's output"))
    return [*said, ("Seed", str(record["seed"])), ("Tokens", f"{record['tokens']:,}")]


def bars(record: dict[str, Any]) -> str:
    """Seconds of each stage as a bar for dense and a bar for fast, on one scale. Denoising is the best of the runs."""
    stages = {
        "Dense": record.get("dense_stages", {}) | {"denoise": record["dense_s"]},
        "Fast": record["seconds"] | {"denoise": record["fast_s"]},
    }
    most = max(sum(spent.get(key, 0.0) for key, _, _ in STAGES) for spent in stages.values()) or 1.0
    rows = ""
    for name, spent in stages.items():
        total = sum(spent.get(key, 0.0) for key, _, _ in STAGES)
        parts = "".join(
            f'<span style="width:{100 * spent.get(key, 0.0) / most:.2f}%;background:{colour}" '
            f'title="{label} {spent.get(key, 0.0):.2f} s"></span>'
            for key, label, colour in STAGES
        )
        rows += f'<div class="stage"><span class="name">{name}</span><span class="track">{parts}</span>{total:.2f} s</div>'
    legend = "".join(f'<span><i style="background:{colour}"></i>{label}</span>' for _, label, colour in STAGES)
    return f'<div class="stages" role="img" aria-label="Seconds of each stage">{rows}<div class="legend">{legend}</div></div>'


def table(rows: Iterable[tuple[str, Any]]) -> str:
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in rows) + "</dl>"


def downloads(urls: dict[str, str]) -> str:
    """A link for each file: {name: url}."""
    names = {".json": "Settings and numbers (JSON)", "-sheet.png": "Contact sheet", ".mp4": "Video"}
    links = []
    for name, url in urls.items():
        label = next((label for end, label in names.items() if name.endswith(end)), "File")
        if name.endswith("-dense.mp4"):
            label = "Dense video"
        links.append(f'<a href="{text(url)}" download="{text(name)}">{label}</a>')
    return f'<p class="downloads">Download: {" · ".join(links)}</p>'


def address(path: str) -> str:
    """The address of a served file."""
    return "gradio_api/file=" + quote(path)
