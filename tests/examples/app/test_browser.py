"""The app in a real browser: Chromium paints, runs, slides, downloads and tries to break in.

`APP_CHECKPOINT=outputs/demo/checkpoint APP_SCREENSHOTS=docs/images` in the environment make the
images of the documentation: the same tests, with the bundled model.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from browsing import CHROMIUM, FLAGS, Visitor
from PIL import Image

import remove
from image_io.metadata import read_exif
from image_session.removal_session import RemovalSession, RemovalSettings
from options.train_options import BUNDLED_MODEL
from sample_photos import SamplePhoto, sample_photos

pytest.importorskip("gradio", reason="needs the extra app")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

STEPS, MEGABYTES = 4, 1.0
CHECKPOINT = os.environ.get("APP_CHECKPOINT")


class Server(NamedTuple):
    address: str
    session: RemovalSession
    folder: Path
    samples: list[SamplePhoto]
    flux_fill_id: str
    checkpoint: Path


@pytest.fixture(scope="module")
def server(
    random_flux_fill: Path,
    checkpoint_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("app")
    if CHECKPOINT:
        flux_fill_id, checkpoint = str(BUNDLED_MODEL), Path(CHECKPOINT)
    else:
        flux_fill_id, checkpoint = str(random_flux_fill), checkpoint_of("token_removal")
    session = RemovalSession(flux_fill_id, checkpoint)
    samples = sample_photos(folder / "samples", side=256 if CHECKPOINT else 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        from web_page.page import build_page, serve

        about = "Base model: the bundled tiny model. Checkpoint: `demo/checkpoint`."
        page = build_page(session, samples, folder, about=about, steps=STEPS, most_megapixels=1)
        address = serve(
            page, folder, host="127.0.0.1", port=None, most_megabytes=MEGABYTES, wait=False
        )
        yield Server(address, session, folder, samples, flux_fill_id, checkpoint)
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visitor(server: Server, browser: Any) -> Iterator[Visitor]:
    with Visitor(browser, server.address) as found:
        yield found
        assert found.faults == []
        # Nothing is loaded from elsewhere, and nobody is told of a visit.
        hosts = {urllib.parse.urlsplit(url).hostname for url in found.requested}
        assert hosts - {"127.0.0.1", None, ""} == set()


@pytest.fixture
def jpeg(server: Server, tmp_path: Path) -> Path:
    """Return a photograph with EXIF data and a name in capitals, as cameras write it."""
    exif = Image.Exif()
    exif[0x010E] = "a test"
    path = tmp_path / "PHOTO.JPG"
    photo = Image.open(server.samples[3].photo).crop((0, 0, 61, 50))
    (Image.open(server.samples[3].photo) if CHECKPOINT else photo).save(path, quality=95, exif=exif)
    return path


def removed_by_command(
    server: Server, photo: Path, mask: Path, output: Path, *, crop: bool = False
) -> Image.Image:
    flags = {"image": photo, "mask": mask, "output": output, "checkpoint": server.checkpoint}
    words = [word for name, path in flags.items() for word in (f"--{name}", str(path))]
    # Without crops, the app runs the model at the size of the image.
    words += [] if crop else ["--resolution", str(max(Image.open(photo).size))]
    remove.main([*words, "--flux_fill_id", server.flux_fill_id, "--steps", str(STEPS)])
    return Image.open(output)


def test_paint_run_slide_and_download(
    visitor: Visitor, server: Server, jpeg: Path, tmp_path: Path
) -> None:
    visitor.upload("Load a photograph", jpeg)
    visitor.paint((0.45, 0.45), (0.55, 0.5))
    told = visitor.remove()
    assert told.startswith(f"by itself · {STEPS} steps · seed 0")
    handle = visitor.page.locator("#result [data-testid=slider]")
    before = visitor.box(handle)
    middle = before["y"] + before["height"] / 2
    visitor.drag([(before["x"] + before["width"] / 2, middle), (before["x"] + 120, middle)])
    visitor.page.wait_for_timeout(300)
    assert visitor.box(handle)["x"] > before["x"] + 60
    result = visitor.download("#download", tmp_path)
    mask = visitor.download("#download-mask", tmp_path)
    assert (result.name, mask.name) == ("PHOTO_removed.jpg", "PHOTO_mask.png")
    covered = np.array(Image.open(mask)) > 0
    assert 0 < covered.mean() < 1
    expected = removed_by_command(server, jpeg, mask, tmp_path / "expected.jpg")
    found = Image.open(result)
    assert np.array_equal(np.array(found), np.array(expected))
    assert found.format == "JPEG"
    assert found.getexif()[0x010E] == "a test"
    assert read_exif(result) == read_exif(jpeg)
    assert not np.array_equal(np.array(found), np.array(Image.open(jpeg)))
    for name in ("Difference", "Mask"):
        visitor.tab(name)
        shown = visitor.page.locator(f"#{name.lower()} img").first
        shown.wait_for()
        assert shown.evaluate("image => image.naturalWidth") == found.width


def test_the_first_sample_is_there_and_masks_are_changed(
    visitor: Visitor, server: Server, tmp_path: Path
) -> None:
    visitor.remove()
    sample = server.samples[0]
    mask = np.array(Image.open(visitor.download("#download-mask", tmp_path))) > 0
    assert np.array_equal(mask, np.array(Image.open(sample.mask)) > 0)
    visitor.screenshot("app_removal")
    visitor.act("#invert")
    visitor.act("#grow")
    visitor.remove()
    grown = np.array(Image.open(visitor.download("#download-mask", tmp_path))) > 0
    assert grown[~mask].all()
    assert (grown & mask).any()
    visitor.act("#clear")
    visitor.page.click("#run")
    assert "nothing is painted" in visitor.message()
    visitor.upload("Load a mask", sample.mask)
    visitor.remove()
    again = np.array(Image.open(visitor.download("#download-mask", tmp_path))) > 0
    assert np.array_equal(again, mask)


def test_the_blue_brush_takes_away(visitor: Visitor, tmp_path: Path) -> None:
    visitor.act("#invert")
    visitor.act("#clear")
    visitor.act("#invert")  # everything
    visitor.page.click("#editor button[aria-label=Color]")
    visitor.page.locator("#editor menu.swatch button").nth(1).click()
    visitor.paint((0.45, 0.5), (0.55, 0.5))
    visitor.remove()
    mask = np.array(Image.open(visitor.download("#download-mask", tmp_path))) > 0
    assert 0 < (~mask).mean() < 1


def test_seeds_side_by_side(visitor: Visitor, tmp_path: Path) -> None:
    visitor.page.fill("#count input[type=number]", "2")
    visitor.remove()
    first = np.array(Image.open(visitor.download("#download", tmp_path)))
    seeds = visitor.page.locator("#seeds button.thumbnail-item")
    assert seeds.count() == 2
    seeds.nth(1).click()
    visitor.settle()
    second = np.array(Image.open(visitor.download("#download", tmp_path)))
    assert first.shape == second.shape
    assert not np.array_equal(first, second)


def test_the_routing_is_seen_and_overridden(
    visitor: Visitor, server: Server, tmp_path: Path
) -> None:
    visitor.remove()
    sample, names = server.samples[0], server.session.expert_names
    image, mask = Image.open(sample.photo).convert("RGB"), Image.open(sample.mask)
    own = server.session.remove(image, mask, RemovalSettings(steps=STEPS))[0]
    assert own.trace is not None
    assert visitor.weights() == [round(weight, 3) for weight in own.trace.mean.tolist()]
    visitor.tab("Noise")
    visitor.page.locator("#curve img").wait_for()
    visitor.tab("Tokens")
    if own.trace.tokens is not None:
        assert visitor.page.locator("#maps button.thumbnail-item").count() == len(names)
        visitor.screenshot("app_tokens")
    visitor.tab("Override")
    for index, weight in enumerate((0.0, 0.5, 0.5)):
        visitor.page.fill(f"#weight-{index} input[type=number]", str(weight))
        visitor.page.press(f"#weight-{index} input[type=number]", "Tab")
    visitor.screenshot("app_override")
    assert visitor.remove("#redraw").startswith("weights 0.00, 0.50, 0.50")
    assert visitor.weights() == [0, 0.5, 0.5]
    settings = RemovalSettings(steps=STEPS, weights=(0.0, 0.5, 0.5))
    expected = server.session.remove(image, mask, settings)[0].image
    found = Image.open(visitor.download("#download", tmp_path))
    assert np.array_equal(np.array(found), np.array(expected))
    visitor.tab("Override")
    assert visitor.remove("#leave-out").startswith("without removal")
    assert visitor.weights()[0] == 0
    settings = RemovalSettings(steps=STEPS, without=names[0])
    expected = server.session.remove(image, mask, settings)[0].image
    found = Image.open(visitor.download("#download", tmp_path))
    assert np.array_equal(np.array(found), np.array(expected))


def test_a_removal_on_a_crop_has_its_map(visitor: Visitor, server: Server, tmp_path: Path) -> None:
    photo, mask = Image.new("RGB", (300, 200), "gray"), Image.new("L", (300, 200))
    photo.paste(Image.open(server.samples[2].photo).convert("RGB").resize((60, 60)), (200, 90))
    mask.paste(255, (215, 110, 235, 130))
    photo.save(tmp_path / "large.png")
    mask.save(tmp_path / "mask.png")
    visitor.upload("Load a photograph", tmp_path / "large.png")
    visitor.upload("Load a mask", tmp_path / "mask.png")
    visitor.page.click("#area input")
    visitor.page.get_by_role("option", name="a crop around the mask").click()
    visitor.remove()
    found = Image.open(visitor.download("#download", tmp_path))
    files = [tmp_path / name for name in ("large.png", "mask.png", "expected.png")]
    expected = removed_by_command(server, *files, crop=True)
    assert np.array_equal(np.array(found), np.array(expected))
    assert not np.array_equal(np.array(found), np.array(photo))
    visitor.tab("Tokens")
    assert visitor.page.locator("#maps button.thumbnail-item").count() == (0 if CHECKPOINT else 3)


def test_the_mixture_is_exported(visitor: Visitor, tmp_path: Path) -> None:
    from safetensors import safe_open

    visitor.remove()
    weights = visitor.weights()
    visitor.tab("Export")
    visitor.act("#export")
    file = visitor.download("#lora a", tmp_path)
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["moe_lora"])["weights"]
        assert len(list(opened.keys())) > 0
    assert [round(weight, 3) for weight in told.values()] == weights


def test_two_visitors_at_once_do_not_see_each_others_masks(
    server: Server, browser: Any, tmp_path: Path
) -> None:
    with Visitor(browser, server.address) as one, Visitor(browser, server.address) as two:
        two.page.locator("#samples button.thumbnail-item").nth(1).click()
        two.settle()
        for visitor in (one, two):  # both wait in one queue
            visitor.page.click("#run")
        for index, visitor in enumerate((one, two)):
            visitor.page.wait_for_function(
                "() => document.querySelector('#told').innerText.includes('steps')"
            )
            visitor.settle()
            folder = tmp_path / str(index)
            folder.mkdir()
            found = Image.open(visitor.download("#download", folder))
            sample = server.samples[index]
            mask = Image.open(sample.mask)
            expected = server.session.remove(
                Image.open(sample.photo).convert("RGB"), mask, RemovalSettings(steps=STEPS)
            )[0]
            assert np.array_equal(np.array(found), np.array(expected.image))
            used = np.array(Image.open(visitor.download("#download-mask", folder)))
            assert np.array_equal(used > 0, np.array(mask) > 0)


def test_a_crash_is_told_to_its_visitor_and_the_server_goes_on(
    visitor: Visitor, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("device 0")

    with monkeypatch.context() as patch:
        patch.setattr("image_session.removal_session.remove_from_image", broken)
        visitor.page.click("#run")
        assert "too large for the memory" in visitor.message()
    visitor.settle()
    assert "steps" in visitor.remove()


def test_files_that_are_no_photographs_are_refused(visitor: Visitor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    visitor.upload("Load a photograph", tmp_path / "broken.png")
    text = visitor.message()
    assert "Expected broken.png to be an image" in text
    assert "/" not in text
    Image.new("RGB", (2000, 1000)).save(tmp_path / "wide.png")
    visitor.upload("Load a photograph", tmp_path / "wide.png")
    assert "at most 1 megapixels" in visitor.message()
    for _ in range(2):  # the editor takes part in further requests
        visitor.act("#invert")
    assert "steps" in visitor.remove()  # the first sample is still there


def test_a_phone_shows_all_of_it(server: Server, browser: Any) -> None:
    size = {"width": 390, "height": 844}
    with Visitor(browser, server.address, viewport=size, has_touch=True) as visitor:
        visitor.remove()
        width = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert width <= size["width"]
        for selector in ("#upload", "#editor", "#run", "#result", "#download", "#bars"):
            box = visitor.box(visitor.page.locator(selector))
            assert 0 <= box["x"] < box["x"] + box["width"] <= size["width"], selector
        assert visitor.box(visitor.page.locator("#samples"))["height"] < 90  # one row, no gap
        visitor.screenshot("app_phone")


def status(url: str, data: bytes | None = None, **headers: str) -> int:
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def file_routes(server: Server, name: str) -> list[str]:
    base = server.address.rstrip("/")
    routes = [f"{base}/gradio_api/file={name}", f"{base}/gradio_api/file/{name}"]
    return [*routes, f"{base}/file={name}"]


def test_no_file_of_the_server_can_be_read(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (server.folder / "link.txt").symlink_to(secret)
    up = "/".join([".."] * len(server.folder.parts))
    names = [
        str(secret),
        "/etc/passwd",
        f"{server.folder}/{up}{secret}",
        f"{server.folder}/link.txt",
        f"../../../../../..{secret}",
        str(server.checkpoint / "adapter_config.json"),
        str(Path.cwd() / "pyproject.toml"),
        "pyproject.toml",
        "http://127.0.0.1:1/",
    ]
    for name in names:
        for written in (name, urllib.parse.quote(name, safe=""), urllib.parse.quote(name)):
            for url in file_routes(server, written):
                assert status(url) in (403, 404), url
    # The route itself works.
    assert status(file_routes(server, str(server.samples[0].photo))[0]) == 200


def upload(server: Server, name: str, data: bytes) -> tuple[int, list[str]]:
    boundary = "boundary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
    body = f"{head}Content-Type: image/png\r\n\r\n".encode() + data + f"\r\n--{boundary}--".encode()
    request = urllib.request.Request(
        f"{server.address.rstrip('/')}/gradio_api/upload",
        body,
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, []


def test_uploads_are_bounded_and_stay_in_the_folder(server: Server) -> None:
    code, _ = upload(server, "too_large.png", bytes(int(2e6 * MEGABYTES)))
    assert code == 413
    assert list(server.folder.rglob("too_large.png")) == []
    for name in ("../../../escaped.png", "/tmp/escaped.png", "..%2f..%2fescaped.png"):
        code, paths = upload(server, name, b"data")
        for path in paths:
            assert server.folder.resolve() in Path(path).resolve().parents
    assert not Path("/tmp/escaped.png").exists()


def call(server: Server, function: int, data: list[Any]) -> dict[str, Any]:
    """Call a function of the page without the page, as a stranger could; return the last event."""
    base, session = server.address.rstrip("/"), f"stranger-{threading.get_ident()}"
    body = {"data": data, "fn_index": function, "session_hash": session, "trigger_id": 1}
    request = urllib.request.Request(
        f"{base}/gradio_api/queue/join",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60):
        pass
    url = f"{base}/gradio_api/queue/data?session_hash={session}"
    with urllib.request.urlopen(url, timeout=60) as events:
        for line in events:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                if event["msg"] == "process_completed":
                    return dict(event)
    raise AssertionError("Expected the call to be completed.")


def test_a_request_cannot_name_files_of_the_server(server: Server) -> None:
    config = json.loads(
        urllib.request.urlopen(f"{server.address.rstrip('/')}/config", timeout=60).read()
    )
    open_photo = next(
        entry for entry in config["dependencies"] if "upload" in str(entry["targets"][0][1])
    )
    named = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    outside = call(server, open_photo["id"], [None, named])
    assert not outside["success"]
    assert "root:" not in json.dumps(outside)
    inside = named | {"path": str(server.samples[1].photo)}
    assert call(server, open_photo["id"], [None, inside])["success"]
