from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import demo_kinds
from flux_fill.kind_hints import KindHints

pytestmark = pytest.mark.slow


def test_it_leaves_numbers_and_pictures(
    random_flux_fill: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = tmp_path / "small.yaml", tmp_path / "out"
    text = demo_kinds.CONFIG.read_text().replace("lora_r: 16", "lora_r: 2")
    config.write_text(f"{text}flux_fill_id: {random_flux_fill}\n")
    flags = ["--quick", "--config", str(config), "--output_dir", str(output)]
    assert demo_kinds.main(flags) == 0
    found = json.loads((output / "metrics.json").read_text())
    assert set(found["psnr_by_kind"]) == {"base", "hinted", "by itself"}
    assert list(found["psnr_by_kind"]["hinted"]) == list(demo_kinds.KINDS)
    rises = found["specialization"]["rises"]
    assert list(rises) == list(demo_kinds.KINDS)
    assert found["specialization"]["pairs"] == {kind: kind for kind in demo_kinds.KINDS}
    # The router selects one expert: without another one, nothing changes for a scene.
    changed = sum(value != 0 for row in rises.values() for value in row.values())
    assert 1 <= changed <= 6
    sheet = Image.open(output / "experts.png")
    assert sheet.width > 7 * 2 * 128
    for name in ("weights_by_kind", "specialization"):
        assert Image.open(output / f"{name}.png").width >= 800
    printed = capsys.readouterr().out
    assert "The router recognizes the kind of" in printed
    assert "diagonal share" in printed


def test_the_recipe_names_the_experts_of_the_kinds() -> None:
    hints = KindHints(demo_kinds.KINDS, list(demo_kinds.KINDS), "only")
    assert hints.experts[:3] == list(demo_kinds.KINDS)
