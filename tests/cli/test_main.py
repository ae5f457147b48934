from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.cli import main
from moe_lora.export import export_lora


@pytest.fixture
def model(make_flux, flux_targets):
    config = MoELoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=flux_targets,
        rank_pattern={"to_q": 2},
        router="three_expert_removal",
        init_lora_weights=False,
    )
    return get_peft_model(make_flux(), config).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@torch.no_grad()
def mixed(model, inputs, weights):
    with moe_lora.route(model, torch.tensor(weights)):
        return model(**inputs)[0]


class TestInspect:
    def test_a_mixture(self, checkpoint, capsys):
        assert main(["inspect", checkpoint]) == 0
        out = capsys.readouterr().out
        assert "mixture of 3 experts in 14 layers (rank 4 in 12, rank 2 in 2)" in out
        assert "router: three_expert_removal (soft, temperature 1), " in out
        assert "base: class FluxTransformer2DModel, in_channels 384" in out
        rows = out.splitlines()
        assert rows[5].split()[-4:] == [
            "rank",
            "removal_expert",
            "background_expert",
            "completion_expert",
        ]
        assert len(rows) == 6 + 14 + 1

    def test_json(self, checkpoint, capsys):
        assert main(["inspect", checkpoint, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["kind"] == "mixture"
        assert set(found["norms"]) == set(found["experts"])

    def test_a_plain_lora(self, model, tmp_path, capsys):
        report = export_lora(model, tmp_path, "removal_expert")
        assert main(["inspect", str(report.path)]) == 0
        out = capsys.readouterr().out
        assert "plain LoRA in 14 layers (rank 4 in 12, rank 2 in 2), diffusers layout" in out
        assert '"removal_expert": 1.0' in out
        assert "in_channels 384" in out


class TestExport:
    @pytest.mark.parametrize(
        ("words", "weights"),
        [
            (["--weights", "0.5,0.3,0.2"], [0.5, 0.3, 0.2]),
            (["--weights=-0.5,1.5,0"], [-0.5, 1.5, 0.0]),
            (["--weights", "background_expert"], [0.0, 1.0, 0.0]),
            (["--weights", "uniform"], [1 / 3] * 3),
        ],
    )
    def test_stock_peft_gives_the_mixture(
        self, model, checkpoint, make_flux, make_flux_inputs, tmp_path, words, weights
    ):
        out = str(tmp_path / "out")
        assert main(["export", checkpoint, out, "--format", "peft", *words]) == 0
        loaded = PeftModel.from_pretrained(make_flux(), out).eval()
        inputs = make_flux_inputs()
        with torch.no_grad():
            got = loaded(**inputs)[0]
        torch.testing.assert_close(got, mixed(model, inputs, weights), rtol=1e-5, atol=1e-5)

    def test_it_writes_what_the_model_writes(self, model, checkpoint, tmp_path):
        words = ["export", checkpoint, str(tmp_path / "a"), "--weights", "0.5,0.3,0.2"]
        assert main([*words, "--dtype", "bfloat16"]) == 0
        export_lora(model, tmp_path / "b", [0.5, 0.3, 0.2], dtype=torch.bfloat16)
        a, b = (load_file(tmp_path / x / "pytorch_lora_weights.safetensors") for x in "ab")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)

    def test_compression_is_told(self, checkpoint, tmp_path, capsys):
        words = ["export", checkpoint, str(tmp_path / "a"), "--weights", "uniform", "--rank", "2"]
        assert main(words) == 0
        assert "layers of rank 2 in the diffusers layout" in capsys.readouterr().out
        assert main([*words, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert 0 < report["relative_error"] < 1
        assert report["path"].endswith("pytorch_lora_weights.safetensors")
        assert set(report["ranks"].values()) == {2}


class TestMerge:
    def test_the_merged_model_gives_the_mixture(
        self, model, checkpoint, make_flux, make_flux_inputs, tmp_path, capsys
    ):
        make_flux().save_pretrained(tmp_path / "base")
        out = str(tmp_path / "out")
        words = ["merge", checkpoint, str(tmp_path / "base"), out, "--weights", "0.5,0.3,0.2"]
        assert main([*words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["layers"], len(told["files"])) == (14, 1)
        merged = FluxTransformer2DModel.from_pretrained(out).eval()
        inputs = make_flux_inputs()
        with torch.no_grad():
            got = merged(**inputs)[0]
        torch.testing.assert_close(got, mixed(model, inputs, [0.5, 0.3, 0.2]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
class TestExitCodes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["inspect", "nowhere"], "nowhere"),
            (["export", "nowhere", "out"], "nowhere"),
            (["export", "CHECKPOINT", "out"], "computes them from the input"),
            (["export", "CHECKPOINT", "out", "--weights", "mean"], "no routing statistics"),
            (["export", "CHECKPOINT", "out", "--weights", "0.5,0.5"], "shape (E=3,)"),
            (["export", "CHECKPOINT", "out", "--weights", "uniform", "--rank", "0"], "`rank`"),
            (
                ["export", "CHECKPOINT", "out", "--weights", "uniform", "--format", "kohya"],
                "silently drop",
            ),
            (["merge", "CHECKPOINT", "nowhere", "out", "--weights", "uniform"], "nowhere"),
        ],
    )
    def test_what_is_wrong_with_the_files_is_one_line(
        self, checkpoint, tmp_path, monkeypatch, capsys, words, message
    ):
        monkeypatch.chdir(tmp_path)
        assert main([checkpoint if word == "CHECKPOINT" else word for word in words]) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("moe-lora: Expected ")
        assert message in told.err
        assert told.err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "words", [[], ["frobnicate"], ["export", "a"], ["export", "a", "b", "--format", "x"]]
    )
    def test_a_wrong_command_line(self, words, capsys):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert "usage: moe-lora" in capsys.readouterr().err

    def test_as_a_process(self, tmp_path):
        code = "import sys; from moe_lora.cli import main; sys.exit(main())"
        (tmp_path / "adapter_config.json").write_text("{")
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("moe-lora: Expected JSON in ")


@pytest.mark.parametrize("command", [["inspect"], ["export", "--weights", "uniform"]])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"expert_names": ["a", "../b", "c"]}, "`expert_names` to be the name of a folder"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` to be a finite number, but got nan"),
        ({"num_experts": 10**9}, "`num_experts` to be an integer in"),
        ({"router_kwargs": [1]}, "`router_kwargs` to be a dict"),
    ],
)
def test_a_config_that_cannot_be_is_told_in_a_sentence(
    checkpoint, tmp_path, capsys, command, entries, message
):
    file = Path(checkpoint) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    out = [str(tmp_path / "out")] if command[0] == "export" else []
    assert main([command[0], checkpoint, *out, *command[1:]]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
