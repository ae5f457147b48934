"""A visitor of the app in a real browser, and the server that he visits."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

FLAGS = ["--no-sandbox", "--enable-unsafe-swiftshader"]
"""A canvas with WebGL, without a graphics card; tests run as root, which a sandbox refuses."""

PATIENCE = 60_000
"""Milliseconds, for machines that do other things, too."""

SCREENSHOTS = os.environ.get("APP_SCREENSHOTS")
"""A folder that receives what the tests see; none by default."""

IDLE = """() => [...document.querySelectorAll('[data-testid=status-tracker]:not(.hide)')]
    .every(tracker => tracker.querySelector('.error'))"""


WAITING = """() => [...document.querySelectorAll('[data-testid=status-tracker]:not(.hide)')]
    .map(tracker => tracker.parentElement.id + ': ' + tracker.innerText)"""

RESULT = """() => [...document.querySelectorAll('#result img')].map(image => image.src).join()"""
"""Every result has a file of its own; the line about it may read as that of the last one."""


class Visitor:
    """Does in a browser what a person does."""

    def __init__(self, browser: Browser, address: str, **context: Any) -> None:
        settings: dict[str, Any] = {"viewport": {"width": 1280, "height": 1000}} | context
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.requested: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_function(
            "() => /pixels/.test(document.querySelector('#photo')?.innerText ?? '')"
        )
        self.settle()

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def settle(self) -> None:
        """Wait until nothing is on its way."""
        for _ in range(2):
            self.page.wait_for_timeout(400)
            try:
                self.page.wait_for_function(IDLE)
            except Exception as error:
                raise AssertionError(f"Expected an idle page, but got {self.waiting()}.") from error

    def waiting(self) -> list[str]:
        """Return what the page is waiting for."""
        found: list[str] = self.page.evaluate(WAITING)
        return found

    def upload(self, button: str, file: Path) -> None:
        self.page.set_input_files(f"[data-testid='{button}-upload-button']", str(file))
        self.settle()

    def act(self, selector: str) -> None:
        self.page.click(selector)
        self.settle()
        assert self.page.locator("[data-testid=toast-body]").count() == 0, self.message()

    def remove(self, button: str = "#run") -> str:
        """Click a button that runs the model; return the line about the result."""
        before = self.page.evaluate(RESULT)
        self.page.click(button)
        self.page.wait_for_function(
            "before => document.querySelector('[data-testid=toast-body]')"
            f" || ({RESULT})() !== before",
            arg=before,
        )
        assert self.page.locator("[data-testid=toast-body]").count() == 0, self.message()
        self.settle()
        return self.page.inner_text("#told")

    def paint(self, *points: tuple[float, float]) -> None:
        """Draw a stroke through points, as shares of the editor's canvas.

        The canvas drops it when the image arrives late.
        """
        undo = self.page.locator("#editor button[aria-label=Undo]")
        for _ in range(10):
            box = self.box(self.page.locator("#editor canvas").first)
            left, top, width, height = (box[name] for name in ("x", "y", "width", "height"))
            self.drag([(left + x * width, top + y * height) for x, y in points])
            self.page.wait_for_timeout(1500)
            if undo.is_enabled():
                return
        raise AssertionError("Expected a stroke, but the canvas takes none.")

    def drag(self, places: list[tuple[float, float]]) -> None:
        mouse = self.page.mouse
        mouse.move(*places[0])
        mouse.down()
        for place in places[1:]:
            mouse.move(*place, steps=8)
        mouse.up()

    def box(self, locator: Locator) -> Any:
        locator.scroll_into_view_if_needed()
        return locator.bounding_box()

    def download(self, selector: str, folder: Path) -> Path:
        with self.page.expect_download() as started:
            self.page.click(selector)
        path = folder / started.value.suggested_filename
        started.value.save_as(path)
        return path

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).first.click()
        self.page.wait_for_timeout(300)

    def weights(self) -> list[float]:
        """Return the weights that the bars show."""
        self.tab("Weights")
        return [float(t) for t in self.page.locator("#bars .expert-weight").all_inner_texts()]

    def message(self) -> str:
        """Return the text of a message on the page, and close it."""
        toast = self.page.locator("[data-testid=toast-body]").first
        toast.wait_for()
        text = re.sub(r"\s+", " ", toast.inner_text())
        toast.get_by_test_id("toast-close").click()
        self.page.wait_for_function(
            "() => document.querySelector('[data-testid=toast-body]') === null"
        )
        return text

    def screenshot(self, name: str, take: Callable[[Path], object] | None = None) -> None:
        """Keep what the page shows, when a folder is asked for."""
        if SCREENSHOTS:
            path = Path(SCREENSHOTS) / f"{name}.jpg"
            self.page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=path, full_page=True, quality=80, type="jpeg")
