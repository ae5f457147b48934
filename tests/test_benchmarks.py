"""The benchmarks run at their tiniest size, compare like with like, and count memory rightly."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    # They set the number of threads for the whole process.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def module(name: str) -> Any:
    return importlib.import_module(name)


def run(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    file = folder / "figures.json"
    module(name).main(
        [
            "--size",
            "tiny",
            "--rank",
            "2",
            "--rounds",
            "1",
            "--warmup",
            "1",
            "--json",
            str(file),
            *arguments,
        ]
    )
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_model_benchmark_measures_every_variant(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = ["plain", "checkpointing"]
    rows = run("model", tmp_path, "--dtype", dtype, "--modes", *modes)["rows"]
    variants = module("flux_variants")
    trained = [name for name in variants.VARIANTS if name not in variants.INFERENCE_ONLY]
    found = [(row["step"], row["mode"], row["variant"]) for row in rows]
    assert found == [
        *(("training", "plain", name) for name in trained),
        *(("denoising", "plain", name) for name in variants.VARIANTS),
        *(("training", "checkpointing", name) for name in trained),
    ]
    assert all(row["seconds"] > 0 and row["peak"] > 0 for row in rows)
    saved = {(row["mode"], row["variant"]): row["saved"] for row in rows if "saved" in row}
    assert all(saved["checkpointing", name] < saved["plain", name] for name in trained)
    printed = capsys.readouterr().out
    assert printed.count("| variant") == 3
    assert printed.count("| ours soft ") == 3


@pytest.mark.slow
def test_the_other_benchmark_measures_masks_and_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sides", "32", "48", "--mask_batch", "2", "--vae_width", "4"]
    options += ["--pixel_side", "128", "--pixel_rounds", "1", "--margins", "1", "2"]
    figures = run("masks_and_losses", tmp_path, *options)
    assert len(figures["masks"]) == 10
    assert {row["/ Sobel"] for row in figures["masks"] if "Sobel" in row["what"]} == {1.0}
    rows = {row["loss"]: row for row in figures["losses"]}
    assert rows["base"]["share"] == 0
    assert rows["all"]["saved"] > rows["base and detail"]["saved"] > rows["base"]["saved"]
    assert rows["all, decoder checkpointed"]["peak"] < rows["all"]["peak"]
    assert "| all, decoder checkpointed " in capsys.readouterr().out
    rows = {row["decoding"]: row for row in figures["windows"]}
    small, large = rows["window, margin 1"], rows["window, margin 2"]
    assert small["peak"] < large["peak"] < 0.8 * rows["whole"]["peak"]
    assert rows["window, margin 2, checkpointed"]["saved"] < 0.5 * large["saved"]
    assert all(row["cosine"] > 0.99 and row["off by"] < 1e-5 for row in (small, large))


def test_what_is_compared_has_equal_parameters_and_one_base() -> None:
    variants = module("flux_variants")
    size = variants.SIZES["tiny"]
    base = variants.build(size, "cpu", torch.float32)
    inputs = variants.make_inputs(size, "cpu", torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    counts = {}
    for name in ("PEFT LoRA", "3 PEFT adapters", "ours uniform"):
        model = variants.VARIANTS[name](base, 2)
        weight = model.transformer_blocks[0].attn.to_q.base_layer.weight
        assert weight is base.transformer_blocks[0].attn.to_q.weight
        step = variants.Training(model, inputs)
        step()
        counts[name] = step.parameters
    assert len(set(counts.values())) == 1
    variants.VARIANTS["ours merged"](base, 2)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_the_three_stock_adapters_all_train() -> None:
    variants = module("flux_variants")
    size = variants.SIZES["tiny"]
    model = variants.peft_adapters(variants.build(size, "cpu", torch.float32), 2)
    step = variants.Training(model, variants.make_inputs(size, "cpu", torch.float32))
    step()
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.scaling == {f"expert_{index}": pytest.approx(1 / 3) for index in range(3)}
    assert all(B.weight.abs().max() > 0 for B in layer.lora_B.values())


def test_the_masks_reach_the_router() -> None:
    variants, moe_lora = module("flux_variants"), module("moe_lora")
    size = variants.SIZES["tiny"]
    model = variants.VARIANTS["ours top-1"](variants.build(size, "cpu", torch.float32), 2)
    model(**variants.make_inputs(size, "cpu", torch.float32))
    weights = moe_lora.current_routing(model).weights
    assert weights.shape == (size.batch, 3)
    assert ((weights == 0).sum(-1) == 2).all()


def test_saved_bytes_leave_out_what_is_there_anyway() -> None:
    measuring = module("measuring")
    layer = nn.Linear(8, 8)
    x = torch.randn(5, 8, requires_grad=True)

    def step() -> Tensor:
        return layer(x).tanh()  # saves its result, 5 x 8 floats, and x and the weight

    assert measuring.saved_bytes(step, [*layer.parameters(), x]) == 5 * 8 * 4
    assert measuring.saved_bytes(step) == (5 * 8 + 5 * 8 + 8 * 8) * 4


def test_peak_bytes_count_what_lives_at_once() -> None:
    measuring = module("measuring")
    x = torch.ones(1000)

    def step() -> None:
        y = x + 1
        z = y + 1
        del y
        _ = z + 1  # two at once, three in all

    assert measuring.peak_bytes(step) == pytest.approx(2 * 4000, abs=64)  # and the scalars


def test_ratios_are_taken_within_a_round() -> None:
    times = module("measuring").Times(["a", "b"])
    times.rounds = {"a": [2.0, 20.0, 3.0], "b": [1.0, 10.0, 3.0]}
    assert times.seconds("a") == 3.0
    assert times.ratio("a", "b") == 2.0


def test_every_variant_is_measured_in_every_round() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = module("measuring").interleaved(steps, 4, warmup=1)
    assert {name: len(found) for name, found in times.rounds.items()} == dict.fromkeys("abc", 4)
    assert all(sorted(calls[start : start + 3]) == list("abc") for start in range(0, 15, 3))


def test_the_overhead_benchmark_measures_every_way_to_route(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = ["--layers", "3", "--block", "2", "--width", "4", "--rounds", "1"]
    module("overhead").main([*options, "--json", str(file)])
    figures = json.loads(file.read_text(encoding="utf-8"))
    kinds, names = (
        ("inference", "training", "checkpointed"),
        ("PEFT LoRA", *module("overhead").ROUTINGS),
    )
    assert set(figures) == {f"{kind}, {name}" for kind in kinds for name in names}
    assert all(row["seconds"] > 0 for row in figures.values())


def against(folder: Path, *arguments: str) -> dict[str, Any]:
    file = folder / "compared.json"
    module("against").main(["--json", str(file), "--processes", "1", *arguments])
    return {row["variant"]: row for row in json.loads(file.read_text(encoding="utf-8"))}


@pytest.mark.slow
def test_a_checkout_is_compared_with_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--base", str(FOLDER.parent), "--rounds", "3", "--repeat", "0", "--only", "PEFT"]
    sizes = ["--layers", "2", "--width", "4"]
    found = against(tmp_path, *options, "overhead.py", *sizes)
    assert set(found) == {f"1: {k}, PEFT LoRA" for k in ("inference", "training", "checkpointed")}
    for row in found.values():
        low, high = row["95 %"]
        assert 0 < low <= row["ratio"] <= high
        assert row["rounds"] == 3
        assert row["base ms"] > 0
    assert capfd.readouterr().out.count("PEFT LoRA") == 3  # the benchmark's own table is not shown


def checkout(folder: Path, seconds: float) -> str:
    """Make a checkout whose only benchmark takes so long, as its library says."""
    (folder / "src" / "moe_lora").mkdir(parents=True)
    (folder / "src" / "moe_lora" / "__init__.py").write_text(f"SECONDS = {seconds}\n")
    (folder / "benchmarks").mkdir()
    shutil.copy(FOLDER / "measuring.py", folder / "benchmarks")
    (folder / "benchmarks" / "busy.py").write_text(
        """
import time
from measuring import interleaved
from moe_lora import SECONDS

def step():
    end = time.process_time() + SECONDS
    while time.process_time() < end:
        pass

interleaved({"busy": step}, 1)
interleaved({"busy": step, "other": step}, 1)
"""
    )
    return str(folder)


@pytest.mark.slow
def test_each_checkout_runs_its_own_code(tmp_path: Path) -> None:
    base, now = checkout(tmp_path / "base", 0.001), checkout(tmp_path / "now", 0.02)
    options = ["--base", base, "--now", now, "--rounds", "3", "--repeat", "0", "--only", "busy"]
    found = against(tmp_path, *options, "busy.py")
    assert list(found) == ["1: busy", "2: busy"]
    assert all(row["ratio"] > 5 for row in found.values())


def test_checkouts_take_turns_in_an_order_that_cancels_drift() -> None:
    turns: list[str] = []

    class Told:
        def __init__(self, name: str) -> None:
            self.name, self.answers = name, iter([["step"], None])

        def read(self) -> Any:
            return next(self.answers)

        def tell(self, name: str | None) -> None:
            assert name is None

        def seconds(self, name: str) -> float:
            turns.append(self.name)
            return {"base": 2.0, "now": 3.0}[self.name]

    found: dict[str, Any] = {}
    module("against").compare(Told("base"), Told("now"), "", 4, found)
    assert turns == ["base", "now", "now", "base"] * 2
    assert found == {"1: step": [(2.0, 3.0)] * 4}


def test_a_median_lies_in_its_interval() -> None:
    interval = module("against").median_interval
    assert interval([float(value) for value in range(100, 0, -1)]) == (40.0, 61.0)
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_ratios_of_checkouts_are_medians_beside_that_of_the_fastest_rounds() -> None:
    (row,) = module("against").rows({"step": [(1.0, 2.0), (2.0, 2.0), (4.0, 2.0)]})
    assert row["ratio"] == 1.0
    assert row["fastest"] == 2.0
    assert row["95 %"] == (0.5, 2.0)
    assert (row["base ms"], row["now ms"]) == (2000.0, 2000.0)


def test_imports_are_compared_with_those_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_time = module("import_time")
    monkeypatch.setattr(import_time, "STATEMENTS", dict.fromkeys(import_time.STATEMENTS, "pass"))
    seen: list[Path | None] = []

    def seconds(statement: str, checkout: Path | None = None) -> float:
        seen.append(checkout)
        return 1.0 if checkout == tmp_path else 2.0

    monkeypatch.setattr(import_time, "seconds", seconds)
    import_time.main(["--rounds", "1", "--base", str(tmp_path)])
    assert seen.count(tmp_path) == seen.count(FOLDER.parent) == 2
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "2.000"
