"""Whole tensors of models and optimizers that processes share, with FSDP2 or DeepSpeed."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from options.train_options import TrainOptions
from training_run.zero import gather_weight

WITH_ZERO = ("Adam", "AdamW", "SGD")
"""Optimizers that treat each number by itself, and whose checkpoints are tested with DeepSpeed."""


def configure_sharding(accelerator: Accelerator, options: TrainOptions) -> None:
    """Set what a run decides about FSDP2 and DeepSpeed, beside accelerate's configuration file.

    Both leave the dtypes of the weights alone: the frozen ones have that of `mixed_precision`,
    experts and routers are float32.

    Raises:
        ValueError: for versions and options that would train something else.
    """
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if accelerator.distributed_type in sharded and options.router_phase != "none":
        raise ValueError("Expected `router_phase` none with FSDP2 and DeepSpeed.")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("Expected `fsdp_version` 2 in accelerate's configuration, but got 1.")
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    if options.optimizer not in WITH_ZERO:
        raise ValueError(
            f"Expected `optimizer` to be one of {', '.join(WITH_ZERO)} with DeepSpeed, which joins "
            f"all parameters into one vector, but got {options.optimizer}."
        )
    if options.mixed_precision == "fp16":
        raise ValueError("Expected `mixed_precision` no or bf16 with DeepSpeed, but got fp16.")
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if config["zero_optimization"]["stage"] == 3 and options.ema_decay is not None:
        raise ValueError(
            "Expected no `ema_decay` with DeepSpeed ZeRO-3. DDP, FSDP2 and ZeRO-2 average weights."
        )
    config |= {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "gradient_clipping": options.max_grad_norm,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a process holds parts of the parameters only, as under FSDP2 and ZeRO-3."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def gather(value: Tensor) -> Tensor:
    """Return a whole tensor on the CPU; called by every process.

    Args:
        value: a parameter, or a tensor of the state of an optimizer.
    """
    if isinstance(value, DTensor):
        whole = value.full_tensor().detach()
    else:
        whole = gather_weight(value) if hasattr(value, "ds_id") else value.detach()
    return whole.cpu().contiguous()


def scatter(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, laid out as a parameter is."""
    value = value.to(like.device)
    if isinstance(value, DTensor):
        return value
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model's checkpoint holds, with whole tensors; called by every process.

    Args:
        model: unwrapped, adapted by PEFT or trained whole.
    """
    part = model.base_model.prefix if isinstance(model, PeftModel) else ""
    return {name: gather(v) for name, v in _state(model).items() if part in name}


def _state(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())  # a state dict loses what ZeRO adds to parameters
    return {name: parameters.get(name, v) for name, v in model.state_dict().items()}
