"""The removal benchmark compares like with like, keeps what is done, and reports it rightly."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import removal
import removal_report
import removal_rows
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from removal_rows import ROWS, Row
from safetensors.torch import load_file

from train import parse_options

pytestmark = pytest.mark.slow

CONFIG = {
    "lora_r": 2,
    "lora_alpha": 2,
    "target_modules": ["attn.to_q", "proj_out"],
    "learning_rate": 0.01,
    "batch_size": 2,
    "max_train_steps": 2,
    "uniform_steps": 1,
    "logging_steps": 1,
    "max_sigma": 1.0,
    "router_learning_rate": 0.001,
}
SMALL = ["--scenes", "2", "--train_scenes", "4", "--size", "32", "--denoising_steps", "1"]


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


def run(out: Path, config: Path, *flags: str) -> int:
    return removal.main(["--out", str(out), "--config", str(config), *SMALL, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """Return the folder of three rows with the losses, of one seed."""
    out: Path = tmp_path_factory.mktemp("removal")
    flags = ("--rows", "plain", "uniform", "routed", "--losses", "--seeds", "0")
    assert run(out, config, *flags) == 0
    return out


def results(out: Path) -> dict[str, Any]:
    files = out.glob("runs/*/result.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def adapter(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / "runs" / name / "checkpoint" / "adapter_model.safetensors")


def test_all_rows_train_the_same_number_of_parameters(finished: Path) -> None:
    found = {name: entry["parameters"] for name, entry in results(finished).items() if "-" in name}
    assert len({numbers["adapter"] for numbers in found.values()}) == 1
    assert found["plain-losses-0"]["router"] == found["uniform-losses-0"]["router"] == 0
    assert found["routed-losses-0"]["router"] > 0
    tensors = adapter(finished, "plain-losses-0")
    assert sum(t.numel() for t in tensors.values()) == found["plain-losses-0"]["adapter"]
    assert all(t.shape[0] == 6 for name, t in tensors.items() if "lora_A" in name)


def test_all_rows_begin_with_the_same_batch_and_noise(finished: Path) -> None:
    first = []
    for name in ("plain", "uniform", "routed"):
        log = finished / "runs" / f"{name}-losses-0" / "logs" / "metrics.jsonl"
        first.append(json.loads(log.read_text().splitlines()[0]))
    assert [entry["step"] for entry in first] == [1, 1, 1]
    losses = [entry["loss/base"] for entry in first]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_every_sample_is_measured_and_kept(finished: Path) -> None:
    found = results(finished)
    assert set(found) == {"base", "plain-losses-0", "uniform-losses-0", "routed-losses-0"}
    for name, entry in found.items():
        assert [sample["stem"] for sample in entry["samples"]] == ["0000", "0001"]
        assert [sample["kind"] for sample in entry["samples"]] == ["blob", "stroke"]
        for sample in entry["samples"]:
            assert sample["size"] in removal_report.SIZES
            assert sample["psnr/whole"] > 5
            assert ("routing" in sample) == name.startswith("routed")
            images = finished / "runs" / name / "evaluation" / "images"
            model = "base" if name == "base" else "trained"
            image = Image.open(images / model / f"{sample['stem']}.png")
            assert image.size == (32, 32)
    assert not list(finished.glob("runs/*/training"))


def test_every_mixture_is_measured_without_each_of_its_experts(finished: Path) -> None:
    found = results(finished)
    assert "specialization" not in found["plain-losses-0"]
    for name in ("uniform-losses-0", "routed-losses-0"):
        entry = found[name]["specialization"]
        assert set(entry["pairs"].values()) == {"boundary", "consistency", "detail"}
        assert {"base", "psnr/inside"} < set(entry["baseline"])
        assert 0 <= entry["score"] <= 1
    by_seed = removal_report.read_runs(finished)[0]
    told = removal_report.table_of_specialization(by_seed)
    routed = found["routed-losses-0"]["specialization"]
    wanted = [*routed["shares"].values(), routed["score"]]
    assert line(told, "mixture routed + losses")[1:] == [f"{share:.2f}" for share in wanted]
    assert "plain" not in told


def test_what_is_finished_is_not_run_again(
    finished: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: Any) -> None:
        raise AssertionError

    for script in (removal.train, removal.evaluate, removal.make_data):
        monkeypatch.setattr(script, "main", forbidden)
    assert run(finished, config, "--rows", "plain", "routed", "--losses", "--seeds", "0") == 0


def test_a_folder_goes_on_with_its_own_settings_only(finished: Path, config: Path) -> None:
    flags = ("--rows", "plain", "--losses", "--seeds", "0")
    with pytest.raises(ValueError, match=r"plain-losses-0 .*\['max_train_steps'"):
        run(finished, config, *flags, "--steps", "4")
    with pytest.raises(ValueError, match=r"\['learning_rate'\] differ"):
        run(finished, config, *flags, "--set", "learning_rate=0.5")
    with pytest.raises(ValueError, match="4 and 3 scenes of 32 pixels, but it holds 4 and 2"):
        run(finished, config, *flags, "--scenes", "3")


def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = removal.train.main

    def stop_early(arguments: list[str]) -> None:
        whole([*arguments, "--max_train_steps", "1"])

    flags = ("--rows", "routed", "--losses", "--seeds", "0")
    with monkeypatch.context() as patch:
        patch.setattr(removal.train, "main", stop_early)
        assert run(tmp_path, config, *flags) == 1
    assert set(results(tmp_path)) == {"base"}
    assert run(tmp_path, config, *flags) == 0
    ours, theirs = (adapter(folder, "routed-losses-0") for folder in (tmp_path, finished))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name])


def test_two_processes_may_write_the_data_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = removal.make_data.main

    def late(arguments: list[str]) -> None:
        write(arguments)
        write(["--output_dir", str(tmp_path / "data"), *arguments[2:]])

    monkeypatch.setattr(removal.make_data, "main", late)
    found = removal.prepare_data(tmp_path / "data", train_scenes=1, scenes=1, size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (found / "complete.json").is_file()


def test_rows_differ_in_nothing_but_what_they_are_about() -> None:
    base = removal_rows.read_base(removal.CONFIG, [], None)
    allowed = {
        *("adapter", "num_experts", "lora_r", "lora_alpha", "routing", "uniform_steps"),
        *("enable_mask_info", "expert_signals", "learning_rate", *removal_rows.OF_A_ROUTER),
        *(f"enable_{name}_loss" for name in removal_rows.SPECIALIZED),
    }
    known = [name for name in ROWS if removal_rows.missing(ROWS[name]) is None]
    runs = removal_rows.variants(known, [False, True])
    assert len(runs) >= 8
    shared = []
    for name, losses in runs:
        entries = removal_rows.options_of(ROWS[name], losses, 7, base)
        assert entries["seed"] == 7
        flags = [w for k, v in entries.items() for w in (f"--{k}", str(v))]
        options = parse_options(["--train_data_dir", "d", *flags])
        assert options.specialized is losses
        assert options.routed is (not ROWS[name].plain and name != "uniform")
        rank = options.lora_r * (1 if ROWS[name].plain else options.num_experts)
        assert rank == 3 * base["lora_r"]
        assert options.learning_rate == base["learning_rate"] * (1 if name == "plain" else 2)
        shared.append({k: v for k, v in vars(options).items() if k not in allowed})
    assert all(entries == shared[0] for entries in shared)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 5.0), ("share", 5.0 / 4), (0.5, 2.5)])
def test_a_plain_lora_has_the_scale_of_an_expert(scale: float | str, expected: float) -> None:
    base = {"lora_r": 2, "lora_alpha": 10, "num_experts": 4}
    entries = removal_rows.options_of(Row("x", plain=True, scale=scale), False, 0, base)
    assert entries["lora_r"] == 8
    assert entries["lora_alpha"] / entries["lora_r"] == pytest.approx(expected)
    assert "num_experts" not in entries
    usual = removal_rows.options_of(Row("x", plain=True), False, 0, {})
    assert usual["lora_r"] == 3 * removal_rows.DEFAULTS["lora_r"]


def test_a_row_learns_at_its_own_multiple_of_the_given_rate(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("max_train_steps: 1\n")
    base = removal_rows.read_base(file, ["learning_rate=1e-3"], None)
    rates = [
        removal_rows.options_of(Row("x", rate=rate), False, 0, base)["learning_rate"]
        for rate in (1.0, 3.0)
    ]
    assert [float(rate) for rate in rates] == pytest.approx([1e-3, 3e-3])
    usual = removal_rows.options_of(Row("x", rate=2.0), False, 0, {})["learning_rate"]
    assert usual == 2 * removal_rows.DEFAULTS["learning_rate"]


def test_phases_keep_their_share_of_the_steps(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("max_train_steps: 1000\nuniform_steps: 700\nlr_warmup_steps: 20\n")
    found = removal_rows.read_base(file, ["learning_rate=0.5", "target_modules=[a, b]"], 100)
    assert (found["max_train_steps"], found["uniform_steps"]) == (100, 70)
    assert (found["lr_warmup_steps"], found["learning_rate"]) == (2, 0.5)
    assert found["target_modules"] == ["a", "b"]
    assert removal_rows.read_base(file, [], None)["uniform_steps"] == 700


def test_bad_requests_are_told(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(removal_rows.ROWS, "other", Row("x", {"router": "nobodys"}))
    monkeypatch.setitem(removal_rows.ROWS, "strange", Row("x", {"no_such_option": 1}))
    assert {"other", "strange", "plain_share"}.isdisjoint(removal_rows.available())
    for flags, told in (
        (["--rows", "other"], "lacks: the router 'nobodys'"),
        (["--rows", "strange"], "lacks: the option `no_such_option`"),
        (["--rows", "plainest"], "`rows` to be among"),
        (["--set", "lora_rank=3"], "OPTION=VALUE"),
        (["--set", "lora_r"], "OPTION=VALUE"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, config, *flags)
        assert told in capsys.readouterr().err
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(SystemExit):
        run(tmp_path, empty)
    assert "--steps" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="finished runs"):
        run(tmp_path, config, "--report")


def test_rows_that_need_the_losses_are_left_out_without() -> None:
    row = Row("x", needs_losses=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(removal_rows.ROWS, "x", row)
        assert removal_rows.variants(["plain", "x"], [False, True]) == [
            ("plain", False),
            ("plain", True),
            ("x", True),
        ]


def made_up(row: str, losses: bool, seed: int, inside: list[float | None]) -> dict[str, Any]:
    kinds, sizes = ("blob", "box", "box"), ("small", "large", "large")
    samples = [
        dict.fromkeys((c.metric for c in removal_report.METRICS), 1.0)
        | {"kind": kind, "size": size, "psnr/inside": value}
        for kind, size, value in zip(kinds, sizes, inside, strict=True)
    ]
    parameters = {"adapter": 6, "router": 2 if row == "routed" else 0}
    return {
        "row": row,
        "losses": losses,
        "seed": seed,
        "samples": samples,
        "parameters": parameters,
    }


def write(out: Path, runs: list[dict[str, Any]]) -> removal_report.Runs:
    for index, entry in enumerate(runs):
        folder = out / "runs" / str(index)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(entry))
    return removal_report.read_runs(out)[0]


def line(text: str, title: str) -> list[str]:
    found = next(t for t in text.splitlines() if t.startswith(f"| {title} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_report_is_right(tmp_path: Path) -> None:
    runs = write(
        tmp_path,
        [
            made_up("routed", False, 1, [24.0, None, 20.0]),
            made_up("routed", False, 0, [22.0, 20.0, 21.0]),
            made_up("plain", False, 0, [20.0, 20.0, 20.0]),
            made_up("plain", False, 1, [21.0, 21.0, None]),
            made_up("plain", True, 0, [30.0, 30.0, 30.0]),
        ],
    )
    assert list(runs) == [("plain", False), ("routed", False), ("plain", True)]
    means = removal_report.table_of_means(runs, None)
    assert line(means, "plain LoRA")[1:4] == ["2", "1.00 ± 0.00", "20.50 ± 0.71"]
    assert line(means, "plain LoRA + losses")[3] == "30.00"
    same = removal_report.table_of_differences(runs, "plain", "same")
    assert line(same, "mixture routed")[2] == "**+1.00** ✓ (+1.00, +1.00)"
    assert line(same, "mixture routed")[1] == "+0.00 (+0.00, +0.00)"
    assert "plain" not in same
    other = removal_report.table_of_differences(runs, "plain", "with")
    assert line(other, "mixture routed")[2] == "-9.00 ✗ (-9.00)"
    assert line(other, "plain LoRA")[2] == "-10.00 ✗ (-10.00)"
    groups = removal_report.table_of_groups(runs, "psnr/inside", 2)
    assert line(groups, "mixture routed") == [
        *("mixture routed", "23.00 ± 1.41", "–", "20.25 ± 0.35"),
        *("23.00 ± 1.41", "–", "20.25 ± 0.35"),
    ]
    told = removal_report.tell_parameters(runs)
    assert told == (
        "Trained parameters of the adapter: 6 in every row. Routers add 2 (mixture routed)."
    )
    runs["plain", True][0]["parameters"]["adapter"] = 7
    assert "not equal in trained parameters: 6 (plain LoRA; mixture routed), 7" in (
        removal_report.tell_parameters(runs)
    )


def test_less_of_a_seam_is_ahead() -> None:
    assert removal_report.tell_difference([-0.5, -0.25], 2, -1).startswith("**-0.38** ✓")
    assert removal_report.tell_difference([0.5, 0.25], 2, -1).startswith("+0.38 ✗")
    assert removal_report.tell_difference([0.5, -0.25], 2, 1) == "+0.12 (+0.50, -0.25)"
    assert removal_report.tell_difference([], 2, 1) == "–"
    assert removal_report.spread([None], 2) == "–"


def test_the_commands_of_the_guide_are_understood() -> None:
    guide = Path(removal.__file__).parents[1] / "docs" / "reference" / "removal_benchmark.md"
    blocks = re.findall(r"^```sh\n(.*?)^```$", guide.read_text(), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(command) for command in "".join(blocks).splitlines()]
    assert len(commands) >= 5
    for words in commands:
        assert words[:2] == ["python", "benchmarks/removal.py"]
        args = removal.build_parser().parse_args(words[2:])
        assert set(args.rows or []) <= set(ROWS)
        removal_rows.read_base(args.config, args.set, args.steps)
    rows = re.findall(r"^\| `(\w+)` \|", guide.read_text(), re.MULTILINE)
    assert rows == list(ROWS)


def test_the_report_and_the_sheet_are_written(
    finished: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(finished, config, "--report") == 0
    text = (finished / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "in every row" in text
    for title in ("base model", "plain LoRA + losses", "mixture routed + losses"):
        assert len(line(text, title)) == 10
    sheet = np.array(Image.open(finished / "contact_sheet.png"))
    rows = len(("source", "mask", "base", "plain", "uniform", "routed", "target"))
    assert sheet.shape[0] == 26 + rows * (64 + 6) + 6
    source = Image.open(finished / "data" / "test" / "src" / "0001.png")
    assert sheet.shape[1] > 2 * (2 * source.width + 6)
