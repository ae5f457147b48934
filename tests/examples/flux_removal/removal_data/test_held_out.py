from __future__ import annotations

from pathlib import Path

import pytest

from removal_data.dataset import RemovalDataset
from removal_data.held_out import hold_out, split, spread
from removal_data.sources.samples import Sample


def sample(name: str, target: str | None = None) -> Sample:
    return Sample(name, {"result": Path(target or name)})


SAMPLES = [sample(f"scene{index}") for index in range(50)]


def test_a_share_is_chosen_by_the_seed() -> None:
    chosen = hold_out(SAMPLES, 0.2, 0)
    assert len(chosen) == 10
    assert chosen <= {s.name for s in SAMPLES}
    assert hold_out(list(reversed(SAMPLES)), 0.2, 0) == chosen
    assert hold_out(SAMPLES, 0.2, 1) != chosen


def test_more_samples_hardly_change_the_choice() -> None:
    more = [*SAMPLES, *(sample(f"new{index}") for index in range(10))]
    assert len(hold_out(SAMPLES, 0.2, 0) & hold_out(more, 0.2, 0)) >= 8


def test_samples_with_one_target_stay_together() -> None:
    samples = [sample(f"{index}", f"target{index // 3}") for index in range(12)]
    for seed in range(5):
        chosen = hold_out(samples, 0.3, seed)
        assert len(chosen) in (3, 6)
        targets = {s.files["result"] for s in samples if s.name in chosen}
        assert all((s.name in chosen) == (s.files["result"] in targets) for s in samples)


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.999, 49)])
def test_some_are_chosen_and_some_are_left(share: float, count: int) -> None:
    assert len(hold_out(SAMPLES, share, 0)) == count


def test_one_target_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="at least two targets with `validation_share`, but got 1"):
        hold_out([sample("a", "t"), sample("b", "t")], 0.5, 0)


def test_the_parts_of_a_data_set_keep_sizes_and_captions(triplets: Path) -> None:
    dataset = RemovalDataset(triplets)
    dataset.buckets = [(16 * index, 16) for index in range(1, 6)]
    dataset.captions = ["a"]
    parts = split(dataset, 0.4, 0)
    assert sorted(parts[0].stems + parts[1].stems) == dataset.stems
    assert (len(parts[0]), len(parts[1])) == (3, 2)
    for part in parts:
        assert part.captions == ["a"]
        indices = [dataset.stems.index(name) for name in part.stems]
        assert part.buckets == [dataset.buckets[index] for index in indices]


def test_scenes_lie_at_even_distances(triplets: Path) -> None:
    dataset = RemovalDataset(triplets)
    assert spread(dataset, 2).stems == ["000", "002"]
    assert spread(dataset, 9).stems == dataset.stems


def test_captions_become_indices_in_a_longer_list(triplets: Path) -> None:
    dataset = RemovalDataset(triplets)
    dataset.samples = [Sample(s.name, s.files, caption="sea") for s in dataset.samples]
    found = dataset.with_captions(["wall", "sea"])
    assert int(found[0]["caption"]) == 1
    assert found.captions == ["wall", "sea"]
    assert dataset.captions == []
