"""The components of the page, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import gradio as gr

from flux_fill.surroundings import OUTSIDE
from image_io.image_files import IMAGE_SUFFIXES
from image_io.mask_reading import MASK_SUFFIXES
from image_session.painted_mask import KEEP, OPACITY, REMOVE
from image_session.removal_session import MOST_SEEDS, MOST_STEPS, ExportFormat
from routing_views import short_name

BRUSHES = [("#{:02x}{:02x}{:02x}".format(*color), OPACITY) for color in (REMOVE, KEEP)]

MOST_GROWTH = 512
"""Pixels by which the mask grows at once."""

BY_ITSELF = ""
"""Choice of a removal without a hint."""

WHOLE, CROP = "the whole image", "a crop around the mask"
"""What the model runs on."""

SOURCE, PREVIOUS = "source", "previous result"
"""What a result is compared with."""


@dataclass(frozen=True)
class EditorPart:
    """Photograph and mask."""

    samples: gr.Gallery
    upload: gr.UploadButton
    upload_mask: gr.UploadButton
    editor: gr.ImageEditor
    told: gr.Markdown
    pixels: gr.Number
    grow: gr.Button
    invert: gr.Button
    clear: gr.Button


def editor_part(samples: Sequence[Path]) -> EditorPart:
    """Build the part in which a photograph is loaded and its mask painted."""
    gallery = gr.Gallery(
        [str(path) for path in samples],
        show_label=False,
        columns=6,
        allow_preview=False,
        object_fit="cover",
        interactive=False,
        buttons=[],
        elem_id="samples",
    )
    with gr.Row():
        upload = gr.UploadButton(
            "Load a photograph",
            file_types=list(IMAGE_SUFFIXES),
            variant="primary",
            size="md",
            min_width=120,
            elem_id="upload",
        )
        upload_mask = gr.UploadButton(
            "Load a mask",
            file_types=list(MASK_SUFFIXES),
            size="md",
            min_width=120,
            elem_id="upload-mask",
        )
    editor = gr.ImageEditor(
        type="pil",
        image_mode="RGBA",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(
            colors=[*BRUSHES], default_color=BRUSHES[0], default_size=24, color_mode="fixed"
        ),
        eraser=gr.Eraser(default_size=24),
        show_label=False,
        height=440,
        buttons=[],
        elem_id="editor",
    )
    told = gr.Markdown("", elem_id="photo")
    with gr.Row():
        grow = gr.Button("Grow by", size="md", min_width=120, elem_id="grow")
        pixels = gr.Number(
            4,
            precision=0,
            minimum=1,
            maximum=MOST_GROWTH,
            show_label=False,
            container=False,
            scale=0,
            min_width=70,
            elem_id="pixels",
        )
        invert = gr.Button("Invert", size="md", min_width=70, elem_id="invert")
        clear = gr.Button("Clear", size="md", min_width=70, elem_id="clear")
    return EditorPart(gallery, upload, upload_mask, editor, told, pixels, grow, invert, clear)


@dataclass(frozen=True)
class SettingsPart:
    """What is asked for."""

    hint: gr.Dropdown
    steps: gr.Slider
    seed: gr.Number
    count: gr.Slider
    outside: gr.Dropdown
    area: gr.Dropdown
    run: gr.Button

    @property
    def values(self) -> list[gr.components.Component]:
        """The settings in the order of `Handlers.remove`."""
        return [self.hint, self.steps, self.seed, self.count, self.outside, self.area]


def hint_choices(hints: Sequence[str]) -> list[tuple[str, str]]:
    """Return the kinds of removal: labels, and the hints that they stand for."""
    words = {"focus": "prefer the {} expert", "only": "the {} expert only"}
    named = [(hint, *hint.rpartition("_")[::2]) for hint in hints]
    return [
        ("by itself: the router decides", BY_ITSELF),
        *((words[kind].format(stem), hint) for hint, stem, kind in named),
    ]


def settings_part(hints: Sequence[str], *, steps: int) -> SettingsPart:
    """Build the settings of a removal, and the button that starts it."""
    hint = gr.Dropdown(
        hint_choices(hints),
        value=BY_ITSELF,
        label="Kind of removal",
        visible=bool(hints),
        elem_id="hint",
    )
    with gr.Row():
        step_slider = gr.Slider(
            1, MOST_STEPS, steps, step=1, label="Steps", min_width=140, elem_id="steps"
        )
        count = gr.Slider(
            1, MOST_SEEDS, 1, step=1, label="Images (seeds)", min_width=140, elem_id="count"
        )
    with gr.Row():
        seed = gr.Number(0, precision=0, minimum=0, label="Seed", min_width=100, elem_id="seed")
        outside = gr.Dropdown(
            list(OUTSIDE), value="keep", label="Outside the mask", min_width=140, elem_id="outside"
        )
    area = gr.Dropdown([WHOLE, CROP], value=WHOLE, label="Run the model on", elem_id="area")
    run = gr.Button("Remove", variant="primary", size="lg", elem_id="run")
    return SettingsPart(hint, step_slider, seed, count, outside, area, run)


@dataclass(frozen=True)
class ResultPart:
    """What came out."""

    slider: gr.ImageSlider
    told: gr.Markdown
    beside: gr.Radio
    gallery: gr.Gallery
    download: gr.DownloadButton
    download_mask: gr.DownloadButton
    difference: gr.Image
    mask: gr.Image


def result_part() -> ResultPart:
    """Build the tabs with result, difference and mask."""
    with gr.Tab("Result"):
        slider = gr.ImageSlider(
            format="png",
            interactive=False,
            label="Drag the line: before and after",
            height=460,
            max_height=460,
            buttons=["fullscreen"],
            elem_id="result",
        )
        told = gr.Markdown("", elem_id="told")
        gallery = gr.Gallery(
            label="Seeds",
            columns=4,
            height=170,
            format="png",
            allow_preview=False,
            interactive=False,
            visible=False,
            buttons=[],
            elem_id="seeds",
        )
        beside = gr.Radio(
            [SOURCE, PREVIOUS], value=SOURCE, label="Compare with the", elem_id="beside"
        )
    with gr.Tab("Difference"):
        difference = gr.Image(
            format="png",
            label="|result − source| × 4",
            buttons=["fullscreen"],
            elem_id="difference",
        )
    with gr.Tab("Mask"):
        mask = gr.Image(
            format="png", label="White was removed", buttons=["fullscreen"], elem_id="mask"
        )
    with gr.Row():
        download = gr.DownloadButton(
            "Download the result", interactive=False, size="md", elem_id="download"
        )
        download_mask = gr.DownloadButton(
            "Download the mask", interactive=False, size="md", elem_id="download-mask"
        )
    return ResultPart(slider, told, beside, gallery, download, download_mask, difference, mask)


@dataclass(frozen=True)
class RoutingPart:
    """How the result was routed, and what changes that."""

    bars: gr.HTML
    curve: gr.Image
    maps: gr.Gallery
    no_map: gr.Markdown
    weights: list[gr.Slider]
    redraw: gr.Button
    expert: gr.Dropdown
    leave_out: gr.Button
    format: gr.Dropdown
    export: gr.Button
    lora: gr.File


def routing_part(expert_names: Sequence[str]) -> RoutingPart:
    """Build the views of the routing, and the controls that override it."""
    with gr.Tab("Weights"):
        bars = gr.HTML("<p>Remove something to see how it was routed.</p>", elem_id="bars")
    with gr.Tab("Noise"):
        curve = gr.Image(format="png", show_label=False, buttons=["fullscreen"], elem_id="curve")
    with gr.Tab("Tokens"):
        no_map = gr.Markdown("", elem_id="no-map")
        maps = gr.Gallery(
            columns=3, format="png", show_label=False, interactive=False, elem_id="maps"
        )
    with gr.Tab("Override"):
        gr.Markdown("Set the weights of the experts; they are divided by their sum.")
        sliders = [
            gr.Slider(
                0,
                1,
                round(1 / len(expert_names), 3),
                step=0.001,
                label=short_name(name),
                elem_id=f"weight-{index}",
            )
            for index, name in enumerate(expert_names)
        ]
        redraw = gr.Button("Redraw with these weights", size="md", elem_id="redraw")
        gr.Markdown("Leave one expert out; the others keep their weights.")
        with gr.Row(equal_height=True):
            expert = gr.Dropdown(
                [(short_name(name), name) for name in expert_names],
                value=expert_names[0],
                show_label=False,
                min_width=140,
                elem_id="expert",
            )
            leave_out = gr.Button("Redraw without", size="md", min_width=120, elem_id="leave-out")
    with gr.Tab("Export"):
        gr.Markdown(
            "The mixture of this image as one plain LoRA file, with the mean weights of the steps: "
            "any tool that loads LoRAs for FLUX can use it without moe_lora."
        )
        with gr.Row(equal_height=True):
            format = gr.Dropdown(
                list(get_args(ExportFormat)),
                value="diffusers",
                show_label=False,
                min_width=140,
                elem_id="format",
            )
            export = gr.Button("Write the LoRA file", size="md", min_width=140, elem_id="export")
        lora = gr.File(label="LoRA file", interactive=False, elem_id="lora")
    return RoutingPart(
        bars, curve, maps, no_map, sliders, redraw, expert, leave_out, format, export, lora
    )
