"""Tiny models of the real classes, and the tolerance of every dtype."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Search test files alone for tests and doctests: helpers would be imported a second time."""
    is_file = collection_path.suffix == ".py"
    return True if is_file and not collection_path.name.startswith("test_") else None


def pytest_collection_finish() -> None:
    """Exempt the imported modules from garbage collection: each full one takes 0.3 s with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tolerance() -> dict[torch.dtype, float]:
    return TOLERANCE


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# DDP's reducer outlives a test's end. Were it the last to hold its group, it would wait, with the
# GIL, for a thread of the group that waits for the GIL.
GROUPS: list[dist.ProcessGroup | None] = []


@pytest.fixture
def one_process() -> Iterator[None]:
    """Be a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    GROUPS.append(dist.group.WORLD)
    yield
    dist.destroy_process_group()


class MLP(nn.Module):
    """Two linear layers that take `(B, D)` and `(B, T, D)` alike."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, 10)
        self.second = nn.Linear(10, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


@pytest.fixture
def mlp() -> MLP:
    return MLP()


@pytest.fixture
def make_mlp() -> Callable[[], MLP]:
    def make() -> MLP:
        torch.manual_seed(0)
        return MLP()

    return make


def tiny_flux(in_channels: int = 384, *, guidance: bool = False, layers: int = 1) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )


def flux_inputs(
    batch: int = 2, rows: int = 4, columns: int = 6, in_channels: int = 384, text: int = 5
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = normal(batch, rows * columns, in_channels)
    if in_channels == 384:
        tokens = torch.rand(batch, rows * columns, 1, generator=generator)
        share = torch.linspace(0.2, 0.8, batch).view(-1, 1, 1)
        hidden[..., 128:] = (tokens < share).float()
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": normal(batch, text, 16),
        "pooled_projections": normal(batch, 16),
        "timestep": torch.rand(batch, generator=generator),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }


@pytest.fixture
def make_flux() -> Callable[..., nn.Module]:
    return tiny_flux


@pytest.fixture
def make_flux_inputs() -> Callable[..., dict[str, Tensor]]:
    return flux_inputs


FLUX_TARGETS = [
    "x_embedder",
    "context_embedder",
    "to_q",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "norm1.linear",
    "norm.linear",
    "ff.net.2",
    "proj_mlp",
    "proj_out",
]


@pytest.fixture
def flux_targets() -> list[str]:
    return list(FLUX_TARGETS)
