"""The tiny models as fixtures, and the tolerance of every dtype."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import MLP, flux_inputs, tiny_flux
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


@pytest.fixture
def mlp() -> MLP:
    return MLP()


@pytest.fixture
def make_mlp() -> Callable[[], MLP]:
    def make() -> MLP:
        torch.manual_seed(0)
        return MLP()

    return make


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
