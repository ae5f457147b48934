"""Assignment of given rows to the samples of a call."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_index(given: int, latents: Tensor | list[Tensor]) -> Tensor | None:
    """Map every sample of a call to a row of given masks or weights.

    One row applies to all samples. Classifier-free guidance repeats the whole batch: if the latents
    repeat too, the rows of one copy apply to the others. Nothing else is inferred: for several
    images per prompt, pipelines repeat prompts and masks in different orders.

    Args:
        given: the number of rows.
        latents: `(B, ...)`, or a list of B tensors.

    Returns:
        `(B,)` indices into the rows; `None` when there is one row per sample.

    Raises:
        ValueError: for another number of rows, or latents that do not repeat.

    Example:
        >>> sample_index(2, torch.tensor([[1.0], [2.0], [1.0], [2.0]])).tolist()
        [0, 1, 0, 1]
    """
    needed = len(latents)
    if given == needed:
        return None
    if given == 1:
        return torch.zeros(needed, dtype=torch.long, device=latents[0].device if needed else None)
    if (
        given
        and needed > given
        and needed % given == 0
        and _is_repeated_batch(latents, needed // given)
    ):
        return torch.arange(given, device=latents[0].device).repeat(needed // given)
    raise ValueError(
        f"Expected a mask, weights or hints, for the {needed} samples of the call, for one "
        f"sample (used for all), or for a batch that guidance repeats as a whole, but got {given}. "
        "Pass one per sample, in the order of the call's latents. For n images per prompt, "
        "pipelines repeat prompts like mask.repeat_interleave(n, dim=0), but their own masks like "
        "mask.repeat(n, 1, 1, 1)."
    )


def _is_repeated_batch(latents: Tensor | list[Tensor], copies: int) -> bool:
    """Return whether the latents are copies of one batch with different samples."""
    if isinstance(latents, list):
        if len({sample.shape for sample in latents}) > 1:
            period = len(latents) // copies
            return all(torch.equal(a, b) for a, b in zip(latents, latents[period:], strict=False))
        latents = torch.stack(latents)
    parts = latents.unflatten(0, (copies, -1))
    # The same noise in all samples is consistent with every order.
    return bool((parts == parts[:1]).all() & (latents != latents[:1]).any())
