"""Stream samples from tar files in the layout of WebDataset, split over processes and workers."""

from __future__ import annotations

import dataclasses
import random
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec.core
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from removal_data.batches import image_sizes
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions
from removal_data.sources.samples import PARTS

SCHEME = "shards:"

BUFFER = 256
"""Encoded samples from which the next one is drawn."""


class EncodedSample(NamedTuple):
    """The files of a sample as they are in a shard: bytes by part and suffix, `src.jpg`."""

    place: str
    files: dict[str, bytes]


def list_shards(source: str) -> list[fsspec.core.OpenFile]:
    """List the shards of a folder, a pattern, or a URL that fsspec knows.

    Raises:
        FileNotFoundError: when there are none.
    """
    pattern = source.removeprefix(SCHEME)
    pattern = pattern if pattern.endswith(".tar") else f"{pattern.rstrip('/')}/*.tar"
    system, path = fsspec.core.url_to_fs(pattern)
    found = [fsspec.core.OpenFile(system, name) for name in sorted(system.glob(path))]
    if not found:
        raise FileNotFoundError(f"Expected shards at {pattern}, but got none.")
    return found


def read_shard(shard: fsspec.core.OpenFile) -> Iterator[EncodedSample]:
    """Read the samples of a shard: consecutive files `NAME.PART.SUFFIX`, no other parts."""
    name: tuple[str, str] | None = None
    files: dict[str, bytes] = {}
    with shard as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, rest = base.partition(".")
            if (folder, stem) != name and files:
                yield EncodedSample(f"{'/'.join(name or ())} of {shard.path}", files)
                files = {}
            name = (folder, stem)
            if member.isfile() and rest.partition(".")[0].lower() in PARTS:
                content = tar.extractfile(member)
                files[rest] = content.read() if content else b""
    if files:
        yield EncodedSample(f"{'/'.join(name or ())} of {shard.path}", files)


class ShardBatches(IterableDataset[dict[str, Tensor]]):
    """Deal full batches of one size from shards, without end, and without reading all of them.

    A worker of a process reads its own share of the shards, in an order that changes with every
    pass, and draws samples from a buffer. The batches depend on seed, position and the numbers of
    processes and workers only.

    Args:
        source: `shards:` and a folder, a pattern, or a URL that fsspec knows.
        options: how samples are read; broken ones are left out with `skip_broken`.
        batch_size: samples per batch.
        seed: another seed, another order.
        process: the index of this process.
        processes: their number.
        workers: those of the loader in each process.
        skip_broken: warn of broken samples instead of raising.

    Raises:
        FileNotFoundError: when there are no shards.
        ValueError: when there are less shards than workers.
    """

    def __init__(
        self,
        source: str,
        options: DataOptions,
        batch_size: int,
        *,
        seed: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        skip_broken: bool = False,
    ) -> None:
        self.shards, self.options = list_shards(source), options
        self.batch_size, self.seed, self.skip_broken = batch_size, seed, skip_broken
        self.process, self.processes, self.start = process, processes, 0
        readers = processes * max(1, workers)
        if len(self.shards) < readers:
            raise ValueError(
                f"Expected a shard or more for each of {readers} workers, but got "
                f"{len(self.shards)}."
            )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        count = info.num_workers if info else 1
        # The loader begins with worker 0, wherever a run is taken up.
        worker = ((info.id if info else 0) + self.start) % count
        skipped = len(range(worker, self.start, count))
        for number, samples in enumerate(self._batches(worker, count)):
            if number >= skipped:
                yield self._stack(samples)

    def _samples(self, worker: int, count: int) -> Iterator[EncodedSample]:
        """Read the share of a worker again and again, in an order drawn from seed and pass."""
        share = self.shards[self.process :: self.processes][worker::count]
        draw = random.Random(f"{self.seed}/{self.process}/{worker}")
        buffer: list[EncodedSample] = []
        while True:
            for shard in draw.sample(share, len(share)):
                for sample in read_shard(shard):
                    buffer.append(sample)
                    if len(buffer) > BUFFER:
                        yield buffer.pop(draw.randrange(len(buffer)))
            while buffer:
                yield buffer.pop(draw.randrange(len(buffer)))

    def _batches(self, worker: int, count: int) -> Iterator[list[EncodedSample]]:
        """Collect samples until there is a batch of one size."""
        waiting: dict[tuple[int, int], list[EncodedSample]] = {}
        for sample in self._samples(worker, count):
            size = self._size(sample)
            if size is None:
                continue
            batch = waiting.setdefault(size, [])
            batch.append(sample)
            if len(batch) == self.batch_size:
                yield waiting.pop(size)

    def _open(self, sample: EncodedSample, folder: str) -> RemovalDataset:
        """Write the files of a sample into a folder, and return the data set of it alone."""
        for name, content in sample.files.items():
            part, _, suffix = name.partition(".")
            path = Path(folder) / part.lower() / f"sample.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        options = DataOptions(
            **{
                field.name: getattr(self.options, field.name)
                for field in dataclasses.fields(DataOptions)
            }
        )
        return RemovalDataset(folder, reading=options)

    def _size(self, sample: EncodedSample) -> tuple[int, int] | None:
        """Return the size of a sample's item; None for a broken one that is left out."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                dataset = self._open(sample, folder)
                if self.skip_broken:
                    dataset[0]
                return image_sizes(dataset)[0]
            except (ValueError, FileNotFoundError) as error:
                text = f"Cannot use sample {sample.place}: {error}"
                if not self.skip_broken:
                    raise ValueError(text) from error
                warnings.warn(f"{text} It is left out.", stacklevel=2)
                return None

    def _stack(self, samples: list[EncodedSample]) -> dict[str, Tensor]:
        """Read the images of a batch."""
        items = []
        for sample in samples:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    items.append(self._open(sample, folder)[0])
                except (ValueError, FileNotFoundError) as error:
                    raise ValueError(f"Cannot use sample {sample.place}: {error}") from error
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}
