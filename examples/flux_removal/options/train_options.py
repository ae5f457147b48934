"""The options of `train.py`, and what they need of each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from options.composition_options import resolve_composition
from options.kind_options import check_kinds
from options.loss_options import LossOptions, check_losses, check_pixel_losses
from options.memory_options import MemoryOptions, check_memory
from options.mixture_options import MixtureOptions, check_mixture
from options.optimizer_options import OptimizerOptions, check_optimizer
from options.routing_options import check_balance, check_course, option
from options.sharing_options import SharingOptions, check_sharing
from options.validation_options import ValidationOptions, check_validation
from removal_data.options import DataOptions

BUNDLED_MODEL = Path(__file__).parents[2] / "tiny_flux_fill" / "model"


@dataclass(kw_only=True)
class ModelOptions:
    """Name the models and how they are called."""

    flux_fill_id: str = option(
        str(BUNDLED_MODEL),
        "Folder or Hub id of a FLUX Fill pipeline; the tiny model of the repository by default.",
    )
    flux_redux_id: str | None = option(
        None,
        "Folder or Hub id of a FLUX Redux pipeline, which encodes the reference images as prompts.",
    )
    redux_scale: float = option(1.0, "Multiplies the embeddings of Redux.")
    prompt: str | None = option(
        None,
        "Prompt for the text encoders, '' by default; zeros for pipelines without text encoders.",
    )
    guidance_scale: float | None = option(
        None, "Guidance for models with guidance embeddings; 30 by default, as in the pipeline."
    )


@dataclass(kw_only=True)
class RunOptions(OptimizerOptions, MemoryOptions, DataOptions):
    """Say on what, how long and how fast to train, and what to leave behind."""

    train_data_dir: str = field(
        metadata={"help": "A folder with triplets, a manifest, datasets:NAME, or shards:PATH."}
    )
    check_data: Literal["all", "headers"] = option(
        "all", "Check headers and pixels of all files before the model is loaded; or headers only."
    )
    skip_broken: bool = option(False, "Report samples with errors and train without them.")
    output_dir: str = option("outputs/flux_removal", "Folder of the checkpoints checkpoint-N.")
    logging_dir: str | None = option(
        None, "Folder of training.log and TensorBoard events; logs in output_dir by default."
    )
    logging_steps: int = option(10, "Steps between log entries.")
    checkpointing_steps: int = option(500, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = option(
        None, "Maximum number of checkpoints; older ones are deleted."
    )
    plan: bool = option(False, "Print memory and disk of the run; load no model.")
    resume_from_checkpoint: str | None = option(None, "Folder of a checkpoint, or latest.")
    batch_size: int = option(2, "Samples per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")
    max_train_steps: int | None = option(None, "Optimizer steps; overrides num_train_epochs.")
    num_train_epochs: int = option(1, "Epochs.")
    learning_rate: float = option(1e-4, "Learning rate of the optimizer.")
    weight_decay: float = option(0.01, "Weight decay of the optimizer.")
    max_grad_norm: float = option(1.0, "Maximum norm of the gradients.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = (
        option("constant", "Schedule of the learning rate.")
    )
    lr_warmup_steps: int = option(0, "Warm-up steps of the learning rate.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "Dtype of autocast and of the frozen weights."
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations of the transformer in the backward pass, to save memory."
    )
    mask_augmentation: float = option(
        0.0, "Share of masks that are replaced by tighter or looser shapes, as users draw them."
    )
    cache_latents: bool = option(
        False, "Encode the data once: latents and the embeddings of samples go to disk."
    )
    cache_dir: str | None = option(
        None, "Where to, for several runs; cache in output_dir by default."
    )
    dataloader_num_workers: int = option(0, "Processes that read images.")
    seed: int = option(0, "Seed of initial weights, noise and data order.")


@dataclass(kw_only=True)
class TrainOptions(
    ModelOptions, MixtureOptions, LossOptions, RunOptions, ValidationOptions, SharingOptions
):
    """Hold all options of a training run; what cannot be honored raises here."""

    def __post_init__(self) -> None:
        self.logging_dir = self.logging_dir or str(Path(self.output_dir) / "logs")
        resolve_composition(self)
        check_kinds(self)
        check_losses(self)
        check_mixture(self)
        check_balance(self)
        check_course(self)
        check_optimizer(self)
        check_memory(self)
        check_validation(self)
        check_sharing(self)
        check_pixel_losses(self)
        self._check_latents()
        self._check_run()

    @property
    def streamed(self) -> bool:
        """Tell whether the data are shards that are read one after another."""
        return self.train_data_dir.startswith("shards:")

    @property
    def specialized(self) -> bool:
        """Tell whether a loss is on that tells the experts apart."""
        return self.enable_boundary_loss or self.enable_consistency_loss or self.enable_detail_loss

    @property
    def mixed(self) -> bool:
        """Tell whether the run trains a mixture of experts."""
        return self.use_lora and self.adapter == "moe_lora"

    @property
    def routed(self) -> bool:
        """Tell whether the run ever asks a router."""
        wanted = self.specialized if self.routing == "by_losses" else self.routing == "always"
        return self.mixed and wanted and self.num_experts > 1

    def _check_latents(self) -> None:
        """Raise for masks and latents that exclude each other."""
        if not 0 <= self.mask_augmentation <= 1:
            raise ValueError(
                f"Expected `mask_augmentation` to be in [0, 1], but got {self.mask_augmentation}."
            )
        if self.cache_dir is not None and not self.cache_latents:
            raise ValueError("Expected --cache_latents together with `cache_dir`.")
        if self.mask_augmentation and self.cache_latents:
            raise ValueError(
                "Expected no `cache_latents` with `mask_augmentation`: what is encoded of a source "
                "depends on its mask."
            )

    def _check_run(self) -> None:
        """Raise for data, references and steps that a run cannot have."""
        if self.plan and not self.mixed:
            raise ValueError("Expected a mixture with `plan`, but the run trains none.")
        self.check_reading()
        if self.streamed and (self.max_train_steps is None or self.cache_latents):
            raise ValueError(
                "Expected `max_train_steps`, and no `cache_latents`, with data in shards, whose "
                "number of samples is not known."
            )
        if self.flux_redux_id is None:
            for name, off in (("redux_scale", 1.0), ("redux_image", "ref")):
                if getattr(self, name) != off:
                    raise ValueError(f"Expected --flux_redux_id together with `{name}`.")
        for name in ("logging_steps", "checkpointing_steps", "batch_size", "num_train_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be >= 1, but got {getattr(self, name)}.")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                "Expected `lr_scheduler` constant_with_warmup with `lr_warmup_steps` "
                f"{self.lr_warmup_steps}, but got constant, which has no warm-up."
            )
