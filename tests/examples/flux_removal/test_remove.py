from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file
from scipy import ndimage

import moe_lora
import object_removal.removing
import remove
import train
from flux_fill.models import Conditioner, load_checkpoint, load_pipeline
from flux_fill.surroundings import FEATHER, SEAM
from image_io.padding import pad_to_multiple
from object_removal.removing import remove_object
from options.parsing import parse_options
from options.train_options import BUNDLED_MODEL

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]


@pytest.fixture
def checkpoint(routed_checkpoint: Path) -> Path:
    return routed_checkpoint


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (61, 90, 3), dtype=np.uint8)
    mask = np.zeros((61, 90), dtype=np.uint8)
    mask[20:50, 30:60] = 255
    paths = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "output")}
    Image.fromarray(image).save(paths["image"])
    Image.fromarray(mask).save(paths["mask"])
    return paths


def call(files: dict[str, Path], checkpoint: Path, flux_fill_id: Path, *further: str) -> np.ndarray:
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    flags += ["--checkpoint", str(checkpoint), "--flux_fill_id", str(flux_fill_id)]
    # The model is made for 64 pixels; with more the whole image is one crop.
    flags += ["--steps", "2", "--overwrite"]
    if "--resolution" not in further:
        flags += ["--resolution", "96"]
    assert remove.main([*flags, *further]) == 0
    return np.array(Image.open(files["output"]))


def test_any_size_comes_back_as_it_was(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    assert call(files, checkpoint, random_flux_fill).shape == (61, 90, 3)


def test_the_same_seed_gives_the_same_image(
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
    routed = remove_object(pipe, conditioner, image, mask, steps=2)
    weights = moe_lora.routing_stats(pipe.transformer).mean_weights
    assert max(weights) - min(weights) > 0.01
    moe_lora.set_routing_mode(pipe.transformer, "uniform")
    uniform = remove_object(pipe, conditioner, image, mask, steps=2)
    assert not np.array_equal(np.array(routed), np.array(uniform))


def test_the_script_has_no_routing_code() -> None:
    room = Path(object_removal.removing.__file__).parent
    for file in (Path(remove.__file__), *room.glob("*.py")):
        tree = ast.parse(file.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
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


def test_an_unreadable_image_is_named(
    files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    files["image"].write_text("no image")
    with pytest.raises(ValueError, match=r"image\.png to be an image"):
        call(files, tmp_path, random_flux_fill)


def test_a_mask_of_another_size_raises(
    files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    Image.open(files["mask"]).resize((61, 90), Image.Resampling.NEAREST).save(files["mask"])
    with pytest.raises(ValueError, match=r"90x61, but got 61x90\. The sides are swapped"):
        call(files, tmp_path, random_flux_fill)


def test_an_empty_mask_raises(
    files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    Image.new("L", (90, 61)).save(files["mask"])
    with pytest.raises(ValueError, match=r"mask\.png, but it is empty.*--invert_mask"):
        call(files, tmp_path, random_flux_fill)


class StoppedError(Exception):
    """Say that a program got as far as the model."""


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise StoppedError

    monkeypatch.setattr(remove, "load_pipeline", stop)


@pytest.mark.usefixtures("_no_model")
def test_the_output_is_checked_before_the_model_is_loaded(files: dict[str, Path]) -> None:
    flags = ["--image", str(files["image"]), "--mask", str(files["mask"]), "--checkpoint", "none"]
    files["output"].write_bytes(b"earlier")
    for output in (files["image"], files["mask"], files["output"]):
        before = output.read_bytes()
        with pytest.raises(FileExistsError, match="--overwrite"):
            remove.main([*flags, "--output", str(output)])
        assert output.read_bytes() == before
        with pytest.raises(StoppedError):
            remove.main([*flags, "--output", str(output), "--overwrite"])
    with pytest.raises(ValueError, match="--output to end with one of"):
        remove.main([*flags, "--output", "removed.xyz"])


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize(
    ("mask", "flag"),
    [
        (np.tile(np.linspace(0, 255, 90), (61, 1)).astype(np.uint8), "--threshold_mask"),
        (np.full((30, 45), 255, dtype=np.uint8), "--resize_mask"),
        (np.zeros((61, 90), dtype=np.uint8), "--invert_mask"),
    ],
)
def test_a_mask_that_needs_a_flag_is_read_with_it(
    mask: np.ndarray, flag: str, files: dict[str, Path]
) -> None:
    Image.fromarray(mask).save(files["mask"])
    flags = ["--image", str(files["image"]), "--mask", str(files["mask"]), "--checkpoint", "none"]
    with pytest.raises(ValueError, match=flag):
        remove.main(flags)
    with pytest.raises(StoppedError):
        remove.main([*flags, flag])


def call_with(
    files: dict[str, Path], checkpoint: Path, model: Path, output: str, *further: str
) -> Image.Image:
    files = files | {"output": files["output"].with_name(output)}
    call(files, checkpoint, model, *further)
    with Image.open(files["output"]) as image:
        image.load()
        return image


def test_what_the_file_held_goes_out_again(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    shown, exif = Image.open(files["image"]), Image.Exif()
    exif[271], exif[274] = "a camera", 6
    shown.transpose(Image.Transpose.ROTATE_90).save(
        files["image"], exif=exif.tobytes(), icc_profile=profile
    )
    for output in ("a.png", "a.jpg", "a.webp", "a.tif", "a.avif"):
        written = call_with(files, checkpoint, random_flux_fill, output)
        assert written.size == (90, 61)
        assert written.info["icc_profile"] == profile
        assert written.getexif()[271] == "a camera"
        assert written.getexif().get(274, 1) == 1


def test_the_default_output_has_the_format_of_the_image(
    checkpoint: Path,
    files: dict[str, Path],
    random_flux_fill: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "photo.JPEG"
    Image.open(files["image"]).save(image)
    flags = ["--image", str(image), "--mask", str(files["mask"]), "--steps", "1"]
    flags += ["--checkpoint", str(checkpoint), "--flux_fill_id", str(random_flux_fill)]
    assert remove.main(flags) == 0
    assert Image.open(tmp_path / "removed.jpg").format == "JPEG"
    with pytest.raises(FileExistsError, match=r"removed\.jpg exists"):
        remove.main(flags)


def test_transparency_goes_out_again_or_is_the_mask(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    image, mask = Image.open(files["image"]).convert("RGB"), Image.open(files["mask"])
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 10, 61))
    image.putalpha(alpha)
    image.save(files["image"])
    keep = ["--outside", "paste", "--feather", "0"]
    kept = call_with(files, checkpoint, random_flux_fill, "a.png", *keep)
    assert np.array_equal(np.array(kept)[np.array(mask) == 0], np.array(image)[np.array(mask) == 0])
    with pytest.raises(ValueError, match="--background"):
        call_with(files, checkpoint, random_flux_fill, "a.jpg")
    flat = call_with(files, checkpoint, random_flux_fill, "b.png", *keep, "--background", "#ff0000")
    assert np.array_equal(np.array(flat), np.array(kept)) is False
    gone = {name: path for name, path in files.items() if name != "mask"}
    filled = call_with(gone, checkpoint, random_flux_fill, "c.png", *keep)
    assert filled.mode == "RGB"
    opaque = np.array(alpha) == 255
    assert np.array_equal(np.array(filled)[opaque], np.array(image)[..., :3][opaque])
    assert not np.array_equal(np.array(filled)[~opaque], np.array(image)[..., :3][~opaque])


def test_no_mask_for_an_opaque_image_raises(
    files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    del files["mask"]
    with pytest.raises(ValueError, match="Expected --mask for an image without transparent"):
        call(files, tmp_path, random_flux_fill)


def test_padding_continues_image_and_mask_alike() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (17, 30, 3), dtype=np.uint8)
    mask = Image.fromarray(rng.integers(0, 2, (17, 30), dtype=np.uint8) * 255)
    found = pad_to_multiple(Image.fromarray(image), mask)
    for padded, before in zip(map(np.array, found), (image, np.array(mask)), strict=True):
        assert padded.shape[:2] == (32, 32)
        for row, column in np.ndindex(32, 32):
            assert np.array_equal(padded[row, column], before[min(row, 16), min(column, 29)])
    with pytest.raises(ValueError, match="30x17, 17x30"):
        pad_to_multiple(Image.fromarray(image), mask.transpose(Image.Transpose.TRANSPOSE))


def test_an_object_at_the_border_is_masked_in_the_padding_too(
    random_flux_fill: Path,
) -> None:
    pipe, seen = load_pipeline(str(random_flux_fill)), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    image, mask = Image.new("RGB", (40, 40), "gray"), Image.new("L", (40, 40))
    mask.paste(255, (24, 24, 40, 40))
    remove_object(pipe, Conditioner(pipe), image, mask, steps=1)
    read = moe_lora.masks.from_flux_fill(seen[0], 48, 48)
    assert (read[..., 24:, 24:] == 1).all()
    assert read.sum() == 24 * 24


@pytest.mark.parametrize("feather", [0, 3])
def test_a_pasted_result_leaves_the_image_to_the_last_bit(
    feather: int, checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    image = np.array(Image.open(files["image"]))
    inside = np.array(Image.open(files["mask"])) > 0
    outside = ndimage.distance_transform_edt(~inside) >= feather + 1
    plain = call(files, checkpoint, random_flux_fill, "--outside", "prediction")
    assert (plain[outside] != image[outside]).mean() > 0.5
    flags = ["--outside", "paste", "--feather", str(feather)]
    kept = call(files, checkpoint, random_flux_fill, *flags)
    assert np.array_equal(kept[outside], image[outside])
    assert np.array_equal(kept[inside], plain[inside])
    edge = ~inside & ~outside
    assert bool(edge.any()) == (feather > 0)
    low, high = np.minimum(plain, image), np.maximum(plain, image)
    assert ((kept >= low) & (kept <= high)).all()


def test_a_pasted_result_has_a_soft_edge_by_default(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path
) -> None:
    paste = ["--outside", "paste"]
    named = call(files, checkpoint, random_flux_fill, *paste, "--feather", str(FEATHER))
    assert np.array_equal(named, call(files, checkpoint, random_flux_fill, *paste))
    hard = call(files, checkpoint, random_flux_fill, *paste, "--feather", "0")
    assert not np.array_equal(named, hard)
    # The seam's correction changes the mask, the soft edge its surroundings.
    corrected = call(files, checkpoint, random_flux_fill, *paste, "--seam", "0.5")
    inside = np.array(Image.open(files["mask"])) > 0
    assert np.array_equal(corrected[~inside], hard[~inside])
    assert not np.array_equal(corrected[inside], hard[inside])


def test_by_default_the_image_stays_but_for_what_the_model_changed(
    arguments: Arguments, files: dict[str, Path]
) -> None:
    """The bundled model on a smooth image: its autoencoder alone changes most of the pixels."""
    row, column = np.mgrid[:61, :90]
    smooth = np.stack([128 + row, 90 + column, 200 - row], axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(files["image"])
    inside = np.array(Image.open(files["mask"])) > 0
    trained = train.train(parse_options(arguments(flux_fill_id=BUNDLED_MODEL, max_train_steps=1)))
    plain = call(files, trained, BUNDLED_MODEL, "--outside", "prediction")
    kept = call(files, trained, BUNDLED_MODEL)
    same = (kept == smooth).all(-1)[~inside].mean()
    assert (plain == smooth).all(-1)[~inside].mean() < 0.1
    assert same > 0.8
    raw_seam = call(files, trained, BUNDLED_MODEL, "--seam", "0")
    assert np.array_equal(raw_seam[inside], plain[inside])
    assert np.array_equal(raw_seam[~inside], kept[~inside])
    assert not np.array_equal(kept[inside], plain[inside])
    named = ["--outside", "keep", "--seam", str(SEAM)]
    assert np.array_equal(call(files, trained, BUNDLED_MODEL, *named), kept)


@pytest.mark.parametrize(
    "flags",
    [
        ["--ref", "a.png"],
        ["--steps", "0"],
        ["--stepz", "1"],
        ["--feather", "2"],
        ["--outside", "paste", "--feather", "-1"],
        ["--outside", "paste", "--feather", "2", "--seam", "0.5"],
        ["--outside", "prediction", "--seam", "0.5"],
        ["--outside", "nothing"],
        ["--seam", "1.5"],
        ["--grow_mask", "-1"],
        ["--mask_label", "-1"],
        ["--mask_label", "1", "--threshold_mask"],
        ["--background", "no color"],
        ["--fail_fast"],
        ["--skip_existing"],
        ["--seeds", "1", "1"],
        ["--resolution", "8"],
        ["--crop_context", "-1"],
    ],
)
def test_flags_that_could_not_be_honored_end_the_program(
    flags: list[str], files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call(files, tmp_path, tmp_path, *flags)


def test_a_task_hint_reaches_the_router(
    checkpoint: Path, files: dict[str, Path], random_flux_fill: Path, tmp_path: Path
) -> None:
    louder = strengthened(checkpoint, tmp_path / "louder")
    hints = ("removal_only", "completion_only")
    found = [call(files, louder, random_flux_fill, "--task_hint", hint) for hint in hints]
    assert not np.array_equal(*found)
    assert not np.array_equal(found[0], call(files, louder, random_flux_fill))
    with pytest.raises(ValueError, match="Expected `task_hint` to be one of"):
        call(files, louder, random_flux_fill, "--task_hint", "sky_only")
