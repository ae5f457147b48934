from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from flux_fill.models import load_pipeline
from removal_data import batches
from removal_data.batches import (
    BucketBatches,
    LatentEncoder,
    augment_masks,
    batch_stream,
    image_sizes,
    seed_at,
)
from removal_data.dataset import RemovalDataset

SIZES = [(64, 64)] * 5 + [(96, 64)] * 4 + [(64, 96)]


def test_an_epoch_has_every_sample_once_and_one_size_a_batch() -> None:
    deal = BucketBatches(SIZES, 2, seed=0)
    epoch = deal.epoch(0)
    assert sorted(index for batch in epoch for index in batch) == list(range(10))
    assert all(len({SIZES[index] for index in batch}) == 1 for batch in epoch)
    assert len(epoch) == deal.batches_per_epoch == 3 + 2 + 1


def test_the_order_depends_on_seed_and_epoch() -> None:
    deal = BucketBatches(SIZES, 2, seed=0)
    assert deal.epoch(0) == BucketBatches(SIZES, 2, seed=0).epoch(0)
    assert deal.epoch(0) != deal.epoch(1)
    assert deal.epoch(0) != BucketBatches(SIZES, 2, seed=1).epoch(0)


@pytest.mark.parametrize("start", [0, 1, 6, 14])
def test_it_can_be_taken_up_anywhere(start: int) -> None:
    whole = list(islice(BucketBatches(SIZES, 2, seed=3), 20))
    rest = islice(BucketBatches(SIZES, 2, seed=3, start=start), 20 - start)
    assert list(rest) == whole[start:]


def test_processes_share_an_epoch_and_deal_equally_often() -> None:
    shares = [BucketBatches(SIZES, 2, seed=0, process=p, processes=4).epoch(0) for p in range(4)]
    assert [len(share) for share in shares] == [2] * 4
    dealt = [index for share in shares for batch in share for index in batch]
    assert set(dealt) == set(range(10))


def test_batches_are_filled_up_by_samples_of_their_size() -> None:
    deal = BucketBatches(SIZES, 4, seed=0, fill=True)
    epoch = deal.epoch(0)
    assert [len(batch) for batch in epoch] == [4] * deal.batches_per_epoch
    assert {index for batch in epoch for index in batch} == set(range(10))
    assert all(len({SIZES[index] for index in batch}) == 1 for batch in epoch)
    counts = Counter(index for batch in epoch for index in batch)
    assert sorted(counts[index] for index in range(5)) == [1, 1, 2, 2, 2]


def test_a_stream_leaves_the_global_generator_alone(triplets: Path) -> None:
    dataset = RemovalDataset(triplets)
    deal = BucketBatches(image_sizes(dataset), 2, seed=0)
    before = torch.get_rng_state()
    found = list(islice(batch_stream(dataset, deal), 7))
    assert torch.equal(before, torch.get_rng_state())
    assert {batch["src"].shape[-2:] for batch in found} == {(64, 64), (64, 96)}


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    for name in ("src", "mask", "result"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"sample 'a'.*a\.png"):
        image_sizes(RemovalDataset(tmp_path))


def test_the_transformer_reads_what_it_reads_in_the_stock_pipeline(
    random_flux_fill: Path, triplets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(str(random_flux_fill))
    item = RemovalDataset(triplets)[1]
    batch = {name: value[None] for name, value in item.items()}
    monkeypatch.setattr(batches, "draw", lambda moments: moments.chunk(2, dim=1)[0])
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    ours = LatentEncoder(pipe)(batch)
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(
        image=batch["src"],
        mask_image=batch["mask"],
        height=64,
        width=96,
        prompt_embeds=torch.zeros(1, 1, 8),
        pooled_prompt_embeds=torch.zeros(1, 8),
        num_inference_steps=1,
        output_type="latent",
    )
    torch.testing.assert_close(ours.condition, seen[0]["hidden_states"][..., 64:])
    assert torch.equal(ours.image_ids, seen[0]["img_ids"])
    assert (ours.height, ours.width) == (8, 12)
    encoded = pipe.vae.encode(batch["result"] * 2 - 1).latent_dist.mean
    assert torch.allclose(ours.x0, pipe._pack_latents((encoded - 0.12) * 0.36, 1, 16, 8, 12))


def test_draws_have_mean_and_deviation_of_the_moments() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.full((1, 1, 400, 400), 3.0), torch.full((1, 1, 400, 400), 2.0).log()
    drawn = batches.draw(torch.cat([mean, log_variance], dim=1))
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.02)
    assert drawn.std().item() == pytest.approx(2.0**0.5, abs=0.02)


def objects(count: int = 64) -> dict[str, torch.Tensor]:
    mask = torch.zeros(count, 1, 48, 48)
    mask[..., 16:30, 16:34] = mask[..., 8:40, 22:26] = 1
    return {"mask": mask, "src": torch.rand(count, 3, 48, 48)}


def drawn(**place: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_at(**({"seed": 1, "position": 7} | place)))


def test_masks_are_drawn_anew_by_seed_position_and_process() -> None:
    batch = objects()
    found = augment_masks(batch, 0.5, drawn())
    again = augment_masks(batch, 0.5, drawn())
    assert torch.equal(found["mask"], again["mask"])
    assert found["src"] is batch["src"]
    for other in ({"seed": 2}, {"position": 8}, {"process": 1}):
        changed = augment_masks(batch, 0.5, drawn(**other))
        assert not torch.equal(found["mask"], changed["mask"])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_masks_that_are_drawn_anew(share: float) -> None:
    batch = objects(400)
    found = augment_masks(batch, share, drawn())["mask"]
    changed = (found != batch["mask"]).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(share, abs=0.06)
