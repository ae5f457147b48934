"""Flags for the memory of the transformer in inference, and the transformer loaded by them."""

from __future__ import annotations

import argparse

import torch
from diffusers import FluxFillPipeline

from flux_fill.base_precision import PACKAGES, check_base_precision
from flux_fill.frozen_transformer import load_transformer
from flux_fill.models import load_checkpoint

OFFLOADS = {"block_level": {"num_blocks_per_group": 1}, "leaf_level": {}}
"""The kinds of diffusers' group offloading, with their arguments."""


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """Add --base_precision and --offload."""
    parser.add_argument(
        "--base_precision",
        choices=PACKAGES,
        help="store linear layers in fp8 or int8 (torchao), or nf4 (bitsandbytes, on a GPU)",
    )
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        help="keep the transformer in CPU memory, and bring in each block or each layer",
    )


def check_memory_flags(args: argparse.Namespace) -> None:
    """Raise for flags that packages, the device or each other rule out.

    Raises:
        ValueError: with a sentence that names the flags.
    """
    check_base_precision(args.base_precision)
    if args.base_precision == "nf4" and args.offload is not None:
        raise ValueError(
            "Expected `base_precision` fp8 or int8 with `offload`, but got nf4: layers of "
            "bitsandbytes compute on the device of their weights."
        )


def load_trained_transformer(
    pipe: FluxFillPipeline, args: argparse.Namespace, dtype: torch.dtype
) -> None:
    """Load the transformer and its checkpoint into a pipeline, in the memory that flags allow.

    Args:
        pipe: a pipeline without transformer, see `load_pipeline`.
        args: `flux_fill_id`, `checkpoint`, `device`, `base_precision` and `offload`.
        dtype: of the computation.
    """
    load_transformer(
        pipe,
        args.flux_fill_id,
        dtype=dtype,
        device="cpu" if args.offload else args.device,
        base_precision=args.base_precision,
    )
    load_checkpoint(pipe, args.checkpoint)
    if args.offload:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device(args.device),
            offload_type=args.offload,
            **OFFLOADS[args.offload],
        )
