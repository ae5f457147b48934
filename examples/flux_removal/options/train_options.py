"""The options of `train.py`, and what they need of each other."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from options.composition_options import CompositionOptions, resolve_composition
from options.kind_options import KindOptions, check_kinds
from options.memory_options import MemoryOptions, check_memory
from options.optimizer_options import OptimizerOptions, check_optimizer
from options.routing_options import (
    BalanceOptions,
    CourseOptions,
    check_balance,
    check_course,
    option,
)
from options.sharing_options import SharingOptions, check_sharing
from options.validation_options import ValidationOptions, check_validation
from removal_data.options import DataOptions

BUNDLED_MODEL = Path(__file__).parents[2] / "tiny_flux_fill" / "model"

ATTENTION_AND_FEED_FORWARD = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "proj_out"),
)
"""What is adapted by default, in the names of diffusers' `FluxTransformer2DModel`."""


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
class MixtureOptions(CompositionOptions, BalanceOptions, KindOptions):
    """Describe the experts and their router."""

    use_lora: bool = option(True, "Train LoRA experts; false trains the whole transformer.")
    adapter: Literal["moe_lora", "lora"] = option(
        "moe_lora",
        "A mixture of experts; lora for a plain LoRA of PEFT with rank lora_r, as a baseline.",
    )
    num_experts: int = option(3, "Experts per layer; 1 is a plain LoRA without a router.")
    lora_r: int = option(256, "Rank of each expert.")
    lora_alpha: float = option(256.0, "The scale of the experts is lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout probability on the input of the experts.")
    target_modules: list[str] = field(
        default_factory=lambda: list(ATTENTION_AND_FEED_FORWARD),
        metadata={"help": "Adapted layers: name endings, one regular expression, or all-linear."},
    )
    router: str = option("three_expert_removal", "Name of a registered router.")
    routing: Literal["by_losses", "always", "never"] = option(
        "by_losses", "Use the router with specialized losses only, always, or never."
    )
    router_kwargs: str = option("{}", "Constructor arguments of the router, as JSON.")
    routing_temperature: float = option(1.0, "Divisor of the router's logits, usually 0.5 to 2.")
    routing_strategy: Literal["soft", "hard", "topk"] = option(
        "soft", "Computation of the routing weights from the logits."
    )
    top_k: int | None = option(None, "Number of selected experts with the strategy topk.")
    task_hint: str | None = option(
        None, "Task hint for the router in training, for example removal_focus."
    )
    router_learning_rate: float | None = option(
        None, "Learning rate of the router; learning_rate by default."
    )

    @property
    def targets(self) -> list[str] | str:
        """Return the layers to adapt as PEFT takes them: name endings, a regex, or all-linear."""
        names = self.target_modules
        is_rule = len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0])
        return names[0] if is_rule else names


@dataclass(kw_only=True)
class LossOptions(CourseOptions):
    """Switch losses on and weigh them."""

    enable_base_loss: bool = option(True, "Enable the base loss: velocities in latent space.")
    base_loss_weight: float = option(1.0, "Weight of the base loss.")
    enable_boundary_loss: bool = option(
        False, "Enable the boundary loss: image gradients along the edge of the mask."
    )
    boundary_loss_weight: float = option(0.3, "Weight of the boundary loss.")
    enable_consistency_loss: bool = option(
        False, "Enable the consistency loss: pixels outside the mask, compared with the target."
    )
    consistency_loss_weight: float = option(0.5, "Weight of the consistency loss.")
    enable_detail_loss: bool = option(
        False, "Enable the detail loss: high frequencies inside the mask."
    )
    detail_loss_weight: float = option(0.2, "Weight of the detail loss.")
    enable_mask_info: bool = option(
        False, "Analyze the masks, as routing requires, and log their properties."
    )
    expert_signals: bool = option(
        False, "Assign one loss to each sample; a specialized loss trains its own expert only."
    )
    effect_band: int = option(
        0, "Width in pixels of a band around the mask with a reduced consistency loss."
    )
    specialized_every: int = option(
        1, "Compute the specialized losses every n-th step, with n times their weight."
    )
    window_margin: int | None = option(
        None, "Decode with gradient in the box of the mask and this margin in latents only."
    )
    max_sigma: float = option(
        0.7, "Noise level above which samples are excluded from the pixel losses."
    )
    weighting_scheme: Literal["logit_normal", "mode", "none", "sigma_sqrt", "cosmap"] = option(
        "logit_normal",
        "Distribution (the first two) or weighting of noise levels, as in diffusers.",
    )
    logit_mean: float = option(0.0, "Mean of logit_normal.")
    logit_std: float = option(1.0, "Standard deviation of logit_normal.")
    mode_scale: float = option(1.29, "Scale of mode.")
    vae_checkpointing: bool = option(
        False, "Decode sample by sample, and recompute in the backward pass."
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
        self.check_losses()
        self.check_mixture()
        check_balance(self)
        check_course(self)
        check_optimizer(self)
        check_memory(self)
        check_validation(self)
        check_sharing(self)
        self.check_pixels()
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

    def check_losses(self) -> None:
        """Raise for losses that are off, lack what they need, or have weights without effect."""
        for name in ("base", "boundary", "consistency", "detail"):
            weight, usual = getattr(self, f"{name}_loss_weight"), LOSS_DEFAULTS[name]
            if not getattr(self, f"enable_{name}_loss") and weight != usual:
                raise ValueError(
                    f"Expected --enable_{name}_loss together with --{name}_loss_weight {weight}, "
                    "which has no effect without it."
                )
        if not (self.enable_base_loss or self.specialized):
            raise ValueError("Expected at least one loss to be enabled, but all are off.")
        if self.specialized and not self.enable_mask_info:
            raise ValueError(
                "Expected --enable_mask_info together with a boundary, consistency or detail loss: "
                "these switch routing on, and routing needs the masks analyzed."
            )
        if self.expert_signals and not (
            self.specialized and self.enable_base_loss and self.mixed and self.num_experts == 3
        ):
            raise ValueError(
                "Expected a mixture of three experts, the base loss and a specialized loss with "
                "`expert_signals`."
            )

    def check_mixture(self) -> None:
        """Raise for options of a mixture or of a router that the run does not have."""
        if self.adapter == "lora":
            self.check_plain()
        if self.routing != "by_losses" and not (self.mixed and self.num_experts > 1):
            raise ValueError(
                f"Expected LoRA experts, more than one of them, with `routing` {self.routing}."
            )
        if not isinstance(json.loads(self.router_kwargs), dict):
            raise ValueError(
                f"Expected `router_kwargs` to be a JSON object, but got {self.router_kwargs}."
            )
        if self.task_hint and not self.routed:
            raise ValueError(
                "Expected a routed run with `task_hint`: LoRA experts, more than one of them, "
                "and a boundary, consistency or detail loss or `routing` always."
            )
        if self.router_learning_rate is not None and not self.routed:
            raise ValueError("Expected a routed run with `router_learning_rate`.")

    def check_pixels(self) -> None:
        """Raise for options of pixel losses or masks that are out of range or have no effect."""
        ways = {"window_margin": None, "specialized_every": 1}
        for name, off in ways.items():
            if getattr(self, name) != off and not self.specialized:
                raise ValueError(
                    f"Expected a boundary, consistency or detail loss with `{name}`, which has no "
                    "effect without one."
                )
        if self.effect_band and not self.enable_consistency_loss:
            raise ValueError("Expected --enable_consistency_loss together with `effect_band`.")
        if self.specialized_every != 1 and self.expert_signals:
            raise ValueError("Expected `specialized_every` 1 with `expert_signals`.")
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

    def check_plain(self) -> None:
        """Raise for options that PEFT's own LoRA does not have."""
        if not self.use_lora:
            raise ValueError("Expected `use_lora` with `adapter` lora, but it is off.")
        fields = MixtureOptions.__dataclass_fields__
        for name in OF_THE_MIXTURE:
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"Expected no `{name}` with `adapter` lora, but got {getattr(self, name)}: "
                    "it has no experts and no router."
                )


OF_THE_MIXTURE = (
    *("num_experts", "router", "routing", "router_kwargs"),
    *("routing_temperature", "routing_strategy", "top_k"),
)

LOSS_DEFAULTS = {
    name: LossOptions.__dataclass_fields__[f"{name}_loss_weight"].default
    for name in ("base", "boundary", "consistency", "detail")
}
