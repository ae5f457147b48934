"""The options of `train.py`, and what they need of each other."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from options.routing_options import (
    BalanceOptions,
    CourseOptions,
    check_balance,
    check_course,
    option,
)
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
        str(BUNDLED_MODEL), "Folder or hub id of a Flux Fill pipeline; the bundled one by default."
    )
    flux_redux_id: str | None = option(
        None, "Folder or hub id of a Flux Redux pipeline, which encodes batch['ref'] as the prompt."
    )
    redux_scale: float = option(1.0, "Multiplies the embeddings of Redux.")
    prompt: str | None = option(
        None, "Text for the pipeline's text encoders ('' by default); zeros where it has none."
    )
    guidance_scale: float | None = option(
        None, "What a model with guidance embeddings is told; 30 by default, as in the pipeline."
    )


@dataclass(kw_only=True)
class MixtureOptions(BalanceOptions):
    """Describe the experts and their router."""

    use_lora: bool = option(True, "Train LoRA experts; false trains the whole transformer.")
    adapter: Literal["moe_lora", "lora"] = option(
        "moe_lora",
        "A mixture of experts; or lora, PEFT's own LoRA of rank lora_r, to compare with.",
    )
    num_experts: int = option(3, "Experts per layer; one alone is a plain LoRA without a router.")
    lora_r: int = option(256, "Rank of each expert.")
    lora_alpha: float = option(256.0, "The experts' output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout on the input of the experts.")
    target_modules: list[str] = field(
        default_factory=lambda: list(ATTENTION_AND_FEED_FORWARD),
        metadata={"help": "Layers to adapt: name endings; or one regex, or all-linear."},
    )
    router: str = option("three_expert_removal", "Name of a registered router.")
    routing: Literal["by_losses", "always", "never"] = option(
        "by_losses", "Ask the router once a specialized loss is on; whatever is on; or never."
    )
    router_kwargs: str = option("{}", "Arguments of the router, as JSON.")
    routing_temperature: float = option(1.0, "Divides the router's logits; 0.5 to 2 is usual.")
    routing_strategy: Literal["soft", "hard", "topk"] = option("soft", "From logits to weights.")
    top_k: int | None = option(None, "Experts that stay under the strategy topk.")
    task_hint: str | None = option(None, "Guidance in training, for example removal_focus.")
    router_learning_rate: float | None = option(None, "As learning_rate, for the router alone.")

    @property
    def targets(self) -> list[str] | str:
        """Return the layers to adapt as PEFT takes them: name endings, a regex, or all-linear."""
        names = self.target_modules
        is_rule = len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0])
        return names[0] if is_rule else names


@dataclass(kw_only=True)
class LossOptions(CourseOptions):
    """Switch losses on and weigh them."""

    enable_base_loss: bool = option(True, "Velocities in latent space.")
    base_loss_weight: float = option(1.0, "Its weight.")
    enable_boundary_loss: bool = option(False, "Gradients along the mask's edge.")
    boundary_loss_weight: float = option(0.3, "Its weight.")
    enable_consistency_loss: bool = option(False, "Pixels outside the mask, against the target.")
    consistency_loss_weight: float = option(0.5, "Its weight.")
    enable_detail_loss: bool = option(False, "High frequencies inside the mask.")
    detail_loss_weight: float = option(0.2, "Its weight.")
    enable_mask_info: bool = option(
        False, "Analyze the masks, which routing needs, and log what was found."
    )
    expert_signals: bool = option(
        False, "Give each sample one loss, and let a specialized one train its own expert only."
    )
    effect_band: int = option(
        0, "Pixels around the mask where consistency is relaxed, for shadows and reflections."
    )
    specialized_every: int = option(
        1, "Boundary, consistency and detail loss at every n-th step only, n times as strong."
    )
    window_margin: int | None = option(
        None, "Decode with gradient only the mask's box and so many latents around it."
    )
    max_sigma: float = option(0.7, "Noisier samples than this are left out of the pixel losses.")
    weighting_scheme: Literal["logit_normal", "mode", "none", "sigma_sqrt", "cosmap"] = option(
        "logit_normal", "How noise levels are drawn (the first two) or weighed, as in diffusers."
    )
    logit_mean: float = option(0.0, "Mean of logit_normal.")
    logit_std: float = option(1.0, "Deviation of logit_normal.")
    mode_scale: float = option(1.29, "Scale of mode.")
    vae_checkpointing: bool = option(False, "Decode sample by sample, recomputed in backward.")


@dataclass(kw_only=True)
class RunOptions(DataOptions):
    """Say on what, how long and how fast to train, and what to leave behind."""

    train_data_dir: str = field(
        metadata={"help": "A folder with triplets, a manifest, datasets:NAME, or shards:PATH."}
    )
    check_data: Literal["all", "headers"] = option(
        "all", "Check headers and pixels of all files before the model is loaded; or headers only."
    )
    skip_broken: bool = option(False, "Report samples with errors and train without them.")
    output_dir: str = option("outputs/flux_removal", "Where checkpoint-N goes.")
    logging_dir: str | None = option(
        None, "Where training.log and the TensorBoard events go; logs in output_dir by default."
    )
    report_to: Literal["tensorboard", "none"] = option("tensorboard", "Where curves go.")
    logging_steps: int = option(10, "Steps between two log entries.")
    checkpointing_steps: int = option(500, "Steps between two checkpoints.")
    checkpoints_total_limit: int | None = option(None, "Older checkpoints are deleted.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder, or latest.")
    batch_size: int = option(2, "Samples per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")
    max_train_steps: int | None = option(None, "Optimizer steps; overrides num_train_epochs.")
    num_train_epochs: int = option(1, "Passes over the data.")
    learning_rate: float = option(1e-4, "AdamW's.")
    weight_decay: float = option(0.01, "AdamW's.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = (
        option("constant", "Course of the learning rate.")
    )
    lr_warmup_steps: int = option(0, "Steps of warm-up.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "Autocast; the frozen weights are held in this precision, too."
    )
    gradient_checkpointing: bool = option(False, "Trade time for memory in the transformer.")
    mask_augmentation: float = option(
        0.0, "Share of the masks that are drawn anew, too tight or too loose, as users draw them."
    )
    cache_latents: bool = option(
        False, "Encode the data once: latents and the embeddings of samples go to disk."
    )
    cache_dir: str | None = option(
        None, "Where to, for several runs; cache in output_dir by default."
    )
    dataloader_num_workers: int = option(0, "Processes that read images.")
    seed: int = option(0, "Decides initial weights, noise and the order of the data.")


@dataclass(kw_only=True)
class TrainOptions(ModelOptions, MixtureOptions, LossOptions, RunOptions):
    """Hold all options of a training run; what cannot be honored raises here."""

    def __post_init__(self) -> None:
        self.logging_dir = self.logging_dir or str(Path(self.output_dir) / "logs")
        self.check_losses()
        self.check_mixture()
        check_balance(self)
        check_course(self)
        self.check_pixels()
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
