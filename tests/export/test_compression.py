from __future__ import annotations

import pytest
import torch

from moe_lora.export.compression import compress, truncate
from moe_lora.export.lora_factors import Factors


@pytest.mark.parametrize(
    ("out", "width", "total", "kernel"), [(9, 7, 5, ()), (4, 6, 11, ()), (5, 3, 6, (3, 2))]
)
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_best_approximation_of_the_whole_matrix(out, width, total, kernel, rank):
    factors = Factors(
        torch.randn(total, width, *kernel, dtype=torch.float64),
        torch.randn(out, total, dtype=torch.float64),
    )
    whole = factors.delta().flatten(1)
    values = torch.linalg.svdvals(whole)
    small, lost, square = truncate(factors, rank)
    assert small.down.shape == (rank, width, *kernel)
    assert small.up.shape == (out, rank)
    got = (whole - small.delta().flatten(1)).square().sum()
    assert float(got) == pytest.approx(float(values[rank:].square().sum()))
    assert lost == pytest.approx(float(got))
    assert square == pytest.approx(float(whole.square().sum()))


def test_a_rank_that_is_enough_changes_no_bit():
    factors = Factors(torch.randn(3, 5), torch.randn(4, 3))
    small, lost, _ = truncate(factors, 3)
    assert small is factors
    assert lost == 0.0


def test_the_errors_of_the_layers_and_of_all():
    # Singular values 4, 3 and 12, 5: rank 1 loses 3 of 5 and 5 of 13.
    layers = {
        "a": Factors(torch.eye(2), torch.diag(torch.tensor([4.0, 3.0]))),
        "b": Factors(torch.eye(2), torch.diag(torch.tensor([12.0, 5.0]))),
        "untrained": Factors(torch.eye(2), torch.zeros(2, 2)),
    }
    _, error, by_layer = compress(layers, 1)
    assert by_layer == pytest.approx({"a": 3 / 5, "b": 5 / 13, "untrained": 0.0})
    assert error == pytest.approx(((9 + 25) / (25 + 169)) ** 0.5)


def test_the_dtype_stays():
    factors = Factors(torch.randn(4, 5).bfloat16(), torch.randn(6, 4).bfloat16())
    small, _, _ = truncate(factors, 2)
    assert small.down.dtype == small.up.dtype == torch.bfloat16
