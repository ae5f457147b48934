"""Training of some experts, while the others stay as they are to the last bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moe_lora.composition.replaced_parameters import mark_replaced
from moe_lora.composition.target import check_replaceable, find_target


def train_only(
    model: nn.Module,
    experts: Sequence[str] | None,
    *,
    router: bool = True,
    adapter_name: str = "default",
) -> None:
    """Train some experts of an adapter, and freeze the others to the last bit.

    Frozen experts are stored as parameters of their own that require no gradients. No optimizer
    therefore changes them, by weight decay or momentum either, and none keeps a state for them;
    gradient clipping, `DistributedDataParallel` and FSDP2 do not see their gradients. Outputs and
    written checkpoints do not change. The setting is not saved: to resume, load the checkpoint and
    call `train_only` again. It lasts until the next call; experts that are added and routers that
    are attached meanwhile are trained.

    Call it before you make the optimizer, `DistributedDataParallel` and FSDP2; an optimizer with
    parameters that it replaced raises in its next step. Every forward pass concatenates trained and
    frozen experts, which copies the factors of each layer once. Parameters outside of experts and
    router, such as `modules_to_save`, keep their `requires_grad`.

    Args:
        model: the adapted model, or a wrapper around it.
        experts: the names of the experts to train; an empty list freezes all experts, `None` trains
            all of them.
        router: whether to train the adapter's router, if it has one. `train_only(model, None)`
            trains everything again.
        adapter_name: the adapter.

    Raises:
        TypeError: when `experts` is a string.
        ValueError: for an unknown expert, when nothing would be trained, when the adapter does not
            exist, when its weights are sharded or offloaded, for a model in
            `DistributedDataParallel`, or inside of a context such as `moe_lora.route`.

    Example:
        >>> from peft import get_peft_model
        >>> from moe_lora import MoELoraConfig
        >>> config = MoELoraConfig(r=1, target_modules=["0"], expert_names=("shadow", "glow"))
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 3)), config)
        >>> train_only(model, ["glow"])
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # (2 + 3) * r
        5
    """
    if isinstance(experts, str):
        raise TypeError(f"Expected `experts` to be a list of names, but got {experts!r}.")
    target = find_target(model, adapter_name)
    indices = None if experts is None else {target.index_of(n, "experts") for n in experts}
    if indices is not None and not indices and not (router and target.router is not None):
        raise ValueError(
            "Expected experts or a router to train, but got none. Name experts, or train the "
            "router of a model that has one."
        )
    check_replaceable(model, target, "train_only")
    before = target.parameters()
    for layer in target.layers.values():
        layer.freeze_except(indices)
    target.routers.freeze_router(adapter_name, not router)
    kept = {id(parameter) for parameter in target.parameters()}
    mark_replaced((p for p in before if id(p) not in kept), "train_only")
