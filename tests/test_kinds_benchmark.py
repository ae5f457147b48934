"""The benchmark of several kinds of removal: it runs, and its page has the numbers of its file."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import kinds_report
import numpy as np
import pytest
import removal_kinds
import torch
from diffusers import FluxFillPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from kinds_scenes import Scenes, kept
from kinds_training import Judge, accuracy, fit_router, measure, prompts, psnr_by_kind
from PIL import Image
from reference_tables import written_into

import kind_scenes
from moe_lora.routing import SurroundingsRouter
from options.train_options import BUNDLED_MODEL

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kinds.json"
PAGE = ROOT / "docs" / "reference" / "kinds_benchmark.md"
KINDS = removal_kinds.build_parser().get_default("kinds")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(BUNDLED_MODEL, steps=2)


@pytest.fixture(scope="module")
def scenes(judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    path = tmp_path_factory.mktemp("scenes") / "test.safetensors"
    flags = ["--count", "6", "--split", "test", "--kinds", *KINDS]
    drawn = kept(path, judge.pipe.vae, flags)
    again = kept(path, judge.pipe.vae, ["--no_such_flag"])
    for name, value in vars(drawn).items():
        assert torch.equal(value, getattr(again, name))
    return drawn


@pytest.mark.slow
def test_images_are_those_of_the_stock_pipeline(
    judge: Judge, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The stock pipeline samples the latents of the masked image; their noise is left out.
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    pipe: FluxFillPipeline = judge.pipe
    ours = judge.images(pipe.transformer, scenes)
    text, pooled = prompts(scenes.kind, told=False)
    theirs = pipe(
        image=scenes.source / 255,
        mask_image=scenes.mask.float(),
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        height=128,
        width=128,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(i) for i in range(6)],
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_router_learns_the_scenes_that_it_is_shown(scenes: Scenes) -> None:
    torch.manual_seed(0)
    router = SurroundingsRouter(3, 128, channels=[64, 128], patch_size=2, dropout=0.0)
    fit_router(router, scenes, steps=150, seed=0)
    assert accuracy(router, scenes) == 1
    assert accuracy(router, scenes.of_kinds([0])) == 1


@pytest.mark.slow
def test_a_small_run_goes_on_and_has_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(removal_kinds, "MERGES", ("linear", "ties"))
    sizes: dict[str, object] = {
        "steps": 1,
        "r": 2,
        "train_scenes": 60,
        "scenes": 6,
        "router_steps": 2,
    }
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    noise = np.random.default_rng(0).integers(60, 255, (2, 140, 160, 3), np.uint8)
    for index, image in enumerate(noise):
        Image.fromarray(image).save(photographs / f"{index}.png")
    sizes |= {"router_scenes": 6, "router_photographs": photographs}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    flags += ["--denoising_steps=1", f"--out={tmp_path}", "--seeds"]
    assert removal_kinds.main([*flags, "1"]) == 0
    rows = sorted((tmp_path / "seed-1" / "rows").iterdir())
    written = {path: path.stat().st_mtime_ns for path in rows}
    rows[0].unlink()
    assert removal_kinds.main([*flags, "1"]) == 0
    again = {path: path.stat().st_mtime_ns for path in rows}
    assert [path for path in rows if again[path] != written[path]] == rows[:1]

    # With the expert named, the mixture is the LoRA of the kind.
    found = kinds_report.collect(tmp_path)
    for kind in KINDS:
        alone = kinds_report.values(found, f"LoRA for {kind}", "test", "effect", kind)
        hinted = kinds_report.values(found, "composed, hinted", "test", "effect", kind)
        assert hinted["1"] == pytest.approx(alone["1"], abs=0.002)
    capsys.readouterr()
    tables = kinds_report.tables(found)
    assert "| best merge | " in tables["regions"]
    merges = [
        found["rows"][f"merge {how}, {w}"] for how in ("linear", "ties") for w in ("0.33", "0.60")
    ]
    best = max(merge["1"]["psnr"]["test"]["mean"]["effect"] for merge in merges)
    assert kinds_report.values(found, "best merge", "test", "effect") == {"1": best}


def test_the_kinds_of_masks_are_those_that_scenes_are_labeled_with() -> None:
    assert removal_kinds.MASK_KINDS == kind_scenes.MASK_KINDS


def test_the_worst_kind_and_region_decides() -> None:
    def row(shadow: float, glow: float) -> dict[str, Any]:
        regions = {"effect": shadow, "inside": 20.0, "outside": 30.0}
        means = {"shadow": regions, "glow": {**regions, "inside": glow}}
        return {"1": {"psnr": {"test": {**means, "mean": regions}}}}

    results = {"rows": {"base": row(16, 20), "a": row(18, 19.5), "b": row(17, 20)}}
    assert kinds_report.worst_difference(results, "a", "b") == [-0.5]
    assert kinds_report.difference(results, "a", "b") == [1]


def test_the_effect_of_a_kind_without_effects_is_outside(judge: Judge, scenes: Scenes) -> None:
    images = judge.images(judge.transformer(), scenes)
    before = psnr_by_kind(images, scenes, KINDS)
    assert before["shadow"]["effect"] != before["shadow"]["outside"]
    scenes = replace(scenes, source=scenes.result)
    for regions in psnr_by_kind(images, scenes, KINDS).values():
        assert regions["effect"] == regions["outside"]


def test_the_page_has_the_numbers_of_the_file() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    five = json.loads(RESULTS.with_name("five_kinds.json").read_text(encoding="utf-8"))
    masks = json.loads(RESULTS.with_name("kinds_of_masks.json").read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    tables = {**kinds_report.tables(results), **kinds_report.five_tables(five)}
    assert written_into(text, {**tables, **kinds_report.mask_tables(masks)}) == text
    seeds = {seed for row in results["rows"].values() for seed in row}
    assert len(seeds) >= 1
    for name in (*results["versions"].values(), results["date"]):
        assert name in text


def test_means_are_over_samples_and_then_kinds() -> None:
    target = torch.full((3, 3, 8, 8), 128.0)
    mask = torch.zeros(3, 1, 8, 8)
    mask[..., :4] = 1
    source = target - 64 * (1 - mask) * (torch.arange(8) < 6)
    errors = torch.tensor([0.1, 0.01, 0.1]).view(-1, 1, 1, 1)
    latents = torch.zeros(3, 1, 1)
    scenes = Scenes(source, mask, target, latents, latents, torch.tensor([0, 0, 1]))
    found = measure(target / 255 + errors, scenes, ("a", "b"))
    assert found["a"]["inside"] == pytest.approx(30, abs=0.01)
    assert found["b"]["whole"] == pytest.approx(20, abs=0.01)
    assert found["mean"]["outside"] == pytest.approx(25, abs=0.01)


def test_the_readme_has_the_numbers_of_the_file() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = (kinds_report.HINTED, kinds_report.TOP_1, kinds_report.MERGE, kinds_report.PLAIN)
    means = [
        statistics.fmean(kinds_report.values(results, row, "test", "effect").values())
        for row in (*rows, kinds_report.TOLD)
    ]
    for page in ("README.md", "docs/explanation/mixture_or_lora.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        told = re.findall(r"(\d+\.\d) dB", text[text.index("contradict each other") :])[:5]
        assert told == [f"{mean:.1f}" for mean in means], page
