"""Ways in which a checkpoint can be corrupt, with what is said about each.

Every reader of checkpoints is tested with all of them: loading, inspecting and exporting.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import moe_lora
from moe_lora import MoELoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.second.moe_lora_experts"


@moe_lora.register_router("faults")
class Scores(moe_lora.Router):
    def __init__(self, start: float = 0.0, hidden_dim: int = 1):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.full((hidden_dim, 3), start))

    def logits(self, inputs):
        return self.scores.sum(0).expand(inputs.batch_size, -1)


def config(**kwargs) -> MoELoraConfig:
    defaults = {
        "r": 3,
        "target_modules": ["first", "second"],
        "modules_to_save": ["head"],
        "router": "faults",
        "router_kwargs": {"start": 0.5},
        "init_lora_weights": False,
    }
    return MoELoraConfig(**{**defaults, **kwargs})


def edit_config(folder: Path, **entries):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def edit_weights(folder: Path, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(folder: Path, name: str, keep: float):
    file = folder / name
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def forget_config(folder: Path):
    """Leave the weights without a config, beside them and in their header."""
    edit_weights(folder, lambda tensors: None)
    (folder / CONFIG).unlink()


def to_diffusers_file(folder: Path):
    forget_config(folder)
    (folder / WEIGHTS).rename(folder / "pytorch_lora_weights.safetensors")


def to_plain_weights(folder: Path):
    names = ("base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight")
    save_file({name: torch.rand(2, 2) for name in names}, folder / WEIGHTS)


def corrupt(folder: Path):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[0:8] = b"\xff" * 8
    (folder / WEIGHTS).write_bytes(bytes(content))


def drop(*endings):
    return lambda t: [t.pop(n) for n in list(t) if n.endswith(endings)]


def cut(name, *index):
    return lambda t: t.update({name: t[name][index].contiguous()})


S = slice
INTEGERS = torch.ones(3, 3, 10, dtype=torch.int32)
FAULTS = {
    "no folder": (shutil.rmtree, "Expected a checkpoint's folder"),
    "no config": (forget_config, "Expected 'adapter_config.json' beside"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "Expected 'adapter_model.safetensors' in"),
    "pickled weights": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "is a pickle, which is never loaded",
    ),
    "diffusers file": (to_diffusers_file, "or pass `config`; load a plain LoRA"),
    "truncated config": (lambda f: truncate(f, CONFIG, 0.5), "Expected JSON in"),
    "empty config": (lambda f: truncate(f, CONFIG, 0), "Expected JSON in"),
    "config is no object": (lambda f: (f / CONFIG).write_text("[1]"), "Expected a JSON object in"),
    "foreign config": (lambda f: edit_config(f, peft_type="LORA"), "`peft_type` is 'LORA'"),
    "unknown method": (lambda f: edit_config(f, peft_type="WHAT"), "`peft_type` is 'WHAT'"),
    "impossible value": (lambda f: edit_config(f, lora_dropout=2), "`lora_dropout` to be a number"),
    "wrong type": (lambda f: edit_config(f, r="8"), "`r` to be an integer in"),
    "newer version": (
        lambda f: edit_config(f, format_version=2, news="x"),
        "written by a newer moe_lora. Upgrade",
    ),
    "unknown router": (lambda f: edit_config(f, router="nobody"), "register_router"),
    "router of other arguments": (
        lambda f: edit_config(f, router_kwargs={"depth": 3}),
        "Expected `router_kwargs` to be arguments of Scores",
    ),
    "router of impossible widths": (
        lambda f: edit_config(f, router_kwargs={"hidden_dim": "wide"}),
        "Expected `router_kwargs` to be valid arguments of Scores",
    ),
    "router of negative widths": (
        lambda f: edit_config(f, router_kwargs={"hidden_dim": -1}),
        "Expected `router_kwargs` to be valid arguments of Scores",
    ),
    "router of other widths": (
        lambda f: edit_config(f, router_kwargs={"hidden_dim": 2}),
        r"scores' has the shape \(1, 3\) where \(2, 3\) is needed",
    ),
    "router not asked for": (
        lambda f: edit_config(f, router=None, router_kwargs={}),
        "router parameters that the config's router does not have",
    ),
    "truncated weights": (lambda f: truncate(f, WEIGHTS, 0.9), "whole safetensors file"),
    "corrupt weights": (corrupt, "whole safetensors file"),
    "empty weights": (lambda f: truncate(f, WEIGHTS, 0), "whole safetensors file"),
    "plain LoRA weights": (to_plain_weights, "those of a plain LoRA"),
    "wrong rank": (lambda f: edit_config(f, r=4), "rank, experts or router"),
    "wrong rank in one layer": (
        lambda f: edit_weights(f, cut(f"{LAYER}.lora_A", S(None), S(0, 2))),
        r"second.*\(3, 2, 10\) where \(3, 3, 10\) is needed",
    ),
    "wrong experts": (
        lambda f: edit_config(f, expert_names=["a", "b"], num_experts=2, router=None),
        "does not have|rank, experts or router",
    ),
    "missing key": (
        lambda f: edit_weights(f, drop("second.moe_lora_experts.lora_B")),
        "tensors are missing",
    ),
    "missing layer": (lambda f: edit_weights(f, drop("lora_A", "lora_B")), "none of this method"),
    "missing router": (lambda f: edit_weights(f, drop("scores")), "scores.*it is incomplete"),
    "missing head": (lambda f: edit_weights(f, drop("head.bias")), "head.bias.*incomplete"),
    "unexpected key": (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.head.x": torch.ones(1)})),
        "tensors that do not belong to the config",
    ),
    "unexpected key beside the experts": (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.second.x": torch.ones(1)})),
        "tensors that do not belong to the config",
    ),
    "missing whole module": (
        lambda f: edit_weights(f, drop("head.weight", "head.bias")),
        "head.*incomplete",
    ),
    "experts of too few dimensions": (
        lambda f: edit_weights(f, cut(f"{LAYER}.lora_A", S(None), S(None), 0)),
        r"second.*has the shape \(3, 3\) where",
    ),
    "other up factor": (
        lambda f: edit_weights(f, cut(f"{LAYER}.lora_B", S(None), S(0, 2))),
        r"second.*\(6, 2, 3\) where \(6, 3, 3\) is needed",
    ),
    "integer experts": (
        lambda f: edit_weights(
            f, lambda t: t.update({f"{LAYER}.lora_A": torch.ones(3, 3, 10).int()})
        ),
        "Expected floating-point experts in",
    ),
    "config of other weights": (
        lambda f: edit_config(f, lora_alpha=5),
        "Expected .* with the config that the weights were saved with, but its `lora_alpha` is",
    ),
    "NaN": (
        lambda f: edit_weights(f, lambda t: t[f"{LAYER}.lora_B"].view(-1)[:1].fill_(float("nan"))),
        "1 of 7 tensors have NaN or inf, such as .*second.*Use an earlier",
    ),
}
