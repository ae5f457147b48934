"""Memory of a process that holds a shard of the model (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def check_shards(shards: int, base_precision: str, optimizer: str, offload: bool) -> None:
    """Raise for settings that FSDP2 does not shard.

    Args:
        shards: number of processes.
        base_precision: of the base model.
        optimizer: its name.
        offload: whether layers of the base model are in CPU memory.

    Raises:
        ValueError: as said.
    """
    if shards < 1:
        raise ValueError(f"Expected `shards` to be at least 1, but got {shards}.")
    if shards == 1:
        return
    if base_precision not in ("fp32", "bf16") or offload:
        raise ValueError(
            "Expected a base model in fp32 or bf16 without offloading for `shards` > 1, but got "
            f"{base_precision!r}{' with offloading' if offload else ''}."
        )
    if optimizer == "adamw_8bit":
        raise ValueError("Expected an optimizer without 8-bit states for `shards` > 1.")


def gathered_bytes(model: nn.Module, share: float = 1.0) -> int:
    """Return the bytes that a process gathers beside its shard, at most.

    FSDP2 gathers the members of each `nn.ModuleList` one at a time, and the rest of the model for
    the whole step. The next block is gathered during the computation of the present one, and the
    gradients of a block are whole until they are divided.

    Args:
        model: the adapted model, on any device; trained parameters require gradients.
        share: of the trained parameters that counts.
    """

    def bytes_of(parameters: Iterable[nn.Parameter], *, gradients: bool) -> float:
        return sum(
            p.numel() * p.element_size() * ((1 + gradients) * share if p.requires_grad else 1)
            for p in parameters
        )

    blocks = [
        block
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and path.count(".") == 0
        for block in module
    ]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    largest = max((bytes_of(block.parameters(), gradients=True) for block in blocks), default=0)
    return int(bytes_of(rest, gradients=True) + 2 * largest)
