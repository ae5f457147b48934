"""Compress a plain LoRA to a lower rank."""

from __future__ import annotations

import math

import torch

from moe_lora.export.lora_factors import Factors, PlainLora


def truncate(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """Take the best approximation of one layer's change that has at most a given rank.

    With `B = Q_B R_B` and `Aᵀ = Q_A R_A`, the singular values of `B A` are those of the small
    matrix `R_B R_Aᵀ`; the `(out, in)` matrix is never formed.

    Args:
        factors: the layer.
        rank: the rank to keep; factors of this rank or less are returned as they are.

    Returns:
        The factors, the square of the Frobenius error, and the square of the layer's norm.
    """
    square = factors.norm() ** 2
    if factors.rank <= rank:
        return factors, 0.0, square
    precise = torch.promote_types(factors.down.dtype, torch.float32)
    q_up, r_up = torch.linalg.qr(factors.up.to(precise))
    q_down, r_down = torch.linalg.qr(factors.down.to(precise).flatten(1).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = s[:rank].sqrt()
    up = (q_up @ (u[:, :rank] * root)).to(factors.up.dtype)
    down = ((vh[:rank] * root[:, None]) @ q_down.T).to(factors.down.dtype)
    lost = float(s[rank:].double().square().sum())
    return Factors(down.view(-1, *factors.down.shape[1:]), up), lost, square


def compress(lora: PlainLora, rank: int) -> tuple[PlainLora, float, dict[str, float]]:
    """Compress every layer of a plain LoRA to at most a given rank, by SVD.

    Args:
        lora: the plain LoRA.
        rank: >= 1.

    Returns:
        The compressed LoRA, the Frobenius error of all layers together relative to their norm, and
        the relative error of every layer.

    Raises:
        ValueError: for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"Expected `rank` to be >= 1, but got {rank}.")
    compressed: PlainLora = {}
    errors: dict[str, float] = {}
    all_lost = all_square = 0.0
    for path, factors in lora.items():
        compressed[path], lost, square = truncate(factors, rank)
        errors[path] = math.sqrt(lost / square) if square > 0 else 0.0
        all_lost, all_square = all_lost + lost, all_square + square
    return compressed, math.sqrt(all_lost / all_square) if all_square > 0 else 0.0, errors
