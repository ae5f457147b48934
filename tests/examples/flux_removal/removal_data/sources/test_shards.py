"""Shards are read in full batches, each sample by one process and worker, from any position."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

import check_data
import train
from options.parsing import parse_options
from removal_data.batches import batch_stream
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions
from removal_data.sources.shards import ShardBatches, list_shards, read_shard

pytestmark = pytest.mark.slow

SIZES = ((32, 32), (32, 32), (48, 32))


def encode(array: np.ndarray, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind)
    return data.getvalue()


def files_of(index: int) -> dict[str, bytes]:
    """Return the files of a sample, whose color says its index."""
    width, height = SIZES[index % 3]
    color = np.full((height, width, 3), index, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[8:20, 8:20] = 255
    target = color.copy()
    target[8:20, 8:20] += 100
    parts = {"src.png": color, "mask.png": mask, "result.png": target}
    return {name: encode(values) for name, values in parts.items()} | {"json": b"{}"}


def write_tar(file: Any, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, files in samples.items():
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write four shards of six samples."""
    for number in range(4):
        samples = {f"part/{i:03d}": files_of(i) for i in range(6 * number, 6 * number + 6)}
        with (tmp_path / f"{number}.tar").open("wb") as file:
            write_tar(file, samples)
    return tmp_path


def build(source: Path | str, batch_size: int = 2, **further: Any) -> ShardBatches:
    return ShardBatches(f"shards:{source}", DataOptions(), batch_size, **({"seed": 0} | further))


def indices(batch: dict[str, torch.Tensor]) -> list[int]:
    return (batch["src"][:, 0, 0, 0] * 255).round().int().tolist()


def test_samples_are_what_a_folder_gives(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for index in range(24):
        for name, content in files_of(index).items():
            part, _, suffix = name.partition(".")
            if suffix:
                (folder / part).mkdir(parents=True, exist_ok=True)
                (folder / part / f"{index:03d}.{suffix}").write_bytes(content)
    dataset = RemovalDataset(folder)
    for batch in islice(build(shards), 8):
        for row, index in enumerate(indices(batch)):
            for name, value in dataset[index].items():
                assert torch.equal(batch[name][row], value)


def test_every_pass_deals_each_sample_once_in_another_order(shards: Path) -> None:
    # Batches of one never wait for samples of their size.
    dealt = [indices(batch)[0] for batch in islice(build(shards, 1), 48)]
    assert sorted(dealt[:24]) == sorted(dealt[24:]) == list(range(24))
    assert dealt[:24] != dealt[24:]
    assert dealt[:24] != sorted(dealt[:24])
    other = [indices(batch)[0] for batch in islice(build(shards, 1, seed=1), 24)]
    assert other != dealt[:24]


def test_batches_are_full_and_of_one_size(shards: Path) -> None:
    for batch in islice(build(shards, 4), 10):
        assert len(batch["src"]) == 4
        assert len({SIZES[index % 3] for index in indices(batch)}) == 1


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_shards(shards: Path, processes: int) -> None:
    shares = []
    for process in range(processes):
        deal = build(shards, 1, process=process, processes=processes)
        shares += [indices(batch)[0] for batch in islice(deal, 24 // processes)]
    assert Counter(shares) == Counter(range(24))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5])
def test_a_stream_can_be_taken_up_anywhere(shards: Path, workers: int, start: int) -> None:
    whole, rest = build(shards, workers=workers), build(shards, workers=workers)
    rest.start = start
    expected = [indices(b) for b in islice(batch_stream(whole, whole, workers=workers), 9)]
    found = [indices(b) for b in islice(batch_stream(rest, rest, workers=workers), 9 - start)]
    assert found == expected[start:]


def test_workers_share_the_shards(shards: Path) -> None:
    deal = build(shards, 1, workers=2)
    dealt = [indices(b)[0] for b in islice(batch_stream(deal, deal, workers=2), 24)]
    assert Counter(dealt) == Counter(range(24))


def test_less_shards_than_workers_raise(shards: Path) -> None:
    with pytest.raises(ValueError, match="each of 6 workers, but got 4"):
        build(shards, processes=3, workers=2)


def test_shards_are_found_by_folder_pattern_and_url(shards: Path) -> None:
    assert len(list_shards(f"shards:{shards}")) == 4
    assert len(list_shards(f"shards:{shards}/[01].tar")) == 2
    with pytest.raises(FileNotFoundError, match="Expected shards"):
        list_shards(f"shards:{shards / 'absent'}")
    with fsspec.open("memory://remote/a.tar", "wb") as file:
        write_tar(file, {"7": files_of(7)})
    (shard,) = list_shards("shards:memory://remote")
    (sample,) = read_shard(shard)
    assert sample.files["src.png"] == files_of(7)["src.png"]


def test_shards_of_the_webdataset_library(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for index in range(3):
            writer.write({"__key__": f"{index}"} | files_of(index))
    found = list(read_shard(list_shards(f"shards:{tmp_path}")[0]))
    for index, sample in enumerate(found):
        expected = {name: data for name, data in files_of(index).items() if name != "json"}
        assert sample.files == expected
    assert len(found) == 3


def test_a_broken_sample_is_named_or_left_out(tmp_path: Path) -> None:
    broken = files_of(1) | {"result.png": files_of(1)["result.png"][:60]}
    with (tmp_path / "a.tar").open("wb") as file:
        write_tar(file, {"x": files_of(0), "y": broken, "z": files_of(3)})
    with pytest.raises(ValueError, match=r"Cannot use sample .*y of .*a\.tar: .*result"):
        list(islice(build(tmp_path, 1), 3))
    with pytest.warns(UserWarning, match=r"y of .*a\.tar.*left out"):
        dealt = list(islice(build(tmp_path, 1, skip_broken=True), 4))
    assert {indices(batch)[0] for batch in dealt} == {0, 3}


def test_a_run_trains_on_shards_and_goes_on(
    arguments: Callable[..., list[str]], shards: Path, tmp_path: Path
) -> None:
    data = f"shards:{shards}"
    assert train.train(parse_options(arguments(train_data_dir=data, max_train_steps=1))).is_dir()
    flags = arguments(train_data_dir=data, max_train_steps=3, resume_from_checkpoint="latest")
    assert train.train(parse_options(flags)).name == "checkpoint-3"


@pytest.mark.parametrize("flags", [[], ["--max_train_steps", "3", "--cache_latents"]])
def test_what_shards_cannot_do_raises(flags: list[str]) -> None:
    with pytest.raises(ValueError, match="data in shards"):
        parse_options(["--train_data_dir", "shards:data", *flags])


def test_shards_cannot_be_listed(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data.main([f"shards:{shards}"]) == 2
    assert "only train.py reads shards" in capsys.readouterr().err
