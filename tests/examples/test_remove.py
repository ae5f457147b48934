from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage

import moe_lora
import remove
import train
from models import Conditioner, load_checkpoint, load_pipeline
from options import BUNDLED_MODEL, parse_options

Arguments = Callable[..., list[str]]


@pytest.fixture
def checkpoint(arguments: Arguments, all_losses: dict[str, Any]) -> Path:
    return train.train(parse_options(arguments(**all_losses)))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (61, 90, 3), dtype=np.uint8)
    mask = np.zeros((61, 90), dtype=np.uint8)
    mask[20:50, 30:60] = 255
    paths = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "output")}
    Image.fromarray(picture).save(paths["image"])
    Image.fromarray(mask).save(paths["mask"])
    return paths


def call(files: dict[str, Path], checkpoint: Path, flux_fill_id: Path, *further: str) -> np.ndarray:
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    flags += ["--checkpoint", str(checkpoint), "--flux_fill_id", str(flux_fill_id)]
    remove.main([*flags, "--steps", "2", *further])
    return np.array(Image.open(files["output"]))


def test_any_size_comes_back_as_it_was(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    assert call(files, checkpoint, random_flux_fill).shape == (61, 90, 3)


def test_the_same_seed_gives_the_same_picture(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    first = call(files, checkpoint, random_flux_fill)
    assert np.array_equal(first, call(files, checkpoint, random_flux_fill))
    assert not np.array_equal(first, call(files, checkpoint, random_flux_fill, "--seed", "1"))
    assert not np.array_equal(first, call(files, checkpoint, random_flux_fill, "--steps", "3"))


def strengthened(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in checkpoint.glob("adapter_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    louder = {k: v * 50 if "lora_B" in k else v for k, v in tensors.items()}
    save_file(louder, folder / "adapter_model.safetensors")
    return folder


def test_the_checkpoint_counts_and_the_pipeline_routes_by_itself(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    louder = strengthened(checkpoint, tmp_path / "louder")
    plain = call(files, checkpoint, random_flux_fill)
    assert not np.array_equal(plain, call(files, louder, random_flux_fill))
    pipe = load_pipeline(str(random_flux_fill))
    load_checkpoint(pipe, louder)
    conditioner = Conditioner(pipe)
    image, mask = Image.open(files["image"]), Image.open(files["mask"])
    routed = remove.remove_object(pipe, conditioner, image, mask, steps=2)
    weights = moe_lora.routing_stats(pipe.transformer).mean_weights
    assert max(weights) - min(weights) > 0.01
    moe_lora.set_routing_mode(pipe.transformer, "uniform")
    uniform = remove.remove_object(pipe, conditioner, image, mask, steps=2)
    assert not np.array_equal(np.array(routed), np.array(uniform))


def test_the_script_has_no_routing_code() -> None:
    tree = ast.parse(Path(remove.__file__).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "moe_lora" not in names
    assert not [name for name in names if "rout" in name.lower()]


def test_a_whole_transformer_is_a_checkpoint_too(
    arguments: Arguments, files: dict[str, Path], random_flux_fill: Path
) -> None:
    folder = train.train(parse_options(arguments(use_lora=False)))
    pipe = load_pipeline(str(random_flux_fill))
    before = pipe.transformer.x_embedder.weight.clone()
    load_checkpoint(pipe, folder)
    assert not torch.equal(before, pipe.transformer.x_embedder.weight)
    assert call(files, folder, random_flux_fill).shape == (61, 90, 3)


@pytest.mark.parametrize("name", ["image", "mask"])
def test_missing_files_are_named(
    name: str, files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    files[name].unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.png"):
        call(files, tmp_path, random_flux_fill)


def test_an_unreadable_picture_is_named(
    files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    files["image"].write_text("no picture")
    with pytest.raises(ValueError, match=r"image\.png to be an image"):
        call(files, tmp_path, random_flux_fill)


def test_a_mask_of_another_size_raises(
    files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    Image.open(files["mask"]).resize((61, 90)).save(files["mask"])
    with pytest.raises(ValueError, match="90x61, but got 61x90"):
        call(files, tmp_path, random_flux_fill)


def test_an_empty_mask_raises() -> None:
    with pytest.raises(ValueError, match="white pixels"):
        remove.check_mask(Image.new("RGB", (8, 8)), Image.new("L", (8, 8)))


def test_a_grey_mask_raises_or_is_cut() -> None:
    image, mask = Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255)
    mask.paste(100, (0, 0, 4, 4))
    with pytest.raises(ValueError, match=r"25\.0% of it is grey.*--threshold_mask"):
        remove.check_mask(image, mask)
    cut = np.array(remove.check_mask(image, mask, threshold=True))
    assert set(np.unique(cut)) == {0, 255}
    assert cut[:4, :4].max() == 0


def test_compression_noise_in_a_mask_is_forgiven() -> None:
    mask = Image.new("L", (8, 8), 250)
    mask.paste(5, (0, 0, 4, 8))
    assert set(np.unique(np.array(remove.check_mask(Image.new("RGB", (8, 8)), mask)))) == {0, 255}


def test_padding_repeats_the_edge_and_masks_nothing() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (17, 30, 3), dtype=np.uint8)
    image, mask = remove.pad_to_multiple(Image.fromarray(picture), Image.new("L", (30, 17), 255))
    padded, padded_mask = np.array(image), np.array(mask)
    assert padded.shape == (32, 32, 3)
    assert np.array_equal(padded[:17, :30], picture)
    assert np.array_equal(padded[20, :30], picture[16])
    assert np.array_equal(padded[:17, 31], picture[:, 29])
    assert padded_mask[:17, :30].min() == 255
    assert padded_mask[17:].max() == 0
    assert padded_mask[:, 30:].max() == 0


@pytest.mark.parametrize("feather", [0, 3])
def test_the_background_is_kept_to_the_last_bit(
    feather: int, checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    picture = np.array(Image.open(files["image"]))
    inside = np.array(Image.open(files["mask"])) > 0
    outside = ndimage.distance_transform_edt(~inside) >= feather + 1
    plain = call(files, checkpoint, random_flux_fill)
    assert (plain[outside] != picture[outside]).mean() > 0.5
    kept = call(files, checkpoint, random_flux_fill, "--keep_background", "--feather", str(feather))
    assert np.array_equal(kept[outside], picture[outside])
    assert np.array_equal(kept[inside], plain[inside])
    edge = ~inside & ~outside
    assert bool(edge.any()) == (feather > 0)
    low, high = np.minimum(plain, picture), np.maximum(plain, picture)
    assert ((kept >= low) & (kept <= high)).all()


def test_the_kept_background_has_a_soft_edge_by_default(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    flags = ["--keep_background", "--feather", str(remove.FEATHER)]
    named = call(files, checkpoint, random_flux_fill, *flags)
    assert np.array_equal(named, call(files, checkpoint, random_flux_fill, "--keep_background"))
    hard = call(files, checkpoint, random_flux_fill, "--keep_background", "--feather", "0")
    assert not np.array_equal(named, hard)


@pytest.mark.parametrize(
    "flags",
    [
        ["--ref", "a.png"],
        ["--steps", "0"],
        ["--stepz", "1"],
        ["--feather", "2"],
        ["--keep_background", "--feather", "-1"],
    ],
)
def test_flags_that_could_not_be_honoured_end_the_program(
    flags: list[str], files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call(files, tmp_path, tmp_path, *flags)


def test_the_bundled_model_removes_with_a_checkpoint_of_its_own(
    arguments: Arguments, files: dict[str, Path]
) -> None:
    flags = arguments(flux_fill_id=BUNDLED_MODEL, max_train_steps=1)
    assert call(files, train.train(parse_options(flags)), BUNDLED_MODEL).shape == (61, 90, 3)
