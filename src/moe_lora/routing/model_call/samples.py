"""Which given row belongs to which sample of a call."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_index(given: int, latents: Tensor | list[Tensor]) -> Tensor | None:
    """Map every sample of a call to a given row.

    One row serves all samples. Classifier-free guidance repeats the whole batch, so that rows for
    one copy of it serve the others; latents that repeat prove it. Nothing else is inferred: for
    several images per prompt, pipelines repeat prompts and masks in different orders.

    Args:
        given: the number of rows.
        latents: `(B, ...)`, or a list of B tensors.

    Returns:
        `(B,)` indices into the rows; None where the rows are the samples.

    Raises:
        ValueError: for another number of rows, or latents that do not prove the repetition.

    Example:
        >>> sample_index(2, torch.tensor([[1.0], [2.0], [1.0], [2.0]])).tolist()
        [0, 1, 0, 1]
    """
    needed = len(latents)
    if given == needed:
        return None
    if given == 1:
        return torch.zeros(needed, dtype=torch.long, device=latents[0].device if needed else None)
    if given and needed > given and needed % given == 0 and _repeats(latents, needed // given):
        return torch.arange(given, device=latents[0].device).repeat(needed // given)
    raise ValueError(
        f"Expected a mask, or routing weights, for the {needed} samples of the call, for one (that "
        f"serves all), or for a batch that guidance repeats as a whole, but got {given}. Give one "
        "for each sample, in the order of the call's latents. For n images of every prompt, "
        "pipelines repeat prompts as mask.repeat_interleave(n, dim=0) would, and the masks that "
        "they are given themselves as mask.repeat(n, 1, 1, 1)."
    )


def _repeats(latents: Tensor | list[Tensor], copies: int) -> bool:
    """Return whether the latents are copies of one batch whose samples are not all alike."""
    if isinstance(latents, list):
        if len({sample.shape for sample in latents}) > 1:
            period = len(latents) // copies
            return all(torch.equal(a, b) for a, b in zip(latents, latents[period:], strict=False))
        latents = torch.stack(latents)
    parts = latents.unflatten(0, (copies, -1))
    # One noise for all samples fits every order.
    return bool((parts == parts[:1]).all() & (latents != latents[:1]).any())
