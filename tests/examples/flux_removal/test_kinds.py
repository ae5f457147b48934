"""Kinds of removal from the manifest to the experts: training, evaluation, removal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import evaluate
import train
from options.parsing import parse_options

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]

NAMES = ["shadow", "glow", "text"]
KINDS = ["shadow", "glow", "shadow", "glow", None]


@pytest.fixture
def manifest(tmp_path: Path, triplets: Path) -> Path:
    """Write a manifest of the triplets with shadows, glows and one sample of no kind."""
    lines = []
    for index, kind in enumerate(KINDS):
        parts = ("src", "mask", "result", "ref")
        row = {part: str(triplets / part / f"{index:03d}.png") for part in parts}
        lines.append(row | ({"kind": kind} if kind else {}) | {"name": f"{index}"})
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def flags_of(arguments: Arguments, manifest: Path, *further: str, **changed: object) -> list[str]:
    entries = {"train_data_dir": manifest, "routing": "always", "router": "uniform"} | changed
    return [*arguments(**entries), "--expert_names", *NAMES, *further]


def trained_experts(checkpoint: Path) -> list[bool]:
    """Return which experts have left their start: lora_B is zero at first."""
    weights = load_file(checkpoint / "adapter_model.safetensors")
    products = [value for name, value in weights.items() if name.endswith("lora_B")]
    assert products
    moved = torch.stack([product.abs().amax(dim=(0, 2)) for product in products]).amax(0)
    return [bool(value > 0) for value in moved]


def adapter(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


@pytest.mark.parametrize("cache", [False, True])
def test_a_sample_trains_the_expert_of_its_kind_alone(
    arguments: Arguments, manifest: Path, cache: bool
) -> None:
    lines = [line for line in manifest.read_text().splitlines() if '"kind"' in line]
    manifest.write_text("\n".join(lines))
    given = ["--kind_experts", "shadow", "glow"]
    flags = flags_of(arguments, manifest, *given, cache_latents=cache, max_train_steps=3)
    assert trained_experts(train.train(parse_options(flags))) == [True, True, False]


def test_samples_without_a_hint_train_all_experts(
    arguments: Arguments, manifest: Path, tmp_path: Path
) -> None:
    """Kinds without an expert, samples without a kind, and hint dropout."""
    found = {}
    for name, kinds, dropout in (
        ("none", ["shadow", "glow"], 0.0),
        ("others", ["shadow=text"], 0.0),
        ("dropped", ["shadow", "glow"], 0.9),
    ):
        flags = flags_of(
            arguments,
            manifest,
            *("--kind_experts", *kinds),
            hint_dropout=dropout,
            max_train_steps=3,
            output_dir=tmp_path / name,
        )
        checkpoint = train.train(parse_options(flags))
        assert trained_experts(checkpoint) == [True, True, True]
        found[name] = adapter(checkpoint)
    assert any(not torch.equal(found["none"][k], found["dropped"][k]) for k in found["none"])


def test_a_supervised_router_learns_the_kinds_that_hints_name(
    arguments: Arguments, manifest: Path
) -> None:
    lines = [line for line in manifest.read_text().splitlines() if '"kind"' in line]
    manifest.write_text("\n".join(lines))
    taught = ("--kind_experts", "shadow", "glow", "--router_supervision_weight", "5")
    flags = flags_of(arguments, manifest, *taught, router="surroundings", max_train_steps=3)
    tensors = adapter(train.train(parse_options(flags)))
    biases = {k: v.item() for k, v in tensors.items() if "heads" in k and k.endswith("bias")}
    third = next(value for name, value in biases.items() if ".2." in name)
    # No sample is of the third kind, and hints alone give a router no gradient.
    assert len(biases) == 3
    assert third < 0 < sum(biases.values()) - third


def test_the_form_of_the_hint_counts(arguments: Arguments, manifest: Path, tmp_path: Path) -> None:
    found = []
    for form in ("only", "focus"):
        given = ["--kind_experts", "shadow", "glow", "--kind_hint", form]
        flags = flags_of(arguments, manifest, *given, output_dir=tmp_path / form)
        found.append(adapter(train.train(parse_options(flags))))
    assert any(not torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_kinds_that_the_data_lack_end_the_run(
    arguments: Arguments, manifest: Path, triplets: Path
) -> None:
    flags = flags_of(arguments, manifest, "--kind_experts", "shadow", "text")
    with pytest.raises(ValueError, match=r"\['glow', 'shadow'\], but got \['text'\]"):
        train.train(parse_options(flags))
    flags = flags_of(arguments, triplets, "--kind_experts", "shadow")
    with pytest.raises(ValueError, match=r"kinds of the data, \[\], but got \['shadow'\]"):
        train.train(parse_options(flags))


def test_evaluation_by_kind_routes_by_kind(
    arguments: Arguments,
    manifest: Path,
    random_flux_fill: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = train.train(
        parse_options(flags_of(arguments, manifest, "--kind_experts", "shadow", "glow"))
    )
    flags = ["--flux_fill_id", str(random_flux_fill), "--data_dir", str(manifest), "--steps", "1"]
    flags += ["--checkpoint", str(checkpoint), "--base_model", "--output_dir", str(tmp_path / "o")]
    found = {}
    for name, further in (("hinted", ["--kind_experts", "shadow=text", "glow"]), ("plain", [])):
        evaluate.main([*flags, *further])
        found[name] = json.loads((tmp_path / "o" / "metrics.json").read_text())
    by_name = {s["stem"]: s["routing"] for s in found["hinted"]["samples"]["trained"]}
    thirds = [0.3333] * 3
    expected = {"shadow": [0, 0, 1], "glow": [0, 1, 0], None: thirds}
    assert by_name == {f"{i}": expected[kind] for i, kind in enumerate(KINDS)}
    assert {tuple(s["routing"]) for s in found["plain"]["samples"]["trained"]} == {tuple(thirds)}

    means = found["hinted"]["psnr_by_kind"]["trained"]
    assert list(means) == ["shadow", "glow"]
    samples = {s["stem"]: s for s in found["hinted"]["samples"]["trained"]}
    for kind, stems in (("shadow", ("0", "2")), ("glow", ("1", "3"))):
        expected_mean = sum(samples[stem]["psnr/inside"] for stem in stems) / 2
        assert means[kind]["inside"] == pytest.approx(expected_mean, abs=1e-3)
    told = capsys.readouterr().out
    base = found["hinted"]["psnr_by_kind"]["base"]["shadow"]["whole"]
    gain = means["shadow"]["whole"] - base
    cell = re.escape(f"{means['shadow']['whole']:.2f} ({gain:+.2f})")
    assert re.search(rf"^shadow +{cell} ", told, re.MULTILINE)
    assert "effect" in told


def test_evaluation_needs_kinds_that_are_there(
    routed_checkpoint: Path, random_flux_fill: Path, triplets: Path, tmp_path: Path
) -> None:
    flags = ["--flux_fill_id", str(random_flux_fill), "--data_dir", str(triplets)]
    flags += ["--output_dir", str(tmp_path), "--kind_experts", "shadow=removal_expert"]
    with pytest.raises(SystemExit):
        evaluate.main(flags)
    with pytest.raises(ValueError, match=r"kinds of the data, \[\]"):
        evaluate.main([*flags, "--checkpoint", str(routed_checkpoint)])
