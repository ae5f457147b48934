"""The documentation site in a real browser: on a phone, on paper, and its search."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import CHROMIUM, FLAGS

pytest.importorskip("sphinx", reason="needs the extra docs")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    str(page.relative_to(DOCS).with_suffix(".html"))
    for page in (*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"))
    if "_build" not in page.parts
)
TO_CLICK = [".mobile-header", ".skip-to-content", ".content-icon-container", ".toc-drawer"]
TO_CLICK += [".sidebar-drawer", ".related-pages", ".back-to-top", ".headerlink"]

TOO_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
BOXES = """selectors => selectors.filter(selector => [...document.querySelectorAll(selector)]
    .some(element => element.checkVisibility({visibilityProperty: true, opacityProperty: true})))"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(DOCS), str(folder)]
    subprocess.run(build, check=True, capture_output=True)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def test_no_page_is_wider_than_a_phone(site, browser):
    page = browser.new_page(viewport={"width": 360, "height": 740})
    wide = {}
    for name in PAGES:
        page.goto(f"{site}/{name}")
        pixels = page.evaluate(TOO_WIDE)
        if pixels > 0:
            wide[name] = pixels
    page.close()
    assert len(PAGES) > 40
    assert wide == {}


def test_the_menu_opens_on_a_phone(site, browser):
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(f"{site}/index.html")
    link = page.locator(".sidebar-drawer a", has_text="Write a router")
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    page.locator(".nav-overlay-icon").first.click()
    link.click()
    page.wait_for_url("**/write_a_router.html")
    page.close()


@pytest.mark.parametrize("name", ["index.html", "scaling.html", "reference/kinds_benchmark.html"])
def test_a_printed_page_has_its_text_and_nothing_to_click(name, site, browser):
    page = browser.new_page(viewport={"width": 718, "height": 1000})  # A4 with margins of 1 cm
    page.goto(f"{site}/{name}")
    assert page.evaluate(BOXES, TO_CLICK) != []
    page.emulate_media(media="print")
    assert page.evaluate(BOXES, TO_CLICK) == []
    assert page.locator("h1").is_visible()
    assert page.evaluate(TOO_WIDE) == 0
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("export_lora", "reference/api/export.html"),
        ("router collapse", "how_to/prevent_router_collapse.html"),
        ("24 GB", "how_to/train_flux_fill_on_24_gb.html"),
        ("xylophone", None),
    ],
)
def test_the_search_finds_pages(words, expected, site, browser):
    page = browser.new_page()
    page.goto(f"{site}/search.html?q={words.replace(' ', '+')}")
    page.wait_for_function("() => /matching|did not match/.test(document.body.innerText)")
    page.wait_for_timeout(500)
    found = page.locator("#search-results a").evaluate_all("links => links.map(a => a.href)")
    page.close()
    if expected is None:
        assert found == []
    else:
        assert any(expected in link for link in found)
