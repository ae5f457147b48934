"""Removal with a quantized or offloaded transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import moe_lora
import remove
from flux_fill import base_precision
from flux_fill.base_precision import PACKAGES
from flux_fill.models import load_checkpoint, load_pipeline
from object_removal.removing import remove_object

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(routed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose experts change the result."""
    folder: Path = tmp_path_factory.mktemp("louder")
    for file in routed_checkpoint.glob("adapter_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    louder = {k: v * 50 if "lora_B" in k else v for k, v in tensors.items()}
    save_file(louder, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def flags(checkpoint: Path, random_flux_fill: Path, triplets: Path) -> list[str]:
    image, mask = (str(triplets / name / "000.png") for name in ("src", "mask"))
    model = ["--checkpoint", str(checkpoint), "--flux_fill_id", str(random_flux_fill)]
    return ["--image", image, "--mask", mask, *model, "--dtype", "fp32", "--device", "cpu"]


def remove_with(flags: list[str], triplets: Path) -> tuple[FluxFillPipeline, Any]:
    pipe, conditioner = remove.load_model(remove.parse(flags)[0])
    image, mask = (Image.open(triplets / name / "000.png") for name in ("src", "mask"))
    result = remove_object(pipe, conditioner, image, mask, steps=2)
    return pipe, np.array(result).astype(int)


def group_offloads(pipe: FluxFillPipeline) -> list[Any]:
    hooks = [getattr(m, "_diffusers_hook", None) for m in pipe.transformer.modules()]
    found = [hook.get_hook("group_offloading") for hook in hooks if hook is not None]
    return [hook.group for hook in found if hook is not None]


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_offloading_changes_no_pixel_and_no_weight_of_the_router(
    kind: str, flags: list[str], triplets: Path
) -> None:
    plain, expected = remove_with(flags, triplets)
    assert group_offloads(plain) == []
    pipe, found = remove_with([*flags, "--offload", kind], triplets)
    assert len(group_offloads(pipe)) >= 3
    assert np.array_equal(found, expected)
    weights = moe_lora.current_routing(plain.transformer).weights
    assert torch.equal(moe_lora.current_routing(pipe.transformer).weights, weights)
    assert float(weights.max() - weights.min()) > 0.01


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_weights_that_are_away_are_not_used(
    kind: str, flags: list[str], triplets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = remove.load_trained_transformer

    def load(pipe: FluxFillPipeline, *args: Any) -> None:
        real(pipe, *args)
        for group in group_offloads(pipe):
            destroy_while_away(group)

    _, expected = remove_with(flags, triplets)
    monkeypatch.setattr(remove, "load_trained_transformer", load)
    _, found = remove_with([*flags, "--offload", kind], triplets)
    assert np.array_equal(found, expected)


def destroy_while_away(group: Any) -> None:
    """Fill the weights of a group with NaN whenever it is offloaded."""
    parameters = [p for module in group.modules for p in module.parameters()]
    parameters += group.parameters
    kept = {}

    def offload() -> None:
        for parameter in parameters:
            if parameter not in kept:
                kept[parameter] = parameter.data
                parameter.data = torch.full_like(parameter, torch.nan)

    def onload() -> None:
        for parameter in list(kept):
            parameter.data = kept.pop(parameter)

    group.offload_, group.onload_ = offload, onload
    offload()


@pytest.mark.parametrize(("precision", "limit"), [("int8", 3), ("fp8", 8)])
@pytest.mark.parametrize("offload", [[], ["--offload", "block_level"], ["--offload", "leaf_level"]])
def test_a_quantized_transformer_removes_nearly_the_same(
    offload: list[str], precision: str, limit: float, flags: list[str], triplets: Path
) -> None:
    pytest.importorskip(PACKAGES.get(precision, "torch"))
    _, expected = remove_with(flags, triplets)
    pipe, found = remove_with([*flags, "--base_precision", precision, *offload], triplets)
    weight = pipe.transformer.single_transformer_blocks[0].attn.to_q.base_layer.weight
    assert weight.qdata.dtype in (torch.int8, torch.float8_e4m3fn)
    assert bool(group_offloads(pipe)) == bool(offload)
    assert 0 < np.abs(found - expected).mean() < limit


def test_the_script_writes_its_file_with_both_flags(flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    output = tmp_path / "out.png"
    memory = ["--base_precision", "int8", "--offload", "leaf_level"]
    remove.main([*flags, *memory, "--steps", "1", "--output", str(output)])
    assert Image.open(output).size == (64, 64)


def test_flags_that_cannot_be_honored_end_the_program(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(remove, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))

    def refuse(*words: str) -> str:
        with pytest.raises(SystemExit):
            remove.main([*flags, *words])
        return capsys.readouterr().err

    assert "Expected a GPU with `base_precision` nf4" in refuse("--base_precision", "nf4")
    monkeypatch.setattr(base_precision, "gpu_is_available", lambda: True)
    said = refuse("--base_precision", "nf4", "--offload", "leaf_level")
    assert "Expected `base_precision` fp8 or int8 with `offload`" in said
    monkeypatch.setattr(base_precision, "find_spec", lambda name: None)
    assert "Expected the package torchao" in refuse("--base_precision", "fp8")


def test_a_whole_transformer_is_not_loaded_into_quantized_weights(
    random_flux_fill: Path, flags: list[str]
) -> None:
    pytest.importorskip("torchao")
    folder = str(random_flux_fill)
    args = remove.parse([*flags, "--base_precision", "int8"])[0]
    with pytest.raises(ValueError, match=r"Expected an adapter in .*Leave out `base_precision`"):
        remove.load_trained_transformer(
            load_pipeline(folder, transformer=False), _with(args, folder), torch.float32
        )
    load_checkpoint(load_pipeline(folder), random_flux_fill)


def _with(args: Any, checkpoint: str) -> Any:
    args.checkpoint = Path(checkpoint)
    return args
