"""Hold out samples of the training data for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from removal_data.dataset import RemovalDataset
from removal_data.sources.samples import Sample


def hold_out(samples: Sequence[Sample], share: float, seed: int) -> set[str]:
    """Choose a share of the samples by hashes of their names.

    The choice does not depend on the order of the samples, and hardly changes when samples are
    added. Samples with the same target are chosen together, so that training sees no held-out one.

    Args:
        samples: at least two targets.
        share: in (0, 1); at least one target is chosen, and at least one is left.
        seed: another seed, another choice.

    Returns:
        The names of the chosen samples.

    Raises:
        ValueError: when there are fewer than two targets.
    """
    targets: dict[str, list[str]] = {}
    for sample in samples:
        targets.setdefault(str(sample.files["result"]), []).append(sample.name)
    groups = sorted(targets.values(), key=lambda names: _hash(min(names), seed))
    if len(groups) < 2:
        raise ValueError(
            f"Expected at least two targets with `validation_share`, but got {len(groups)}."
        )
    chosen: set[str] = set()
    for names in groups[:-1]:
        chosen |= set(names)
        if len(chosen) >= round(share * len(samples)):
            break
    return chosen


def split(
    dataset: RemovalDataset, share: float, seed: int
) -> tuple[RemovalDataset, RemovalDataset]:
    """Return the part of a data set to train on, and the part that is held out."""
    chosen = hold_out(dataset.samples, share, seed)
    parts: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(dataset.stems):
        parts[name in chosen].append(index)
    return dataset.subset(parts[0]), dataset.subset(parts[1])


def spread(dataset: RemovalDataset, most: int) -> RemovalDataset:
    """Return at most `most` samples of a data set, at even distances."""
    count = min(most, len(dataset))
    return dataset.subset([index * len(dataset) // count for index in range(count)])


def _hash(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
