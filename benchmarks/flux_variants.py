"""Flux Fill transformers of several sizes, adapted in several ways, and their training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from measuring import saved_bytes, tensors_of
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig

EXPERTS = 3
MASK_CHANNELS = 256
TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"),
]


@dataclass(frozen=True)
class Size:
    """Describe a Flux Fill transformer and the tokens that it is called with."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    joint_dim: int
    pooled_dim: int
    grid: int
    text: int
    batch: int


SIZES = {
    "tiny": Size(1, 1, 2, 16, 16, 16, grid=4, text=4, batch=2),
    "small": Size(2, 4, 8, 64, 512, 128, grid=16, text=64, batch=2),
    "middle": Size(2, 4, 8, 128, 1024, 256, grid=24, text=128, batch=1),
    "flux-quarter": Size(5, 10, 24, 128, 4096, 768, grid=64, text=512, batch=1),
    "flux-half": Size(10, 19, 24, 128, 4096, 768, grid=64, text=512, batch=1),
    "flux": Size(19, 38, 24, 128, 4096, 768, grid=64, text=512, batch=1),
}


@contextmanager
def creating(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Create parameters where and as they shall be, without a copy elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(size: Size, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    rotary = size.head_dim // 8
    with creating(device, dtype):
        model = FluxTransformer2DModel(
            in_channels=384,
            out_channels=64,
            num_layers=size.double_blocks,
            num_single_layers=size.single_blocks,
            attention_head_dim=size.head_dim,
            num_attention_heads=size.heads,
            joint_attention_dim=size.joint_dim,
            pooled_projection_dim=size.pooled_dim,
            axes_dims_rope=(size.head_dim - 6 * rotary, 3 * rotary, 3 * rotary),
            guidance_embeds=True,
        )
    return model.requires_grad_(False)


def make_inputs(size: Size, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    tokens, batch = size.grid**2, size.batch
    hidden = torch.randn(batch, tokens, 384)
    # Masks of different areas: the first rows of the picture.
    for index in range(batch):
        masked = tokens * (index + 1) // (batch + 2)
        hidden[index, :, -MASK_CHANNELS:] = 0
        hidden[index, :masked, -MASK_CHANNELS:] = 1
    ids = torch.zeros(size.grid, size.grid, 3)
    ids[..., 1] += torch.arange(size.grid)[:, None]
    ids[..., 2] += torch.arange(size.grid)
    inputs = {
        "hidden_states": hidden,
        "encoder_hidden_states": torch.randn(batch, size.text, size.joint_dim),
        "pooled_projections": torch.randn(batch, size.pooled_dim),
        "timestep": torch.linspace(0.3, 0.8, batch),
        "guidance": torch.full((batch,), 30.0),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(size.text, 3),
    }
    return {name: value.to(device, dtype) for name, value in inputs.items()}


def sharing(base: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Copy the modules of a model, but not its weights."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors_of(base)})


def peft_lora(base: FluxTransformer2DModel, rank: int) -> FluxTransformer2DModel:
    model = sharing(base)
    config = LoraConfig(r=EXPERTS * rank, lora_alpha=EXPERTS * rank, target_modules=TARGETS)
    get_peft_model(model, config, autocast_adapter_dtype=False)
    return model


def peft_adapters(base: FluxTransformer2DModel, rank: int) -> FluxTransformer2DModel:
    model = sharing(base)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    names = [f"expert_{index}" for index in range(EXPERTS)]
    adapted = get_peft_model(model, config, names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        adapted.add_adapter(name, config, autocast_adapter_dtype=False)
    adapted.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in names:
                module.set_scale(name, 1 / EXPERTS)
    return model


def mixture(base: FluxTransformer2DModel, rank: int, /, **routing: Any) -> FluxTransformer2DModel:
    model = sharing(base)
    config = MoELoraConfig(
        r=rank, lora_alpha=rank, num_experts=EXPERTS, target_modules=TARGETS, **routing
    )
    get_peft_model(model, config, autocast_adapter_dtype=False)
    return model


def merged(base: FluxTransformer2DModel, rank: int) -> FluxTransformer2DModel:
    model = mixture(copy.deepcopy(base), rank)
    moe_lora.merge(model, weights=[0.5, 0.3, 0.2])
    return model


REFERENCE, BARE = "PEFT LoRA", "bare"
ROUTED = {"router": "three_expert_removal"}
VARIANTS: dict[str, Callable[[FluxTransformer2DModel, int], FluxTransformer2DModel]] = {
    BARE: lambda base, rank: base,
    REFERENCE: peft_lora,
    "3 PEFT adapters": peft_adapters,
    "ours uniform": mixture,
    "ours soft": partial(mixture, **ROUTED),
    "ours top-1": partial(mixture, **ROUTED, routing_strategy="topk", top_k=1),
    "ours top-2": partial(mixture, **ROUTED, routing_strategy="topk", top_k=2),
    "ours merged": merged,
}
INFERENCE_ONLY = {BARE, "ours merged"}


class Training:
    """Run training steps of the adapter in a model: forward, loss, backward, AdamW."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model, self.inputs = model.train(), inputs
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        self.target = torch.randn_like(inputs["hidden_states"][..., :64])
        self.beside = [*tensors_of(model), *inputs.values(), self.target]

    def forward(self) -> Tensor:
        return F.mse_loss(self.model(**self.inputs, return_dict=False)[0], self.target)

    def __call__(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved(self) -> int:
        return saved_bytes(self.forward, self.beside)
