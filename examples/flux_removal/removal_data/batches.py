"""Batches of one image size, in an order that can be taken up anywhere, and their latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from diffusers import FluxFillPipeline
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from moe_lora import flow, masks
from moe_lora.masks.augmentation import AUGMENTATIONS
from removal_data.dataset import RemovalDataset, source_size


def image_sizes(dataset: RemovalDataset) -> list[tuple[int, int]]:
    """Return the width and height of every item: its bucket, or that of its source."""
    sizes = dataset.buckets or [source_size(sample) for sample in dataset.samples]
    return [(2 * width, height) for width, height in sizes] if dataset.reading.diptych else sizes


class BucketBatches(Sampler[list[int]]):
    """Deal batches of equally sized samples, without end.

    The order depends on seed and position only, so that a run can be taken up anywhere. Every
    process deals its own share, as many batches as the others.

    Args:
        sizes: of all samples; a batch holds samples of one size.
        batch_size: samples per batch; the last of a size in an epoch may be smaller.
        seed: another seed, another order.
        start: how many batches to skip.
        process: the index of this process among `processes`.
        shares: how often every sample is dealt in an epoch, on average; once by default.
        fill: fill the last batch of a size with samples that it already had in this epoch.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
        shares: Sequence[float] | None = None,
        fill: bool = False,
    ) -> None:
        self.shares = [1.0] * len(sizes) if shares is None else list(shares)
        self.fill = fill
        self.buckets: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            self.buckets.setdefault(size, []).append(index)
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.process, self.processes = process, processes
        dealt = sum(math.ceil(self.count(b) / batch_size) for b in self.buckets.values())
        self.batches_per_epoch = math.ceil(dealt / processes)

    def count(self, bucket: list[int]) -> int:
        """Return how many samples of a bucket an epoch deals."""
        return max(1, round(sum(self.shares[index] for index in bucket)))

    def draw(self, bucket: list[int], generator: torch.Generator) -> list[int]:
        """Draw the samples of an epoch from a bucket, each by its share rounded down or up."""
        shares = torch.tensor([self.shares[index] for index in bucket], dtype=torch.float64)
        ends = (shares.cumsum(0) * (self.count(bucket) / shares.sum())).mul(1e9).round().div(1e9)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        ends = torch.cat([torch.zeros(1, dtype=torch.float64), ends])
        times = (ends + offset).floor().diff().long().tolist()
        drawn = [i for i, count in zip(bucket, times, strict=True) for _ in range(count)]
        return [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]

    def epoch(self, number: int) -> list[list[int]]:
        """Return the batches of this process in an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        batches: list[list[int]] = []
        for bucket in self.buckets.values():
            order = self.draw(bucket, generator)
            if self.fill:
                order += list(islice(cycle(order), -len(order) % self.batch_size))
            batches += [
                order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)
            ]
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        wanted = self.batches_per_epoch * self.processes
        batches += [batches[i % len(batches)] for i in range(wanted - len(batches))]
        return batches[self.process :: self.processes]

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while True:
            number, offset = divmod(position, self.batches_per_epoch)
            for batch in self.epoch(number)[offset:]:
                yield batch
                position += 1


class Latents(NamedTuple):
    """Hold what the transformer reads of a batch, but for the noise.

    Attributes:
        x0: packed latents of the wanted result, `(B, T, 4C)`.
        condition: packed latents of the masked source, and the packed mask, `(B, T, 4C + 256)`.
        image_ids: row and column of every token, `(T, 3)`.
        height: of the unpacked latents.
        width: of the unpacked latents.
    """

    x0: Tensor
    condition: Tensor
    image_ids: Tensor
    height: int
    width: int


class LatentEncoder:
    """Encode batches as the stock Fill pipeline does.

    Args:
        pipe: the Fill pipeline.
    """

    def __init__(self, pipe: FluxFillPipeline) -> None:
        self.pipe, self.vae = pipe, pipe.vae

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Return mean and log variance `(B, 2C, h, w)` of images `(B, 3, H, W)` in [-1, 1]."""
        parameters: Tensor = self.vae.encode(
            images.to(self.vae.device, self.vae.dtype)
        ).latent_dist.parameters
        return parameters

    def batch_moments(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the moments of the result and of the source without what is under the mask."""
        masked = (batch["src"] * 2 - 1) * (1 - batch["mask"])  # masked pixels are gray, as 0 is
        return {
            "result_moments": self.moments(batch["result"] * 2 - 1),
            "masked_moments": self.moments(masked),
        }

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Latents:
        """Encode a batch, or draw from the moments that it already has."""
        moments = batch if "result_moments" in batch else self.batch_moments(batch)
        config = self.vae.config
        x0 = (draw(moments["result_moments"]) - config.shift_factor) * config.scaling_factor
        masked = draw(moments["masked_moments"])
        count, channels, height, width = x0.shape
        mask, condition = self.pipe.prepare_mask_latents(
            mask=batch["mask"],
            masked_image=masked,
            batch_size=count,
            num_channels_latents=channels,
            num_images_per_prompt=1,
            height=batch["mask"].shape[-2],
            width=batch["mask"].shape[-1],
            dtype=x0.dtype,
            device=x0.device,
            generator=None,
        )
        ids = self.pipe._prepare_latent_image_ids(
            count, height // 2, width // 2, x0.device, x0.dtype
        )
        condition = torch.cat([condition, mask], dim=-1)
        return Latents(flow.pack_latents(x0), condition, ids, height, width)


def draw(moments: Tensor) -> Tensor:
    """Draw latents `(B, C, h, w)` from the VAE's posterior."""
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
    return mean + deviation * torch.randn_like(mean)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch, its mask made of zeros and ones as the pipeline makes it."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return moved | {"mask": (moved["mask"] >= 0.5).float()}


def seed_at(seed: int, position: int, process: int = 0) -> int:
    """Return the seed of what is drawn for a batch, the same at this position of every run.

    Args:
        seed: of the run.
        position: batches dealt before.
        process: the index of this process.
    """
    return (seed * 1_000_003 + position) * 10_007 + process


def augment_masks(
    batch: dict[str, Tensor],
    share: float,
    generator: torch.Generator,
    *,
    diptych: bool = False,
) -> dict[str, Tensor]:
    """Draw a share of a batch's masks anew.

    Images stay as they are: what a mask that is too tight leaves of the object has to go, too.

    Args:
        batch: with `mask` `(B, 1, H, W)` in [0, 1].
        share: in [0, 1].
        generator: of the draw, on the CPU.
        diptych: whether the left half is a reference, in which no mask may be.
    """
    if not share:
        return batch
    probabilities = dict.fromkeys(AUGMENTATIONS, share / len(AUGMENTATIONS))
    width = batch["mask"].shape[-1]
    left, right = batch["mask"].tensor_split([width // 2 if diptych else 0], dim=-1)
    drawn = masks.augment(right, generator, probabilities=probabilities)
    return batch | {"mask": torch.cat([left, drawn], dim=-1)}


def batch_stream(
    dataset: Dataset[dict[str, Tensor]],
    batches: BucketBatches | IterableDataset[dict[str, Tensor]],
    *,
    workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Return the batches of a data set, without end and without use of the global generator."""
    if isinstance(batches, IterableDataset):
        whole = DataLoader(
            batches, batch_size=None, num_workers=workers, generator=torch.Generator()
        )
        return iter(whole)
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, generator=torch.Generator()
    )
    return iter(loader)
