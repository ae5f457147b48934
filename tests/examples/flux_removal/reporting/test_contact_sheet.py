from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reporting import contact_sheet as sheets


def test_a_sheet_has_a_cell_for_every_image(tmp_path: Path) -> None:
    names = ("source", "mask", "target")
    rows = [{name: torch.full((3, 16, 32), value) for name in names} for value in (0.0, 0.5)]
    sheets.contact_sheet(rows, tmp_path / "sheet.png", scale=2)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    margin, header = sheets.MARGIN, sheets.HEADER
    assert sheet.shape == (header + 2 * (32 + margin) + margin, 3 * (64 + margin) + margin, 3)
    top = header + margin
    assert (sheet[top : top + 32, margin : margin + 64] == 0).all()
    assert (sheet[top + 32 + margin : top + 64 + margin, margin : margin + 64] == 128).all()
    assert (sheet[:header] < 100).any()


def test_rows_can_have_labels(tmp_path: Path) -> None:
    rows = [{"a": torch.full((3, 16, 32), 0.5)}, {"a": torch.full((3, 16, 32), 0.5)}]
    sheets.contact_sheet(rows, tmp_path / "plain.png")
    sheets.contact_sheet(rows, tmp_path / "sheet.png", labels=["one", "a longer one"])
    plain, sheet = (np.array(Image.open(tmp_path / f"{n}.png")) for n in ("plain", "sheet"))
    indent = sheet.shape[1] - plain.shape[1]
    assert indent > 40
    assert np.array_equal(sheet[sheets.HEADER :, indent:], plain[sheets.HEADER :])
    upper, lower = np.array_split(sheet[sheets.HEADER :, :indent].min(2) < 128, 2)
    assert upper.any()
    assert lower.any(0).sum() > upper.any(0).sum()
    with pytest.raises(ValueError, match="all of the 2 rows, but got 1"):
        sheets.contact_sheet(rows, tmp_path / "sheet.png", labels=["one"])


def test_a_mask_tints_what_it_covers() -> None:
    src, mask = torch.full((3, 2, 2), 0.5), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    shown = sheets.show_mask(src, mask)
    assert torch.equal(shown[:, 1], src[:, 1])
    assert shown[0, 0, 0] > shown[1, 0, 0]
