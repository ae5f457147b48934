"""Adding experts to an adapter, removing and renaming them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_lora.composition.replaced_parameters import mark_replaced
from moe_lora.composition.resized_config import raise_rank, with_experts, with_ranks
from moe_lora.composition.target import (
    Target,
    check_not_merged,
    check_replaceable,
    find_target,
)
from moe_lora.export.formats.lora_file import StoredFactors
from moe_lora.export.formats.match_layers import read_lora_for
from moe_lora.export.listing import first_few
from moe_lora.routing.routers.base import Router
from moe_lora.safetensors_io import widened
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.experts import MoELoraExperts
from moe_lora.tuner.rollback import all_or_nothing

INITIALIZERS = (True, False, "kaiming", "gaussian")
"""The values of `MoELoraConfig.init_lora_weights`."""


def add_expert(
    model: nn.Module,
    name: str,
    *,
    lora: str | os.PathLike[str] | None = None,
    init: bool | str | None = None,
    router_logit: float | None = None,
    adapter_name: str = "default",
    skip: Sequence[str] = (),
) -> None:
    """Add an expert after the others of an adapter, in place.

    The other experts and the logits of the router do not change. With the weight 0 for the new
    expert, for example from `moe_lora.route`, the mixture is what it was. The router gives it the
    logit `router_logit` for every input, until it is trained: with soft routing at temperature 1
    the weight exp(b) / (exp(b) + Σ exp(l_e)), at most 0.3 % for b = -5 and three logits of at least
    0; the other weights keep their ratios. The task hint `<name>_only` gives it the weight 1. In
    uniform mode, and without a router, all weights become 1/E.

    A plain LoRA becomes exactly the expert: at one-hot weights the mixture is that LoRA. Where its
    rank is higher than that of a layer, the rank of all experts there is raised, with zeros in
    `lora_B`; where it is lower or has no factors, the new expert is padded likewise.

    `lora_A` and `lora_B` become new parameters, so that an optimizer made before raises in its next
    step; parameters of the router stay the same objects. Statistics of the routing are reset. After
    `train_only`, the new expert is trained and the frozen experts stay frozen.

    Args:
        model: the adapted model, or a wrapper around it.
        name: the name of the new expert.
        lora: the path of a plain LoRA: a safetensors file or a folder in any layout that
            `from_loras` reads.
        init: the initialization without `lora`: a value of `MoELoraConfig.init_lora_weights`, by
            default that of the adapter; or the name of an expert to copy.
        router_logit: the initial logit of the new expert; by default -5 for learned routers, -inf
            for `FixedRouter`, 0 for `UniformRouter`.
        adapter_name: the adapter.
        skip: beginnings of keys of `lora` to leave out, such as those of a text encoder.

    Raises:
        FileNotFoundError: when the file is missing.
        TypeError: when the router has no `add_expert`.
        ValueError: for an invalid or used name; for both `lora` and `init`; for a file that cannot
            be read, does not fit the base model, or adapts layers that the mixture does not; when
            experts are merged, sharded or offloaded; for a model in `DistributedDataParallel`; or
            inside of a context such as `moe_lora.route`. The model is then unchanged.

    Example:
        >>> from peft import get_peft_model
        >>> config = MoELoraConfig(r=1, target_modules=["0"], expert_names=("shadow", "glow"))
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 3)), config)
        >>> add_expert(model, "reflection")
        >>> model.peft_config["default"].expert_names
        ('shadow', 'glow', 'reflection')
        >>> model.base_model.model[0].moe_lora_experts["default"].lora_A.shape
        torch.Size([3, 1, 2])
    """
    target = find_target(model, adapter_name)
    config = with_experts(target.config, (*target.config.experts, name))
    if lora is not None and init is not None:
        raise ValueError(f"Expected one of `lora` and `init`, but got {str(lora)!r} and {init!r}.")
    if init is not None and init not in (*INITIALIZERS, *target.config.experts):
        raise ValueError(
            f"Expected `init` to be one of {list(INITIALIZERS)} or of the experts "
            f"{list(target.config.experts)}, but got {init!r}."
        )
    check_not_merged(target)
    check_replaceable(model, target, "add_expert")
    stored = {} if lora is None else read_lora_for(target.base, lora, skip)
    _check_layers(target, stored, lora)
    logit = router_logit
    if target.router is not None and logit is None:
        logit = target.router.new_expert_logit
    ranks, alphas = {}, {}
    for path, experts in target.layers.items():
        rank = stored[path].down.shape[0] if path in stored else experts.r
        ranks[path], alphas[path] = raise_rank(experts, rank, config.use_rslora)
    if any(rank != target.layers[path].r for path, rank in ranks.items()):
        config = with_ranks(config, ranks, alphas)

    def change() -> None:
        for path, experts in target.layers.items():
            _raise_rank(experts, ranks[path], alphas[path], target.config)
            _append(experts, target.config, init)
            if lora is not None:
                _write(experts, stored.get(path))
        if target.router is not None:
            assert logit is not None
            target.router.add_expert(logit)

    _apply(target, config, change, "add_expert")


def remove_expert(model: nn.Module, name: str, *, adapter_name: str = "default") -> None:
    """Remove an expert of an adapter, in place.

    The other experts do not change, nor do their logits; their weights are those of a softmax
    without the removed expert. Parameters are replaced, and statistics reset, as in `add_expert`.
    Ranks stay. Removing an expert that was just added restores the weights to the last bit.

    Args:
        model: the adapted model, or a wrapper around it.
        name: the expert.
        adapter_name: the adapter.

    Raises:
        TypeError: when the router has no `remove_expert`.
        ValueError: for an unknown expert; for the last expert, or fewer than `top_k`; for an expert
            that the router cannot be without; or as in `add_expert`. The model is then unchanged.
    """
    target = find_target(model, adapter_name)
    index = target.index_of(name, "name")
    names = [other for other in target.config.experts if other != name]
    if not names:
        raise ValueError(f"Expected another expert beside {name!r}, but it is the only one.")
    config = with_experts(target.config, names)
    check_not_merged(target)
    check_replaceable(model, target, "remove_expert")
    kept = [other for other in range(len(target.config.experts)) if other != index]

    def change() -> None:
        for experts in target.layers.values():
            lora_A, lora_B = experts.lora_A.detach(), experts.lora_B.detach()
            trained = experts.trained_experts
            if trained is not None:
                trained = tuple(i - (i > index) for i in trained if i != index)
            experts.replace_factors(lora_A[kept], lora_B[:, kept], trained)
        if target.router is not None:
            target.router.remove_expert(index)

    _apply(target, config, change, "remove_expert")


def rename_expert(model: nn.Module, old: str, new: str, *, adapter_name: str = "default") -> None:
    """Rename an expert of an adapter, in place; no parameter changes.

    Args:
        model: the adapted model, or a wrapper around it.
        old: the expert's name.
        new: the new name.
        adapter_name: the adapter.

    Raises:
        ValueError: for an unknown expert, an invalid or used name, or one that the router has at
            another place.
    """
    target = find_target(model, adapter_name)
    index = target.index_of(old, "old")
    names = list(target.config.experts)
    names[index] = new
    config = with_experts(target.config, names)
    target.routers.update_experts(adapter_name, config)


def _apply(
    target: Target, config: MoELoraConfig, change: Callable[[], None], function: str
) -> None:
    """Change experts and router, or neither."""
    before, router = target.parameters(), target.router
    known = {id(parameter) for parameter in before}
    trained = router is not None and any(p.requires_grad for p in router.parameters())
    with all_or_nothing(target.base):
        change()
        if router is not None:
            _check_rebuilt(router, function)
            for parameter in router.parameters():
                if id(parameter) not in known:
                    parameter.requires_grad_(trained)
        target.routers.update_experts(target.adapter_name, config)
    kept = {id(parameter) for parameter in target.parameters()}
    mark_replaced((p for p in before if id(p) not in kept), function)


def _check_rebuilt(router: Router, function: str) -> None:
    """Raise when a checkpoint would rebuild a router with other parameters."""
    cls = type(router)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        rebuilt = cls(**copy.deepcopy(router.init_kwargs))
    expected = {name: tensor.shape for name, tensor in router.state_dict().items()}
    found = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
    if expected != found:
        raise ValueError(
            f"Expected {cls.__name__}.{function} to update `init_kwargs`, from which checkpoints "
            f"rebuild the router, but {router.init_kwargs} makes one with other parameters."
        )


def _check_layers(
    target: Target,
    stored: Mapping[str, StoredFactors],
    lora: str | os.PathLike[str] | None,
) -> None:
    extra = sorted(stored.keys() - target.layers.keys())
    if extra:
        raise ValueError(
            f"Expected {str(lora)!r} to adapt layers of the mixture only, but it also adapts "
            f"{first_few(extra)}. Build a new mixture of the files of all experts with "
            "moe_lora.from_loras (moe_lora.save_experts writes them)."
        )


def _raise_rank(experts: MoELoraExperts, rank: int, alpha: float, config: MoELoraConfig) -> None:
    """Raise the rank of all experts, with zeros in `lora_B`; `alpha` keeps their scaling."""
    r = experts.r
    if rank == r:
        return
    lora_A, lora_B = experts.lora_A.detach(), experts.lora_B.detach()
    new_A, _ = _draw(experts, experts.num_experts, rank, config)
    zeros = lora_B.new_zeros(*lora_B.shape[:2], rank - r)
    lora_A, lora_B = torch.cat([lora_A, new_A[:, r:]], 1), torch.cat([lora_B, zeros], 2)
    experts.replace_factors(lora_A, lora_B, experts.trained_experts)
    experts.r, experts.lora_alpha = rank, alpha


def _append(experts: MoELoraExperts, config: MoELoraConfig, init: bool | str | None) -> None:
    """Append an expert, initialized or copied from another one."""
    lora_A, lora_B = experts.lora_A.detach(), experts.lora_B.detach()
    if init in config.experts:
        index = config.experts.index(str(init))
        new_A, new_B = lora_A[index : index + 1], lora_B[:, index : index + 1]
    else:
        new_A, new_B = _draw(experts, 1, experts.r, config, init)
    trained = experts.trained_experts
    if trained is not None:
        trained = (*trained, experts.num_experts)
    experts.replace_factors(torch.cat([lora_A, new_A]), torch.cat([lora_B, new_B], 1), trained)


def _draw(
    experts: MoELoraExperts,
    count: int,
    rank: int,
    config: MoELoraConfig,
    init: bool | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Initialize the factors of further experts in a layer."""
    lora_A, lora_B = experts.lora_A, experts.lora_B
    further = copy.copy(config)
    further.expert_names = tuple(str(index) for index in range(count))
    if init is not None:
        further.init_lora_weights = init  # type: ignore[assignment]  # one of INITIALIZERS
    new = type(experts)(tuple(lora_A.shape[2:]), lora_B.shape[0], rank, rank, further)
    return new.lora_A.detach().to(lora_A), new.lora_B.detach().to(lora_B)


@torch.no_grad()
def _write(experts: MoELoraExperts, stored: StoredFactors | None) -> None:
    """Write a plain LoRA into the last expert; beyond its rank, and for `None`, `lora_B` is 0."""
    lora_A, lora_B = experts.expert(experts.num_experts - 1)
    lora_B.zero_()
    if stored is None:
        return
    up = widened(stored.up)
    if stored.scaling != experts.base_scaling:
        up = up * (stored.scaling / experts.base_scaling)
    rank = stored.down.shape[0]
    lora_A[:rank].copy_(stored.down)
    lora_B[:, :rank].copy_(up)
