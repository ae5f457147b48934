from __future__ import annotations

import pytest
import torch

from moe_lora.routing.model_call.samples import sample_index

NOISE = torch.randn(8, 5, 4)


def index(given, latents):
    found = sample_index(given, latents)
    return None if found is None else found.tolist()


def test_one_row_serves_all_and_as_many_rows_are_the_samples():
    assert index(3, NOISE[:3]) is None
    assert index(1, NOISE[:3]) == [0, 0, 0]
    assert index(0, NOISE[:0]) is None
    assert index(1, NOISE[:0]) == []


def test_a_repeated_batch_is_guidance():
    for copies in (2, 3):
        assert index(2, NOISE[:2].repeat(copies, 1, 1)) == [0, 1] * copies
        assert index(2, list(NOISE[:2]) * copies) == [0, 1] * copies
    assert index(4, NOISE[:4].repeat(2, 1, 1)) == [0, 1, 2, 3] * 2


def test_guidance_of_samples_of_different_sizes_is_recognized():
    samples = [torch.randn(4, 2, 3), torch.randn(4, 3, 2)]
    assert index(2, samples * 3) == [0, 1] * 3
    with pytest.raises(ValueError, match="got 2"):
        index(2, [*samples, torch.randn(4, 2, 3), torch.randn(4, 3, 2)])


@pytest.mark.parametrize(
    ("given", "latents"),
    [
        (2, NOISE[:4]),  # nothing repeats
        (2, NOISE[:2].repeat_interleave(2, dim=0)),
        (2, NOISE[:4].repeat(2, 1, 1)),  # guidance, of more samples than there are rows
        (2, NOISE[:1].expand(4, -1, -1)),  # one noise fits every order
        (2, NOISE[:5]),
        (3, NOISE[:2]),
        (2, NOISE[:0]),
        (0, NOISE[:2]),
    ],
)
def test_rows_whose_samples_are_not_proven_raise(given, latents):
    expected = (
        f"for the {len(latents)} samples of the call, .* but got {given}.* Pass one per sample"
    )
    with pytest.raises(ValueError, match=expected):
        index(given, latents)
