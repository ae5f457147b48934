"""Keep what the frozen models make of the data on disk: latents and prompt embeddings."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from flux_fill.models import Conditioner
from removal_data.batches import BucketBatches, LatentEncoder, image_sizes
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions

IMAGES = ("src", "result", "mask")
"""Kept with 8 bits, which is what was read."""

SHARD_BYTES = 2**28


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the values of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def sample_key(dataset: RemovalDataset, index: int, models: str) -> str:
    """Return the key of a sample in the cache; it changes with all that changes the entry.

    Args:
        dataset: of the sample.
        index: in the data set.
        models: a hash of the models that make the entry.
    """
    sample = dataset.samples[index]
    states = {part: path.stat() for part, path in sample.files.items()}
    said = {
        "files": {
            part: (str(path.resolve()), states[part].st_size, states[part].st_mtime_ns)
            for part, path in sample.files.items()
        },
        "bucket": dataset.buckets[index] if dataset.buckets else None,
        "options": {
            name: getattr(dataset.reading, name) for name in DataOptions.__dataclass_fields__
        },
        "caption": sample.caption,
        "models": models,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


class LatentCache:
    """Read and write tensors by key, in shards of safetensors files.

    Several processes may write at the same time, each to its own shards. A shard appears when it is
    complete.

    Args:
        folder: of the shards; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, Path] = {}
        self.names: dict[str, list[str]] = {}
        self.opened: dict[Path, Any] = {}
        self.waiting: dict[str, Tensor] = {}

    def find(self) -> None:
        """Read which keys the shards hold, from their headers."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self.opened:
                continue
            with safe_open(path, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (a shard is no mapping)
                    key, _, part = name.partition("/")
                    if self.shards.setdefault(key, path) == path:
                        self.names.setdefault(key, []).append(part)
            self.opened[path] = None

    def __contains__(self, key: str) -> bool:
        return key in self.shards

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        path = self.shards[key]
        if self.opened.get(path) is None:
            self.opened[path] = safe_open(path, "pt")
        return {part: self.opened[path].get_tensor(f"{key}/{part}") for part in self.names[key]}

    def add(self, key: str, entry: dict[str, Tensor]) -> None:
        """Add an entry, and write a shard when enough wait."""
        self.waiting |= {f"{key}/{part}": value.contiguous() for part, value in entry.items()}
        if sum(value.nbytes for value in self.waiting.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file(self.waiting, part)
        part.replace(path)
        self.waiting = {}


class CachedDataset(Dataset[dict[str, Tensor]]):
    """Read samples with VAE moments and prompt embeddings from a cache on disk.

    Latents are drawn anew from the moments every time. Nothing is kept in memory.

    Args:
        dataset: of the samples.
        encoder: makes the moments.
        conditioner: makes the prompt embeddings, where samples have their own.
        folder: of the cache.
    """

    def __init__(
        self,
        dataset: RemovalDataset,
        encoder: LatentEncoder,
        conditioner: Conditioner,
        folder: Path,
    ) -> None:
        self.dataset, self.cache = dataset, LatentCache(folder)
        self.encoder, self.conditioner = encoder, conditioner
        models = digest([*encoder.vae.state_dict().values(), *conditioner.weights()])
        self.keys = [sample_key(dataset, index, models) for index in range(len(dataset))]
        self.cache.find()

    def fill(self, *, process: int = 0, processes: int = 1, batch_size: int = 16) -> int:
        """Encode this process's share of what the cache lacks; it may be interrupted at any time.

        The shares do not depend on what the cache holds, which another process may have filled
        already. Afterwards all processes have to wait for each other, and call `refresh`.

        Args:
            process: the index of this process.
            processes: their number.
            batch_size: samples that are encoded at a time.

        Returns:
            How many samples were encoded.
        """
        share = range(process, len(self.keys), processes)
        mine = [index for index in share if self.keys[index] not in self.cache]
        sizes = image_sizes(self.dataset)
        deal = BucketBatches([sizes[i] for i in mine], batch_size, seed=0) if mine else None
        batches = deal.epoch(0) if deal else []
        for places in tqdm(batches, desc="encoding", disable=process > 0 or not batches):
            self.encode([mine[place] for place in places])
        self.cache.flush()
        return len(mine)

    def encode(self, indices: list[int]) -> None:
        """Add samples of one size to the cache."""
        items = [self.dataset[index] for index in indices]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        made = self.encoder.batch_moments(batch)
        if self.conditioner.by_sample:
            embeds, pooled = self.conditioner(batch["ref"], batch.get("caption"))
            made |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        made = {name: value.cpu() for name, value in made.items()}
        made |= {name: (batch[name] * 255).round().byte() for name in IMAGES}
        for row, index in enumerate(indices):
            self.cache.add(self.keys[index], {name: value[row] for name, value in made.items()})

    def refresh(self) -> None:
        """Read what all processes have written."""
        self.cache.find()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        entry = self.cache[self.keys[index]]
        images = {name: entry[name].float() / 255 for name in IMAGES}
        return entry | images | self.dataset.kind_at(index)


def fill_cache(data: CachedDataset, accelerator: Accelerator) -> CachedDataset:
    """Encode what a cache lacks in all processes, and return the data set that reads it."""
    data.fill(process=accelerator.process_index, processes=accelerator.num_processes)
    accelerator.wait_for_everyone()
    data.refresh()
    return data
