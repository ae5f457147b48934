"""The data of a run: a checked data set or streamed shards, and the order of their batches."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from flux_fill.models import Conditioner
from options.train_options import TrainOptions
from removal_data.batches import BucketBatches, LatentEncoder, batch_stream, image_sizes
from removal_data.cache import CachedDataset, fill_cache
from removal_data.checks.before_training import open_checked
from removal_data.dataset import RemovalDataset
from removal_data.held_out import split
from removal_data.sources.shards import ShardBatches


class TrainingData:
    """Data of a run.

    Attributes:
        kinds: of removal of the samples.
        captions: prompts of all samples, those of the validation included.
        validation: the held-out scenes; None for a run without validation.
        description: a sentence for the model card.
        order: everything that the order of the data depends on; a run resumes it only unchanged.
        steps_per_epoch: optimizer steps of one pass over the data.
        total_steps: optimizer steps of the run.
    """

    options: TrainOptions
    captions: Sequence[str] = ()
    kinds: Sequence[str] = ()
    validation: RemovalDataset | None = None
    description: str
    order: dict[str, int]
    steps_per_epoch: int
    total_steps: int

    def _describe(self, counted: str) -> str:
        """Return a sentence about what was counted, and where it is from, without its path."""
        data = self.options.train_data_dir
        name = Path(data).name if Path(data).exists() else data
        held = f"; {len(self.validation)} held-out triplets" if self.validation else ""
        return f"{counted} of `{name}`{held}."

    def _share_captions(self, captions: Sequence[str]) -> None:
        """Set the captions of training and validation, which have indices in one list."""
        self.captions = captions
        if self.validation is not None:
            self.captions = list(dict.fromkeys([*captions, *self.validation.captions]))
            self.validation = self.validation.with_captions(self.captions)

    @abstractmethod
    def stream(
        self, position: int, encoder: LatentEncoder, conditioner: Conditioner
    ) -> Iterator[dict[str, Tensor]]:
        """Return the batches of this process without end.

        Args:
            position: number of batches that the run has used.
            encoder: fills the cache of latents.
            conditioner: fills the cache of embeddings.
        """


def open_data(options: TrainOptions, accelerator: Accelerator) -> TrainingData:
    """Check and open the data of a run; called before any model is loaded."""
    kind = StreamedData if options.streamed else CheckedData
    return kind(options, accelerator)


class CheckedData(TrainingData):
    """A data set whose samples are known and were checked."""

    def __init__(self, options: TrainOptions, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self.dataset = _open(options.train_data_dir, options, accelerator)
        self.validation = _open_validation(options, accelerator)
        if options.validation_share:
            parts = split(self.dataset, options.validation_share, options.validation_seed)
            self.dataset, self.validation = parts
        self.kinds = self.dataset.kinds
        self._share_captions(self.dataset.captions)
        self.description = self._describe(f"{len(self.dataset)} triplets")
        self.batches = BucketBatches(
            image_sizes(self.dataset),
            options.batch_size,
            seed=options.seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            shares=[sample.share for sample in self.dataset.samples],
            fill=True,
        )
        self.order = _order(options, accelerator, len(self.dataset))
        batches = self.batches.batches_per_epoch
        self.steps_per_epoch = math.ceil(batches / options.gradient_accumulation_steps)
        epochs = options.num_train_epochs * self.steps_per_epoch
        self.total_steps = options.max_train_steps or epochs

    def stream(
        self, position: int, encoder: LatentEncoder, conditioner: Conditioner
    ) -> Iterator[dict[str, Tensor]]:
        options = self.options
        source: Dataset[dict[str, Tensor]] = self.dataset
        if options.cache_latents:
            folder = Path(options.cache_dir or Path(options.output_dir) / "cache")
            cached = CachedDataset(self.dataset, encoder, conditioner, folder)
            source = fill_cache(cached, self.accelerator)
        self.batches.start = position
        return batch_stream(source, self.batches, workers=options.dataloader_num_workers)


class StreamedData(TrainingData):
    """Shards, which have no epochs, captions or cache and are checked sample by sample."""

    def __init__(self, options: TrainOptions, accelerator: Accelerator) -> None:
        assert options.max_train_steps is not None  # checked with the options
        self.options, self.workers = options, options.dataloader_num_workers
        self.validation = _open_validation(options, accelerator)
        self._share_captions(())
        self.batches = ShardBatches(
            options.train_data_dir,
            options,
            options.batch_size,
            seed=options.seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            workers=self.workers,
            skip_broken=options.skip_broken,
        )
        self.order = _order(options, accelerator, len(self.batches.shards))
        self.description = self._describe(f"{len(self.batches.shards)} shards")
        self.steps_per_epoch = self.total_steps = options.max_train_steps

    def stream(
        self, position: int, encoder: LatentEncoder, conditioner: Conditioner
    ) -> Iterator[dict[str, Tensor]]:
        self.batches.start = position
        return batch_stream(self.batches, self.batches, workers=self.workers)


def _open(source: str, options: TrainOptions, accelerator: Accelerator) -> RemovalDataset:
    return open_checked(
        source,
        options,
        batch_size=options.batch_size,
        pixels=options.check_data == "all",
        skip_broken=options.skip_broken,
        accelerator=accelerator,
    )


def _open_validation(options: TrainOptions, accelerator: Accelerator) -> RemovalDataset | None:
    source = options.validation_data_dir
    return None if source is None else _open(source, options, accelerator)


def _order(options: TrainOptions, accelerator: Accelerator, samples: int) -> dict[str, int]:
    return {
        "seed": options.seed,
        "batch_size": options.batch_size,
        "processes": accelerator.num_processes,
        "samples": samples,
    }
