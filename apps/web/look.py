"""The look of the page: colours, type and shapes. Text has a contrast of at least 4.5 to its background, light and dark."""

from __future__ import annotations

from typing import Any

import gradio as gr

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
LIGHT = {
    "paper": "#f6f4ef", "panel": "#ffffff", "line": "#d5d0c4", "ink": "#1d2321", "soft": "#55605c", "accent": "#a1440b",
    "pressed": "#7f3408", "on": "#ffffff", "tint": "#fbe9d9",
}  # fmt: skip
DARK = {
    "paper": "#121716", "panel": "#1b2220", "line": "#394441", "ink": "#eef1ef", "soft": "#a9b4b0", "accent": "#ffb15c",
    "pressed": "#ffc98e", "on": "#17211f", "tint": "#3a2c1c",
}  # fmt: skip
"""Paper, panels on it, lines, text, less important text, the accent, the accent under the pointer, text on it, its tint."""
USES = {
    "paper": ["body_background_fill", "background_fill_secondary", "button_secondary_background_fill"],
    "panel": [
        "background_fill_primary", "block_background_fill", "block_label_background_fill", "input_background_fill",
        "input_background_fill_focus", "checkbox_background_color", "checkbox_label_background_fill", "panel_background_fill",
        "button_secondary_background_fill_hover", "checkbox_label_background_fill_hover",
    ],
    "line": [
        "border_color_primary", "block_border_color", "input_border_color", "checkbox_border_color",
        "button_secondary_border_color", "button_cancel_border_color", "checkbox_label_border_color", "panel_border_color",
    ],
    "ink": [
        "body_text_color", "block_title_text_color", "block_label_text_color", "button_secondary_text_color",
        "button_cancel_text_color", "button_cancel_text_color_hover", "checkbox_label_text_color",
        "checkbox_label_text_color_selected", "table_text_color",
    ],
    "soft": ["body_text_color_subdued", "block_info_text_color", "input_placeholder_color", "checkbox_border_color_hover"],
    "accent": [
        "button_primary_background_fill", "button_primary_border_color", "slider_color", "border_color_accent",
        "input_border_color_focus", "checkbox_background_color_selected", "checkbox_border_color_selected",
        "checkbox_border_color_focus", "checkbox_label_border_color_selected", "loader_color",
        "link_text_color", "link_text_color_active", "link_text_color_visited",
    ],
    "pressed": ["button_primary_background_fill_hover", "button_primary_border_color_hover", "link_text_color_hover"],
    "on": ["button_primary_text_color", "button_primary_text_color_hover"],
    "tint": ["color_accent_soft", "checkbox_label_background_fill_selected", "button_cancel_background_fill_hover"],
}  # fmt: skip
"""Which of Gradio's variables have which colour."""


def theme() -> Any:
    made = gr.themes.Base(font=FONTS, font_mono=MONO, radius_size=gr.themes.sizes.radius_md)
    colours = {
        name + ending: palette[colour]
        for ending, palette in (("", LIGHT), ("_dark", DARK))
        for colour, names in USES.items()
        for name in names
    }
    return made.set(
        **colours, color_accent="var(--link-text-color)",  # which has a dark form, as this has not
        button_cancel_background_fill="transparent", button_cancel_background_fill_dark="transparent",
        block_label_text_weight="600", block_title_text_weight="600", button_large_text_weight="600", block_shadow="none",
        button_primary_shadow="none", checkbox_label_shadow="none", input_shadow="none", input_shadow_focus="none",
    )  # fmt: skip
