"""The cache on disk holds what the models make, once, for all processes, and can be completed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader
from two_processes import run_in_two_processes

import train
from flux_fill.models import Conditioner, load_pipeline
from removal_data import cache as cache_module
from removal_data.batches import LatentEncoder
from removal_data.cache import CachedDataset
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions

pytestmark = pytest.mark.slow


def build(
    model: Path, data: Path, folder: Path, *, redux: Path | None = None, **options: Any
) -> CachedDataset:
    pipe = load_pipeline(str(model))
    conditioner = Conditioner(pipe, redux_id=str(redux) if redux else None)
    dataset = RemovalDataset(data, reading=DataOptions(**options))
    return CachedDataset(dataset, LatentEncoder(pipe), conditioner, folder)


def filled(*given: Path, **options: Any) -> tuple[CachedDataset, int]:
    data = build(*given, **options)
    count = data.fill(batch_size=2)
    data.refresh()
    return data, count


def stored(folder: Path) -> list[str]:
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            names += list(shard.keys())
    return names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_sample_gives_the_latents_of_a_fresh_one(
    random_flux_fill: Path, triplets: Path, tmp_path: Path, workers: int
) -> None:
    data, count = filled(random_flux_fill, triplets, tmp_path)
    assert count == len(data) == 5
    for index, entry in enumerate(DataLoader(data, num_workers=workers)):
        fresh = {name: value[None] for name, value in data.dataset[index].items()}
        found = []
        for batch in (fresh, entry):
            torch.manual_seed(1)
            found.append(data.encoder(batch))
        torch.testing.assert_close(found[0].x0, found[1].x0)
        torch.testing.assert_close(found[0].condition, found[1].condition)
        for name in ("src", "result", "mask"):
            torch.testing.assert_close(entry[name], fresh[name], rtol=0, atol=1e-7)
        torch.manual_seed(2)
        assert not torch.equal(data.encoder(entry).x0, found[1].x0)


def test_redux_embeddings_are_cached_per_sample(
    random_flux_fill: Path, triplets: Path, tmp_path: Path, redux: Path
) -> None:
    data, _ = filled(random_flux_fill, triplets, tmp_path, redux=redux)
    for index in (0, 3):
        entry = {name: value[None] for name, value in data[index].items()}
        expected = data.conditioner(data.dataset[index]["ref"][None])
        found = data.conditioner.of_batch(entry)
        assert all(map(torch.equal, found, expected))
        assert "ref" not in entry
    assert not torch.equal(data[0]["prompt_embeds"], data[3]["prompt_embeds"])


def test_nothing_is_encoded_twice(
    random_flux_fill: Path, triplets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(random_flux_fill, triplets, tmp_path)
    before = sorted(stored(tmp_path))

    def fail(*given: Any) -> None:
        raise AssertionError("A sample was encoded again.")

    monkeypatch.setattr(LatentEncoder, "moments", fail)
    assert filled(random_flux_fill, triplets, tmp_path)[1] == 0
    assert sorted(stored(tmp_path)) == before


def test_an_interrupted_cache_is_completed(
    random_flux_fill: Path, triplets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)  # a shard for every sample
    data, encode = build(random_flux_fill, triplets, tmp_path), CachedDataset.encode

    def stop(self: CachedDataset, indices: list[int]) -> None:
        if len(stored(tmp_path)) >= 2 * 5:
            raise KeyboardInterrupt
        encode(self, indices)

    monkeypatch.setattr(CachedDataset, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        data.fill(batch_size=1)
    (tmp_path / "half.1234.part").write_bytes(b"killed while writing")
    monkeypatch.setattr(CachedDataset, "encode", encode)
    assert filled(random_flux_fill, triplets, tmp_path)[1] == 3


def test_processes_share_the_work(random_flux_fill: Path, triplets: Path, tmp_path: Path) -> None:
    shares = [build(random_flux_fill, triplets, tmp_path) for _ in range(2)]
    counts = [data.fill(process=index, processes=2) for index, data in enumerate(shares)]
    assert counts == [3, 2]
    names = stored(tmp_path)
    assert len(names) == len(set(names)) == 5 * 5
    for data in shares:
        data.refresh()
        assert all(key in data.cache for key in data.keys)


def change_mask(folder: Path) -> None:
    path = folder / "mask" / "000.png"
    mask = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mask.save(path)
    os.utime(path, ns=(1, 1))


def test_what_changed_is_encoded_again(
    random_flux_fill: Path, guided_flux_fill: Path, triplets: Path, tmp_path: Path
) -> None:
    data, folder = tmp_path / "data", tmp_path / "cache"
    for path in triplets.rglob("*.png"):
        copy = data / path.relative_to(triplets)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert filled(random_flux_fill, data, folder)[1] == 5
    change_mask(data)
    assert filled(random_flux_fill, data, folder)[1] == 1
    assert filled(random_flux_fill, data, folder, grow_mask=1)[1] == 5
    assert filled(random_flux_fill, data, folder, resolution=64)[1] == 5
    assert filled(random_flux_fill, data, folder)[1] == 0
    pipe = load_pipeline(str(random_flux_fill))
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "other")
    assert filled(tmp_path / "other", data, folder)[1] == 5


def test_the_shares_of_processes_do_not_depend_on_who_comes_first(
    random_flux_fill: Path, triplets: Path, tmp_path: Path
) -> None:
    first = build(random_flux_fill, triplets, tmp_path / "cache")
    assert first.fill(process=0, processes=2, batch_size=2) == 3
    second = build(random_flux_fill, triplets, tmp_path / "cache")
    assert second.fill(process=1, processes=2, batch_size=2) == 2
    for data in (first, second):
        data.refresh()
        assert all(key in data.cache for key in data.keys)


def test_two_processes_fill_one_cache_and_train(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    flags = arguments(cache_latents=True, cache_dir=tmp_path / "cache", batch_size=1)
    run_in_two_processes(train.__file__, *flags)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    assert len({name.partition("/")[0] for name in stored(tmp_path / "cache")}) == 5
    log = (tmp_path / "logs" / "training.log").read_text()
    assert len(re.findall(r"Step \d/2", log)) == 2


def test_embeddings_of_captions_are_cached_and_a_new_caption_leaves_the_others(
    random_flux_fill: Path, triplets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_prompt(text: str, **given: Any) -> tuple[torch.Tensor, ...]:
        length = float(len(text))
        return torch.full((1, 5, 8), length), torch.full((1, 8), -length), torch.zeros(5, 3)

    def fill(captions: list[str]) -> tuple[CachedDataset, int]:
        rows = [
            {part: str(triplets / part / f"{index:03d}.png") for part in ("src", "mask", "result")}
            | {"caption": caption}
            for index, caption in enumerate(captions)
        ]
        (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pipe = load_pipeline(str(random_flux_fill))
        pipe.register_modules(text_encoder=nn.Linear(1, 1), text_encoder_2=nn.Linear(1, 1))
        monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
        dataset = RemovalDataset(tmp_path)
        conditioner = Conditioner(pipe, captions=dataset.captions)
        data = CachedDataset(dataset, LatentEncoder(pipe), conditioner, tmp_path / "cache")
        count = data.fill()
        data.refresh()
        return data, count

    data, count = fill(["a", "bcd"])
    assert count == 2
    assert data[1]["prompt_embeds"].unique().tolist() == [3.0]
    assert data[0]["pooled_prompt_embeds"].unique().tolist() == [-1.0]
    data, count = fill(["a", "bcdef", "gh"])
    assert count == 2
    found = [data[index]["prompt_embeds"].unique().tolist() for index in range(3)]
    assert found == [[1.0], [5.0], [2.0]]
