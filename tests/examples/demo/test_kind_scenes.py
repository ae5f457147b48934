from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import kind_scenes
from kinds import random_kind_scene

KINDS = ["shadow", "glow"]


def test_bundled_photographs_give_the_scenes_of_their_split(tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path / "scenes"), "--count", "5", "--seed", "12"]
    kind_scenes.main([*flags, "--kinds", *KINDS, "--split", "test"])
    found = load_file(tmp_path / "scenes")
    assert found["kind"].tolist() == [0, 1, 0, 1, 0]
    rng = np.random.default_rng((12, 3))
    expected = random_kind_scene(rng, "test", kind="glow", mask_kind=kind_scenes.MASK_KINDS[1])
    for name, array in (("source", expected.src), ("result", expected.result)):
        image = torch.from_numpy(np.round(array * 255)).permute(2, 0, 1)
        assert torch.equal(found[name][3].float(), image)
    assert torch.equal(found["mask"][3, 0].float(), torch.from_numpy(expected.mask) * 255)


def test_photographs_of_a_folder_take_turns_and_are_made_small(tmp_path: Path) -> None:
    folder = tmp_path / "photographs" / "inner"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, color in enumerate(((200, 120, 120), (120, 120, 200))):
        image = np.clip(rng.normal(color, 12, (840, 900, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{index}.png")
    assert [p.shape for p in kind_scenes.read_photographs(folder.parent)] == [(420, 450, 3)] * 2
    flags = ["--output", str(tmp_path / "scenes"), "--count", "4", "--kinds", *KINDS]
    kind_scenes.main([*flags, "--photographs", str(folder.parent)])
    result = load_file(tmp_path / "scenes")["result"].float().mean((2, 3))
    redder = result[:, 0] > result[:, 2]
    assert redder.tolist() == [True, True, False, False]


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected images"):
        kind_scenes.read_photographs(tmp_path)


def test_scenes_are_labeled_by_the_kind_of_their_mask(tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path / "scenes"), "--count", "4", "--kinds", "shadow"]
    kind_scenes.main([*flags, "--label", "mask_kind"])
    assert load_file(tmp_path / "scenes")["kind"].tolist() == [0, 1, 2, 0]
