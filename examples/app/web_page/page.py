"""The page: its parts, what they do, and how it is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from image_session.removal_session import RemovalSession
from image_session.visit import Visit
from routing_views import NO_EXPERTS
from sample_photos import SamplePhoto
from web_page.file_guard import FileGuard
from web_page.handlers import Handlers
from web_page.parts import (
    EditorPart,
    ResultPart,
    RoutingPart,
    SettingsPart,
    editor_part,
    result_part,
    routing_part,
    settings_part,
)

STYLE = Path(__file__).with_name("style.css")

LONGEST_QUEUE = 32
"""Requests that wait; more are refused."""

KEPT_SECONDS = 3600
"""For how long the work of a visitor who does nothing is kept."""

FONT = ["system-ui", "sans-serif"]
MONO_FONT = ["ui-monospace", "monospace"]
"""Fonts of the visitor's machine: the page loads nothing from elsewhere."""


def build_page(
    session: RemovalSession,
    samples: Sequence[SamplePhoto],
    folder: Path,
    *,
    about: str,
    steps: int,
    most_megapixels: float,
) -> gr.Blocks:
    """Build the page.

    Args:
        session: the model.
        samples: photographs to begin with; the first is loaded with the page.
        folder: receives the files of the visitors.
        about: Markdown on model and checkpoint.
        steps: of denoising, at first.
        most_megapixels: of a photograph.
    """
    with gr.Blocks(
        title="moe_lora: remove an object",
        analytics_enabled=False,
        delete_cache=(KEPT_SECONDS // 2, KEPT_SECONDS),
    ) as page:
        state = gr.State(Visit(), time_to_live=KEPT_SECONDS, delete_callback=Visit.close)
        gr.Markdown(f"# Remove an object\n{about}", elem_id="about")
        with gr.Row():
            with gr.Column(min_width=340):
                editor = editor_part([sample.photo for sample in samples])
                settings = settings_part(session.task_hints, steps=steps)
            with gr.Column(min_width=340):
                result = result_part()
                gr.Markdown("## Routing", elem_classes="part")
                names = session.expert_names
                routing = routing_part(names) if names else None
                if routing is None:
                    gr.Markdown(NO_EXPERTS, elem_id="no-experts")
        handlers = Handlers(
            session,
            samples,
            folder,
            most_megapixels=most_megapixels,
            state=state,
            editor=editor,
            result=result,
            routing=routing,
        )
        connect_editor(page, handlers, state, editor, result)
        connect_model(handlers, state, editor, settings, result, routing)
    page.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=4, api_open=False)
    return page


def connect_editor(
    page: gr.Blocks, handlers: Handlers, state: gr.State, part: EditorPart, result: ResultPart
) -> None:
    """Connect what needs no model: photographs, masks, comparisons."""
    shown = [state, part.editor, part.told]
    opened = [
        *shown,
        *(result.slider, result.told, result.beside, result.gallery),
        *(result.download, result.download_mask, result.difference, result.mask),
    ]
    # An editor that loads its new image misses that the request is done, and shows it for ever.
    private: Any = {"api_visibility": "private", "show_progress_on": part.told}
    page.load(handlers.open_first, state, opened, **private)
    part.samples.select(handlers.open_sample, state, opened, **private)
    part.upload.upload(handlers.open_photo, [state, part.upload], opened, **private)
    part.upload_mask.upload(handlers.open_mask, [state, part.upload_mask], shown, **private)
    part.grow.click(handlers.grow, [state, part.editor, part.pixels], shown, **private)
    part.invert.click(handlers.invert, [state, part.editor], shown, **private)
    part.clear.click(handlers.clear, state, shown, **private)
    result.beside.input(
        handlers.compare, [state, result.beside], result.slider, api_visibility="private"
    )


def connect_model(
    handlers: Handlers,
    state: gr.State,
    editor: EditorPart,
    settings: SettingsPart,
    result: ResultPart,
    routing: RoutingPart | None,
) -> None:
    """Connect what runs the model; one request of all visitors runs at a time."""
    chosen: list[Any] = [state, result.slider, result.difference, result.mask]
    chosen += [result.download, result.download_mask]
    if routing is not None:
        chosen += [routing.bars, routing.curve, routing.maps, routing.no_map, routing.lora]
    result.gallery.select(handlers.choose, [state, result.beside], chosen, api_visibility="private")
    one: Any = {
        "api_visibility": "private",
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "show_progress_on": result.slider,
    }
    made = [*chosen, result.told, result.beside, result.gallery]
    made += [] if routing is None else routing.weights
    inputs = [state, editor.editor, *settings.values]
    settings.run.click(handlers.remove, inputs, made, **one)
    if routing is not None:
        routing.redraw.click(handlers.redraw, [state, *routing.weights], made, **one)
        routing.leave_out.click(handlers.leave_out, [state, routing.expert], made, **one)
        one["show_progress_on"] = routing.lora
        routing.export.click(handlers.export, [state, routing.format], routing.lora, **one)


def serve(
    page: gr.Blocks,
    folder: Path,
    *,
    host: str,
    port: int | None,
    most_megabytes: float,
    inbrowser: bool = False,
    wait: bool = True,
) -> str:
    """Serve the page, and return its address.

    Args:
        page: of `build_page`.
        folder: the only one whose files are served.
        host: address to listen at; 127.0.0.1 for this machine alone.
        port: to listen at; `None` for the first free one from 7860 up.
        most_megabytes: of an uploaded file.
        inbrowser: open the page.
        wait: until the server is stopped.
    """
    theme = gr.themes.Soft(
        primary_hue="blue", secondary_hue="orange", neutral_hue="slate", font=FONT,
        font_mono=MONO_FONT,
    )  # fmt: skip
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=inbrowser,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=not wait,
        quiet=True,
        max_file_size=int(most_megabytes * 1e6),
        footer_links=[],
        run_history=False,
        theme=theme,
        css=STYLE.read_text(encoding="utf-8"),
        app_kwargs={"middleware": [Middleware(FileGuard, folder=folder)]},
    )
    return str(address)
