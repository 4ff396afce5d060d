"""The rows of `fastdit bench gpu` as Markdown tables, for docs/benchmarks.md and the README."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMATS = {"none": "bf16", "fp8/fp8": "FP8", "int8/fp8+k": "INT8/FP8", "int4/fp8+qk": "INT4/FP8, Q and K smoothed",
           "int4/fp8+k": "INT4/FP8"}  # fmt: skip


def tables(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, table) of every JSON file in a folder; names are those of `fastdit bench gpu --only`, and `presets`."""
    for name, draw in TABLES.items():
        path = folder / f"gpu_{'denoisers' if name == 'presets' else name}.json"
        if path.exists():
            measured = json.loads(path.read_text(encoding="utf-8"))
            where = f"{measured['device']}, torch {measured['torch']}, Triton {measured['triton']}, {measured['date']}."
            yield name, f"{where}\n\n{draw(measured['rows'])}"


def _table(head: str, lines: list[str]) -> str:
    columns = head.split("|")
    return "\n".join([f"| {head} |", "|" + "|".join("---" if i == 0 else "--:" for i in range(len(columns))) + "|", *lines])


def attention(rows: list[dict[str, Any]]) -> str:
    head = "tokens | heads × dim | format | density | cuDNN | flash | Sage 1 | kernel | packing | call | ratio | TFLOP/s"
    lines = []
    for row in rows:
        lines.append(
            f"| {row['tokens']:,} | {row['heads']} × {row['head_dim']} | {FORMATS[row['quant']]} | {row['density']:.3f} "
            f"| {_baselines(row, 'SDPA cudnn', 'SDPA flash', 'SageAttention')} "
            f"| {row['attention_ms']:.2f} | {row['packing_ms']:.2f} | {row['ms']:.2f} | {row['ratio']:.2f} × "
            f"| {_tflops(row)} |"
        )
    return _table(head, lines)


def _baselines(row: dict[str, Any], *names: str) -> str:
    """Cells with milliseconds; empty for a missing one."""
    took = row["baselines_ms"]
    return " | ".join(f"{took[name]:.2f}" if name in took else "" for name in names)


def _tflops(row: dict[str, Any]) -> str:
    flop = 4 * row["tokens"] ** 2 * row["head_dim"] * row["heads"] * row["density"]
    return f"{flop / row['ms'] / 1e9:.0f}"


def video(rows: list[dict[str, Any]]) -> str:
    head = "clip | tile | format | density | dense (cuDNN) | fastdit | ratio | time / (density × dense)"
    return _table(head, [
        f"| {row['clip']} | {'×'.join(map(str, row['tile']))} | {FORMATS[row['quant']]} | {row['density']:.3f} "
        f"| {row['baselines_ms'][row['baseline']]:.1f} | {row['ms']:.1f} | {row['ratio']:.2f} × | {row['over_ideal']:.2f} |"
        for row in rows
    ])  # fmt: skip


def selection(rows: list[dict[str, Any]]) -> str:
    return _table("policy | milliseconds | of dense attention", [
        f"| {row['policy']} | {1000 * row['seconds']:.2f} | {100 * row['of dense']:.1f} % |" for row in rows
    ])  # fmt: skip


def denoisers(rows: list[dict[str, Any]]) -> str:
    head = "model | configuration | density | dense | of it attention | fastdit | ratio | peak memory"
    return _table(head, [
        f"| {row['model']}, {row['tokens']:,} tokens | {row['config']} | {row['density']:.2f} | {row['dense_ms']:.0f} ms "
        f"| {100 * row['attention_alone_ms'] / row['dense_ms']:.0f} % | {row['fast_ms']:.0f} ms | {row['ratio']:.2f} × "
        f"| {row['peak_gb']:.1f} GB |"
        for row in rows
    ])  # fmt: skip


def presets(rows: list[dict[str, Any]]) -> str:
    return denoisers([row for row in rows if row["config"].startswith("preset")])


def remainder(rows: list[dict[str, Any]]) -> str:
    return _kinds(rows, "remainder", "remainder | format | density | dense | fastdit | ratio")


def remembered(rows: list[dict[str, Any]]) -> str:
    return _kinds(rows, "remembered", "statistics | format | density | dense | step that reuses | ratio")


def _kinds(rows: list[dict[str, Any]], key: str, head: str) -> str:
    return _table(head, [
        f"| {row[key]} | {FORMATS[row['quant']]} | {row['density']:.3f} | {row['baseline_ms']:.1f} | {row['ms']:.1f} "
        f"| {row['ratio']:.2f} × |"
        for row in rows
    ])  # fmt: skip


def others(rows: list[dict[str, Any]]) -> str:
    return _table("density | format | fastdit | FlexAttention, same tiles | Sage 1, dense | cuDNN, dense", [
        f"| {row['density']:.3f} | {FORMATS[row['quant']]} | {row['ms']:.2f} "
        f"| {_baselines(row, 'FlexAttention', 'SageAttention', 'SDPA cudnn')} |"
        for row in rows
    ])  # fmt: skip


def tests(rows: list[dict[str, Any]]) -> str:
    return _table("file | passed | skipped | failed", [
        f"| `{row['file']}` | {row['passed']} | {row['skipped']} | {row['failed']} |" for row in rows
    ])  # fmt: skip


TABLES = {"tests": tests, "dense": attention, "sliding": attention, "video": video, "remembered": remembered,
          "remainder": remainder, "selection": selection, "int4": attention, "others": others, "denoisers": denoisers,
          "presets": presets}  # fmt: skip
