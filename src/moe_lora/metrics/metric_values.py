"""Values of a metric per sample, with absent samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MetricValues:
    """Values of a metric per sample, and the number of pixels behind each value.

    A sample without the region has 0 pixels; its entry in `values` is an arbitrary 0. `tolist`
    returns `None` for it, and `mean` excludes it.

    Args:
        values: `(B,)`, float64, finite.
        pixels: `(B,)`, int64; pixels of the region, or pairs of pixels for `seam_error`.

    Example:
        >>> found = MetricValues(torch.tensor([20.0, 0.0, 30.0]), torch.tensor([64, 0, 8]))
        >>> found.tolist(), found.mean()
        ([20.0, None, 30.0], 25.0)
        >>> found.mean(least=16)
        20.0
    """

    values: Tensor
    pixels: Tensor

    def present(self, least: int = 1) -> Tensor:
        """Return the samples whose region has at least `least` pixels, `(B,)`, bool."""
        return self.pixels >= least

    def tolist(self, least: int = 1) -> list[float | None]:
        """Return the values as numbers; `None` for a region of fewer than `least` pixels."""
        pairs = zip(self.values.tolist(), self.present(least).tolist(), strict=True)
        return [value if there else None for value, there in pairs]

    def mean(self, least: int = 1) -> float | None:
        """Average over the samples whose region has at least `least` pixels.

        Args:
            least: smallest region in pixels.

        Returns:
            The mean, or `None` without such a sample.
        """
        there = self.present(least)
        return float(self.values[there].mean()) if bool(there.any()) else None

    def mean_by(self, labels: Sequence[str], least: int = 1) -> dict[str, float | None]:
        """Average over groups of samples.

        Args:
            labels: one label per sample; samples with equal labels form a group.
            least: smallest region in pixels.

        Returns:
            The mean of every group, in the order of first appearance; `None` for a group without
            such a sample.

        Raises:
            ValueError: if the number of labels is not B.

        Example:
            >>> found = MetricValues(torch.tensor([20.0, 30.0, 24.0]), torch.tensor([9, 9, 9]))
            >>> found.mean_by(["box", "stroke", "box"])
            {'box': 22.0, 'stroke': 30.0}
        """
        if len(labels) != len(self.values):
            raise ValueError(
                f"Expected `labels` to have one entry for each of {len(self.values)} samples, "
                f"but got {len(labels)}."
            )
        groups: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            groups.setdefault(label, []).append(index)
        return {
            label: MetricValues(self.values[chosen], self.pixels[chosen]).mean(least)
            for label, chosen in groups.items()
        }


def join(batches: Iterable[dict[str, MetricValues]]) -> dict[str, MetricValues]:
    """Concatenate the metrics of several batches.

    Args:
        batches: outputs of `measure`, with the same names in each.

    Returns:
        The metrics of all samples, in order.

    Raises:
        ValueError: if there is no batch, or the names differ between batches.

    Example:
        >>> one = {"psnr/whole": MetricValues(torch.tensor([20.0]), torch.tensor([4]))}
        >>> join([one, one])["psnr/whole"].tolist()
        [20.0, 20.0]
    """
    parts = list(batches)
    if not parts:
        raise ValueError("Expected `batches` to contain at least one batch, but got none.")
    names = list(parts[0])
    for part in parts:
        if set(part) != set(names):
            differing = sorted(set(part) ^ set(names))
            raise ValueError(
                f"Expected all `batches` to have the same names, but got {differing} in some only."
            )
    return {
        name: MetricValues(
            torch.cat([part[name].values for part in parts]),
            torch.cat([part[name].pixels for part in parts]),
        )
        for name in names
    }
