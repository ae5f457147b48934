"""What the components of the page do; the work itself is in `image_session`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

import routing_views
from image_session.painted_mask import editor_image, with_mask
from image_session.photo import difference
from image_session.removal_session import ExportFormat, RemovalSession, RemovalSettings
from image_session.visit import Visit
from sample_photos import SamplePhoto
from web_page.errors import told
from web_page.parts import BY_ITSELF, CROP, PREVIOUS, SOURCE, EditorPart, ResultPart, RoutingPart

Updates = dict[Any, Any]
Editor = dict[str, Any] | None


def layers_of(value: Editor) -> list[Image.Image]:
    """Return the layers of an editor's value."""
    return list(value["layers"]) if value else []


class Handlers:
    """Handlers of one page.

    Args:
        session: the model, which all visitors share.
        samples: photographs to begin with.
        folder: receives the files of the visitors.
        most_megapixels: of a photograph.
        state: the component with the `Visit`.
        editor: photograph and mask.
        result: what comes out.
        routing: views of the routing; `None` for a model without experts.
    """

    def __init__(
        self,
        session: RemovalSession,
        samples: Sequence[SamplePhoto],
        folder: Path,
        *,
        most_megapixels: float,
        state: gr.State,
        editor: EditorPart,
        result: ResultPart,
        routing: RoutingPart | None,
    ) -> None:
        self.session, self.samples, self.folder = session, samples, folder
        self.most_megapixels = most_megapixels
        self.state, self.editor, self.result, self.routing = state, editor, result, routing

    @told
    def open_first(self, visit: Visit) -> Updates:
        """Load the first sample when the page opens, unless its visitor was quicker."""
        if visit.photo is not None:
            return self._shown_editor(visit)
        return self._open(visit, self.samples[0].photo, self.samples[0].mask)

    @told
    def open_sample(self, visit: Visit, chosen: gr.SelectData) -> Updates:
        """Load the sample that was selected, with its mask."""
        sample = self.samples[int(chosen.index)]
        return self._open(visit, sample.photo, sample.mask)

    @told
    def open_photo(self, visit: Visit, path: str) -> Updates:
        """Load an uploaded photograph."""
        return self._open(visit, Path(path), None)

    @told
    def open_mask(self, visit: Visit, path: str) -> Updates:
        """Load an uploaded mask."""
        visit.load_mask(Path(path))
        return self._shown_editor(visit)

    @told
    def grow(self, visit: Visit, value: Editor, pixels: float) -> Updates:
        """Extend the mask."""
        visit.grow_mask(layers_of(value), int(pixels))
        return self._shown_editor(visit)

    @told
    def invert(self, visit: Visit, value: Editor) -> Updates:
        """Invert the mask."""
        visit.invert_mask(layers_of(value))
        return self._shown_editor(visit)

    @told
    def clear(self, visit: Visit) -> Updates:
        """Empty the mask."""
        visit.clear_mask()
        return self._shown_editor(visit)

    @told
    def remove(
        self,
        visit: Visit,
        value: Editor,
        hint: str | None,
        steps: float,
        seed: float,
        count: float,
        outside: str,
        area: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it here
    ) -> Updates:
        """Remove what is painted."""
        settings = RemovalSettings(
            steps=int(steps),
            seed=int(seed),
            count=int(count),
            outside=outside,
            crop=area == CROP,
            task_hint=None if hint in (None, BY_ITSELF) else hint,
        )
        since = time.monotonic()
        visit.remove(self.session, layers_of(value), settings, progress)
        return self._shown_result(visit, time.monotonic() - since)

    @told
    def redraw(
        self,
        visit: Visit,
        *weights: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it here
    ) -> Updates:
        """Repeat the last request with given weights."""
        since = time.monotonic()
        visit.redraw(self.session, progress, weights=tuple(map(float, weights)))
        return self._shown_result(visit, time.monotonic() - since)

    @told
    def leave_out(
        self,
        visit: Visit,
        expert: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it here
    ) -> Updates:
        """Repeat the last request without an expert."""
        since = time.monotonic()
        visit.redraw(self.session, progress, without=expert)
        return self._shown_result(visit, time.monotonic() - since)

    @told
    def choose(self, visit: Visit, beside: str, chosen: gr.SelectData) -> Updates:
        """Show another of the seeds."""
        visit.choose(int(chosen.index))
        return self._shown_choice(visit, beside)

    @told
    def compare(self, visit: Visit, beside: str) -> Updates:
        """Compare the result with another image."""
        if beside == PREVIOUS and visit.previous is None:
            raise ValueError("Expected an earlier result of this photograph, but there is none.")
        return {self.result.slider: self._pair(visit, beside)}

    @told
    def export(self, visit: Visit, format: ExportFormat) -> str:
        """Write the mixture of the shown result as a LoRA file."""
        return str(visit.export(self.session, self.folder, format))

    def _open(self, visit: Visit, path: Path, mask: Path | None) -> Updates:
        visit.open(path, most_megapixels=self.most_megapixels, mask=mask)
        result = self.result
        empty = [result.slider, result.difference, result.mask]
        updates: Updates = dict.fromkeys(empty)
        updates[result.told] = ""
        updates[result.gallery] = gr.Gallery([], visible=False)
        updates[result.beside] = SOURCE
        for button in (result.download, result.download_mask):
            updates[button] = gr.DownloadButton(value=None, interactive=False)
        return updates | self._shown_editor(visit)

    def _shown_editor(self, visit: Visit) -> Updates:
        image = self._file(visit, with_mask(visit.loaded.image, visit.current_mask))
        value: Editor = {"background": image, "layers": [], "composite": None}
        photo, covered = visit.loaded, visit.current_mask.mean()
        told = (
            f"{photo.image.width} × {photo.image.height} pixels, {covered:.1%} masked. "
            "Paint orange what shall go, and blue what shall stay."
        )
        return {self.state: visit, self.editor.editor: value, self.editor.told: told}

    def _file(self, visit: Visit, image: Image.Image) -> str:
        return str(visit.picture(editor_image(image), self.folder))

    def _shown_result(self, visit: Visit, seconds: float) -> Updates:
        beside = PREVIOUS if is_override(visit) else SOURCE
        several = len(visit.removals) > 1
        seeds = [(self._file(visit, r.image), f"seed {r.seed}") for r in visit.removals]
        updates = self._shown_choice(visit, beside)
        updates[self.result.told] = told_of(visit, seconds)
        updates[self.result.beside] = beside
        updates[self.result.gallery] = gr.Gallery(
            seeds if several else [], visible=several, selected_index=0 if several else None
        )
        if self.routing is not None and not is_override(visit):
            trace = visit.shown.trace
            assert trace is not None
            means = [round(weight, 3) for weight in trace.mean.tolist()]
            updates |= dict(zip(self.routing.weights, means, strict=True))
        return updates

    def _shown_choice(self, visit: Visit, beside: str) -> Updates:
        result, changed = self.result, difference(visit.shown.image, visit.source)
        file, mask_file = visit.write_shown(self.folder)
        updates: Updates = {
            self.state: visit,
            result.slider: self._pair(visit, beside),
            result.difference: self._file(visit, changed),
            result.mask: str(mask_file),
            result.download: gr.DownloadButton(value=str(file), interactive=True),
            result.download_mask: gr.DownloadButton(value=str(mask_file), interactive=True),
        }
        return updates | self._shown_routing(visit)

    def _shown_routing(self, visit: Visit) -> Updates:
        trace, names = visit.shown.trace, self.session.expert_names
        if self.routing is None or trace is None:
            return {}
        drawn = routing_views.token_maps(trace, names) or []
        maps = [(self._file(visit, image), caption) for image, caption in drawn]
        why = "" if maps else routing_views.NO_TOKEN_MAP[trace.varies]
        curve = self._file(visit, routing_views.weights_over_noise(trace, names))
        return {
            self.routing.bars: routing_views.weight_bars(trace, names),
            self.routing.curve: curve,
            self.routing.maps: gr.Gallery(maps, visible=bool(maps)),
            self.routing.no_map: gr.Markdown(why, visible=bool(why)),
            self.routing.lora: None,
        }

    def _pair(self, visit: Visit, beside: str) -> tuple[str, str]:
        previous = visit.previous if beside == PREVIOUS else None
        left = visit.source if previous is None else previous
        return self._file(visit, left), self._file(visit, visit.shown.image)


def is_override(visit: Visit) -> bool:
    """Return whether the shown result had weights that the router did not choose."""
    settings = visit.shown.settings
    return settings.weights is not None or settings.without is not None


def told_of(visit: Visit, seconds: float) -> str:
    """Return a line on the shown results."""
    settings = visit.shown.settings
    if settings.weights is not None:
        kind = "weights " + ", ".join(f"{weight:.2f}" for weight in settings.weights)
    elif settings.without is not None:
        kind = f"without {routing_views.short_name(settings.without)}"
    else:
        kind = settings.task_hint or "by itself"
    return f"{kind} · {settings.steps} steps · seed {settings.seed} · {seconds:.1f} s"
