from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from image_io.metadata import read_exif
from image_session.painted_mask import KEEP, REMOVE
from image_session.photo import difference, open_photo
from image_session.removal_session import RemovalSession, RemovalSettings
from image_session.visit import Visit

pytestmark = pytest.mark.slow

SHORT = RemovalSettings(steps=2)


def stroke(size: tuple[int, int], color: tuple[int, int, int] = REMOVE) -> Image.Image:
    layer = Image.new("RGBA", size)
    ImageDraw.Draw(layer).rectangle((30, 20, 59, 49), fill=(*color, 178))
    return layer


@pytest.fixture
def visit(photo_file: Path) -> Visit:
    visit = Visit()
    visit.open(photo_file, most_megapixels=1)
    return visit


def test_what_is_painted_goes_and_all_else_stays(visit: Visit, session: RemovalSession) -> None:
    layers = [stroke(visit.loaded.image.size)]
    visit.remove(session, layers, RemovalSettings(steps=2, outside="paste"))
    changed = np.array(difference(visit.shown.image, visit.source)).any(2)
    assert visit.used_mask is not None
    assert visit.used_mask.sum() == 30 * 30
    assert changed[25:45, 35:55].mean() > 0.9
    assert not changed[:10].any()


def test_a_jpeg_comes_back_as_a_jpeg_with_its_metadata(
    visit: Visit, session: RemovalSession, photo_file: Path, tmp_path: Path
) -> None:
    visit.remove(session, [stroke(visit.loaded.image.size)], SHORT)
    file, mask_file = visit.write_shown(tmp_path)
    assert (file.name, mask_file.name) == ("photo_removed.jpg", "photo_mask.png")
    assert file.parent.parent == tmp_path
    written = Image.open(file)
    assert written.format == "JPEG"
    assert written.getexif()[0x010E] == "a test"
    assert read_exif(file) == read_exif(photo_file)
    assert np.array_equal(np.array(Image.open(mask_file)) > 0, visit.used_mask)
    close = np.abs(np.array(written, int) - np.array(visit.shown.image, int)).mean()
    assert close < 5  # noise, compressed
    visit.close()
    assert not file.parent.exists()


def test_transparent_pixels_are_the_mask_and_are_filled(
    image: Image.Image, session: RemovalSession, tmp_path: Path
) -> None:
    hole = Image.new("L", image.size, 255)
    hole.paste(0, (30, 20, 60, 50))
    erased = image.copy()
    erased.putalpha(hole)
    erased.save(tmp_path / "erased.png")
    visit = Visit()
    visit.open(tmp_path / "erased.png", most_megapixels=1)
    assert visit.current_mask.sum() == 30 * 30
    visit.remove(session, [], SHORT)
    file, _ = visit.write_shown(tmp_path)
    assert Image.open(file).mode == "RGB"
    assert np.array_equal(np.array(Image.open(file)), np.array(visit.shown.image))
    # Where a mask leaves the transparent part alone, it stays transparent.
    visit.clear_mask()
    layer = Image.new("RGBA", image.size)
    layer.paste((*REMOVE, 178), (0, 0, 20, 15))
    visit.remove(session, [layer], SHORT)
    assert Image.open(visit.write_shown(tmp_path)[0]).mode == "RGBA"


def test_masks_are_inverted_grown_and_cleared(visit: Visit) -> None:
    size = visit.loaded.image.size
    visit.grow_mask([stroke(size)], 3)
    assert visit.current_mask[20:50, 27:63].all()
    assert not visit.current_mask[16].any()
    before = visit.current_mask
    visit.invert_mask([])
    assert np.array_equal(visit.current_mask, ~before)
    visit.invert_mask([stroke(size, KEEP)])
    assert visit.current_mask[20:50, 30:60].all()
    visit.clear_mask()
    assert not visit.current_mask.any()


def test_a_redraw_keeps_mask_and_seed_and_remembers_the_last_result(
    visit: Visit, session: RemovalSession
) -> None:
    with pytest.raises(ValueError, match="nothing was removed yet"):
        visit.redraw(session, weights=(1, 0, 0))
    visit.remove(session, [stroke(visit.loaded.image.size)], RemovalSettings(steps=2, seed=7))
    own = visit.shown
    assert visit.previous is None
    visit.redraw(session, weights=(1, 0, 0))
    assert visit.previous is own.image
    assert visit.shown.settings.weights == (1, 0, 0)
    assert visit.shown.seed == 7
    visit.redraw(session, without="removal_expert")
    assert visit.shown.settings.weights is None
    assert visit.shown.trace is not None
    assert visit.shown.trace.mean[0] == 0
    with pytest.raises(ValueError, match="`weights` >= 0"):
        visit.redraw(session, weights=(0, 0, 0))


def test_one_of_several_seeds_is_chosen(
    visit: Visit, session: RemovalSession, tmp_path: Path
) -> None:
    layers = [stroke(visit.loaded.image.size)]
    visit.remove(session, layers, RemovalSettings(steps=2, count=2))
    first = visit.write_shown(tmp_path)[0].read_bytes()
    visit.choose(1)
    assert visit.shown.seed == 1
    assert visit.write_shown(tmp_path)[0].read_bytes() != first
    with pytest.raises(ValueError, match="one of 2 results"):
        visit.choose(2)


def test_a_new_photograph_drops_the_old_work(
    visit: Visit, session: RemovalSession, photo_file: Path, tmp_path: Path
) -> None:
    visit.remove(session, [stroke(visit.loaded.image.size)], SHORT)
    file = visit.export(session, tmp_path, "diffusers")
    assert file.is_file()
    visit.open(photo_file, most_megapixels=1)
    assert visit.removals == []
    assert not visit.current_mask.any()
    visit.picture(visit.loaded.image, tmp_path)
    assert file.exists()  # a page may still be loading it
    visit.open(photo_file, most_megapixels=1)
    assert not file.exists()
    visit.close()
    assert not list(tmp_path.glob("visit_*"))


def test_pictures_never_share_a_file(visit: Visit, tmp_path: Path) -> None:
    names = {visit.picture(visit.loaded.image, tmp_path) for _ in range(3)}
    assert len(names) == 3
    assert {name.parent for name in names} == {visit.folder}


def test_photographs_that_are_too_large_are_refused_from_their_header(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"at most 1 megapixels, but large\.png has 2000x1000"):
        open_photo(tmp_path / "large.png", most_megapixels=1)
    data = (tmp_path / "large.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:200])  # not even decoded
    with pytest.raises(ValueError, match="megapixels"):
        open_photo(tmp_path / "cut.png", most_megapixels=1)
    with pytest.raises(ValueError, match=r"none is loaded yet"):
        _ = Visit().loaded
