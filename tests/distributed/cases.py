"""Models, inputs and wrappers of the runs over several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import moe_lora
from moe_lora import MoELoraConfig, Router


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """A transformer without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(8), Block(8)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@moe_lora.register_router("tokens_of_the_worker")
class TokenRouter(Router):
    """Route every token by itself, never to the last two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def logits(self, inputs: moe_lora.RouterInputs) -> Tensor:
        known = self.head(inputs.hidden_states)
        return torch.cat([known, known[..., 2:] * 0 - 100], dim=-1)


class Case:
    """Hold what both trainings start from.

    Args:
        folder: a tiny Flux Fill transformer and its inputs, for two processes to share.
        kind: "flux" or "net".
    """

    def __init__(self, folder: Path, kind: str, **config: Any) -> None:
        self.folder, self.kind = folder, kind
        self.config = {"r": 2, "init_lora_weights": False, **config}
        if kind == "flux":
            self.inputs = load_file(folder / "inputs.safetensors")
            self.config.setdefault("router", "three_expert_removal")
            names = (folder / "targets.json").read_text()
            self.config.setdefault("target_modules", json.loads(names))
        else:
            self.inputs = {"hidden_states": torch.randn(4, 6, 8)}
            self.config.setdefault("router", "tokens_of_the_worker")
            self.config.setdefault("num_experts", 6)
            self.config.setdefault("target_modules", ["up", "down"])

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        if self.kind == "net":
            return Net()
        from diffusers import FluxTransformer2DModel

        model: nn.Module = FluxTransformer2DModel.from_pretrained(self.folder / "flux")
        return model

    def model(self) -> PeftModel:
        base = self.base()
        torch.manual_seed(1)
        # Without dropout, so that the processes draw nothing at random.
        return get_peft_model(base, MoELoraConfig(**self.config)).eval()

    def share(self) -> dict[str, Tensor]:
        """Return this process's part of the batch."""
        world, rank = dist.get_world_size(), dist.get_rank()
        parts = {}
        for name, value in self.inputs.items():
            whole = name.endswith("_ids")
            parts[name] = value if whole else value.chunk(world)[rank]
        return parts


def ddp(model: PeftModel) -> nn.Module:
    # Phases that ask no router leave its parameters unused.
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model: PeftModel, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh}
    if policy is not None:
        for module in model.modules():
            if isinstance(module, Router):
                fully_shard(module, **options)
        options["mp_policy"] = policy
    for name, module in model.get_base_model().named_children():
        if name.endswith("blocks"):
            assert isinstance(module, nn.ModuleList)
            for block in module:
                fully_shard(block, **options)
    fully_shard(model, **options)
    return model
