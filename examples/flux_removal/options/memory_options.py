"""The options of `train.py` that fit the frozen transformer into the memory of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flux_fill.base_precision import check_base_precision
from options.routing_options import option

if TYPE_CHECKING:
    from options.train_options import TrainOptions


@dataclass(kw_only=True)
class MemoryOptions:
    """Say how the frozen transformer is stored, and how its blocks run."""

    base_precision: Literal["bf16", "fp8", "int8", "nf4"] | None = option(
        None,
        "Storage of the frozen linear layers: bf16, fp8 or int8 (torchao), or nf4 (bitsandbytes, "
        "on a GPU); the dtype of mixed_precision by default.",
    )
    offload: bool = option(
        False,
        "Keep the linear layers of the frozen transformer's blocks in CPU memory, and copy each "
        "to the device when it is used.",
    )
    compile: bool = option(False, "Compile the blocks of the transformer.")


def check_memory(options: TrainOptions) -> None:
    """Raise for a storage of the base model that the run, the device or the packages rule out."""
    for name in ("base_precision", "offload"):
        if getattr(options, name) and not options.use_lora:
            raise ValueError(
                f"Expected `use_lora` with `{name}`, which needs a frozen transformer, but it is "
                "off and the whole transformer is trained."
            )
    if options.compile and options.base_precision not in (None, options.mixed_precision):
        raise ValueError(
            "Expected `base_precision` of the computation with `compile`, but got "
            f"{options.base_precision} and `mixed_precision` {options.mixed_precision}. Quantized "
            "layers are not compiled."
        )
    if options.offload and options.base_precision == "nf4":
        raise ValueError(
            "Expected `base_precision` bf16, fp8 or int8 with `offload`, but got nf4: layers of "
            "bitsandbytes compute on the device of their weights."
        )
    if options.offload and options.compile:
        raise ValueError(
            "Expected no `compile` with `offload`: copies of weights are not compiled."
        )
    if not options.plan:
        check_base_precision(options.base_precision)
