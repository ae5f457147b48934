"""Split factors against plain indexing of the whole ones."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from moe_lora.tuner.expert_parameters import ExpertParameters

EXPERTS = 4
SUBSETS = [list(s) for n in range(EXPERTS + 1) for s in combinations(range(EXPERTS), n)]


def whole() -> tuple[Tensor, Tensor]:
    return torch.randn(EXPERTS, 2, 3), torch.randn(5, EXPERTS, 2)


@pytest.mark.parametrize("trained", SUBSETS)
def test_values_and_experts_do_not_change(trained: list[int]) -> None:
    lora_A, lora_B = whole()
    module = ExpertParameters(lora_A.clone(), lora_B.clone())
    module.freeze_except(trained)
    assert torch.equal(module.lora_A, lora_A)
    assert torch.equal(module.lora_B, lora_B)
    assert module.num_experts == EXPERTS
    for index in range(EXPERTS):
        own_A, own_B = module.expert(index)
        assert torch.equal(own_A, lora_A[index])
        assert torch.equal(own_B, lora_B[:, index])
    module.freeze_except(None)
    assert list(dict(module.named_parameters())) == ["lora_A", "lora_B"]
    assert torch.equal(module.lora_A, lora_A)
    assert torch.equal(module.lora_B, lora_B)


@pytest.mark.parametrize("trained", SUBSETS)
def test_only_trained_experts_require_gradients(trained: list[int]) -> None:
    module = ExpertParameters(*whole())
    module.freeze_except(trained)
    sizes = {2 * 3: 0, 5 * 2: 0}
    for name, parameter in module.named_parameters():
        sizes[6 if "lora_A" in name else 10] += parameter.numel() * parameter.requires_grad
    assert sizes == {6: 6 * len(trained), 10: 10 * len(trained)}


@pytest.mark.parametrize("trained", [[1], [0, 3], [0, 1, 2]])
def test_gradients_are_those_of_the_whole_factors(trained: list[int]) -> None:
    lora_A, lora_B = whole()
    module = ExpertParameters(lora_A, lora_B)
    module.freeze_except(trained)
    grad_A, grad_B = whole()
    ((module.lora_A * grad_A).sum() + (module.lora_B * grad_B).sum()).backward()
    assert torch.equal(module.lora_A_trained.grad, grad_A[trained])
    assert torch.equal(module.lora_B_trained.grad, grad_B[:, trained])


@pytest.mark.parametrize("trained", [[], [1], [0, 3], None])
def test_states_are_split_and_joined(trained: list[int] | None) -> None:
    lora_A, lora_B = whole()
    module = ExpertParameters(*whole())
    module.freeze_except(trained)
    entries = module.split_state("lora_A", lora_A) | module.split_state("lora_B", lora_B)
    module.load_state_dict(entries)
    assert torch.equal(module.lora_A, lora_A)
    assert torch.equal(module.lora_B, lora_B)
    joined = module.join_state(module.state_dict())
    assert joined.keys() == {"lora_A", "lora_B"}
    assert torch.equal(joined["lora_A"], lora_A)


def test_views_of_an_expert_write_through() -> None:
    module = ExpertParameters(*whole())
    module.freeze_except([2])
    for index in range(EXPERTS):
        with torch.no_grad():
            for view in module.expert(index):
                view.fill_(index)
        assert (module.lora_A[index] == index).all()
        assert (module.lora_B[:, index] == index).all()


def test_tensors_of_a_split_factor_have_no_other_name() -> None:
    module = ExpertParameters(*whole())
    module.freeze_except([2])
    with pytest.raises(AttributeError, match="lora_C"):
        _ = module.lora_C


def test_replicas_of_data_parallel_have_whole_factors() -> None:
    module = ExpertParameters(*whole())
    module.freeze_except([2])
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter.detach() * 2)  # plain tensors, as on another device
    assert not list(replica.parameters())
    assert torch.equal(replica.lora_A, 2 * module.lora_A)
    assert torch.equal(replica.lora_B, 2 * module.lora_B)
