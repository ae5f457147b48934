"""The subcommand `plan`: memory and disk space of a training."""

from __future__ import annotations

import argparse
import json
import re

from moe_lora.planning import OPTIMIZERS, PRECISIONS, example_call, model_on_meta, plan_training
from moe_lora.tuner.config import MoELoraConfig


def add_plan_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan` to its parser."""
    command.add_argument(
        "model", help="Folder of a diffusers model or pipeline, or its name on the Hub."
    )
    command.add_argument("--r", type=int, default=64, help="Rank of each expert.")
    command.add_argument("--num_experts", type=int, default=3, help="Experts per layer.")
    command.add_argument(
        "--target_modules",
        nargs="+",
        help='Name endings, a regex, or "all-linear"; the default of the family if omitted.',
    )
    command.add_argument("--router", help="Name of a registered router.")
    command.add_argument("--height", type=int, default=1024, help="Height of the images in pixels.")
    command.add_argument("--width", type=int, default=1024, help="Width of the images in pixels.")
    command.add_argument("--batch_size", type=int, default=1, help="Samples per device and step.")
    command.add_argument("--text_tokens", type=int, default=512, help="Tokens of a prompt.")
    command.add_argument(
        "--base_precision", choices=PRECISIONS, default="bf16", help="Precision of the base model."
    )
    command.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="Optimizer.")
    command.add_argument(
        "--no_checkpointing",
        action="store_true",
        help="Keep all activations instead of recomputing each block.",
    )
    command.add_argument(
        "--offload",
        action="store_true",
        help="Keep the linear layers of the base model's blocks in CPU memory.",
    )
    command.add_argument(
        "--shards", type=int, default=1, help="Processes that shard the training with FSDP2."
    )


def plan(options: argparse.Namespace) -> None:
    """Print the memory and the disk space of a training."""
    model = model_on_meta(options.model)
    targets = options.target_modules
    if targets is not None and len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        targets = targets[0]  # a regex, or "all-linear"
    config = MoELoraConfig(
        r=options.r,
        lora_alpha=options.r,
        num_experts=options.num_experts,
        target_modules=targets,
        router=options.router,
    )
    call = example_call(
        model, options.height, options.width, options.batch_size, options.text_tokens
    )
    found = plan_training(
        model,
        config,
        call,
        base_precision=options.base_precision,
        optimizer=options.optimizer,
        checkpointing=not options.no_checkpointing,
        offload=options.offload,
        shards=options.shards,
    )
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)
