from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_lora import MoELoraConfig
from moe_lora.tuner.orthogonality import expert_overlap, orthogonality_loss


def slow_overlap(lora_A, lora_B):
    """Compare the covariances of the outputs by whole matrices."""
    experts = len(lora_A)
    covariances = []
    for e in range(experts):
        delta = lora_B[:, e] @ lora_A[e].flatten(1)
        covariances.append(delta @ delta.T)
    result = torch.zeros(experts, experts, dtype=lora_A.dtype)
    for e in range(experts):
        for f in range(experts):
            size = covariances[e].norm() * covariances[f].norm()
            result[e, f] = (covariances[e] * covariances[f]).sum() / size
    return result


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_overlap_is_that_of_whole_matrices(kernel):
    lora_A = torch.randn(4, 3, 5, *kernel, dtype=torch.float64)
    lora_B = torch.randn(7, 4, 3, dtype=torch.float64)
    found = expert_overlap(lora_A, lora_B)
    torch.testing.assert_close(found, slow_overlap(lora_A, lora_B), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.diagonal(), torch.ones(4, dtype=torch.float64))


def test_the_limits():
    lora_A, basis = torch.randn(2, 2, 6), torch.eye(8)
    apart = torch.stack([basis[:, :2], basis[:, 2:4]], dim=1)
    assert expert_overlap(lora_A, apart)[0, 1] == 0
    same_A, same_B = lora_A[:1].expand(2, -1, -1), torch.randn(8, 1, 2).expand(-1, 2, -1)
    same = expert_overlap(same_A, same_B * torch.tensor([1.0, -3.0]).view(1, 2, 1))
    torch.testing.assert_close(same, torch.ones(2, 2))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_size_of_an_expert_does_not_matter(size):
    lora_A, lora_B = torch.randn(2, 3, 5), torch.randn(7, 2, 3)
    scaled = lora_B * torch.tensor([1.0, size]).view(1, 2, 1)
    expected = expert_overlap(lora_A, lora_B)
    torch.testing.assert_close(expert_overlap(lora_A, scaled), expected)
    torch.testing.assert_close(expert_overlap(lora_A * size, scaled), expected)


def test_gradcheck():
    lora_A = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    # This also shows that the norms may stay outside of the graph, as they do.
    assert torch.autograd.gradcheck(expert_overlap, (lora_A, lora_B))


def test_half_precision_is_computed_in_float32():
    lora_A, lora_B = torch.randn(2, 3, 5).bfloat16(), torch.randn(7, 2, 3).bfloat16()
    found = expert_overlap(lora_A, lora_B)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expert_overlap(lora_A.float(), lora_B.float()))


def adapted(mlp, experts=3, **config):
    names = tuple(f"expert_{i}" for i in range(experts))
    settings = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False}
    return get_peft_model(mlp, MoELoraConfig(expert_names=names, **(settings | config)))


def experts_of(model):
    return [module.moe_lora_experts["default"] for module in (model.first, model.second)]


def test_the_loss_is_the_mean_over_layers_and_pairs(mlp):
    model = adapted(mlp)
    pairs = [(0, 1), (0, 2), (1, 2)]
    overlaps = [slow_overlap(e.lora_A, e.lora_B) for e in experts_of(model)]
    expected = sum(o[pair] for o in overlaps for pair in pairs) / 6
    torch.testing.assert_close(orthogonality_loss(model), expected)
    torch.testing.assert_close(orthogonality_loss(nn.Sequential(model)), expected)


def test_at_the_start_it_is_zero_with_a_zero_gradient(mlp):
    model = adapted(mlp, init_lora_weights=True)
    loss = orthogonality_loss(model)
    loss.backward()
    assert loss.item() == 0
    for experts in experts_of(model):
        for parameter in (experts.lora_A, experts.lora_B):
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_descending_it_drives_the_experts_apart(mlp):
    model = adapted(mlp)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    before = orthogonality_loss(model).item()
    for _ in range(60):
        optimizer.zero_grad()
        orthogonality_loss(model).backward()
        optimizer.step()
    assert orthogonality_loss(model).item() < 0.2 * before


def test_gradient_reaches_every_expert_and_nothing_else(mlp):
    model = adapted(mlp)
    orthogonality_loss(model).backward()
    for name, parameter in model.named_parameters():
        if "moe_lora_experts" in name:
            grad = parameter.grad
            per_expert = grad if "lora_A" in name else grad.transpose(0, 1)
            assert (per_expert.flatten(1).abs().sum(1) > 0).all(), name
        else:
            assert parameter.grad is None


def test_it_reads_the_adapter_that_is_named(mlp):
    model = adapted(mlp)
    other = MoELoraConfig(r=1, target_modules=["first"], init_lora_weights=False)
    model.add_adapter("other", other)
    first = model.first.moe_lora_experts["other"]
    overlap = slow_overlap(first.lora_A, first.lora_B)
    expected = (overlap.sum() - overlap.trace()) / 6
    torch.testing.assert_close(orthogonality_loss(model, "other"), expected)


def test_invalid_arguments_raise(mlp):
    with pytest.raises(ValueError, match="moe_lora adapter"):
        orthogonality_loss(mlp)
    model = adapted(mlp, experts=1)
    with pytest.raises(ValueError, match="at least 2 experts"):
        orthogonality_loss(model)
    with pytest.raises(ValueError, match=r"one of \['default'\], but got 'mine'"):
        orthogonality_loss(model, "mine")


@pytest.mark.usefixtures("one_process")
def test_under_ddp_its_gradient_joins_that_of_the_pass(mlp):
    model, x = adapted(mlp), torch.randn(4, 6)
    found = []
    for wrapped in (model, DistributedDataParallel(model)):
        model.zero_grad()
        (wrapped(x).square().mean() + orthogonality_loss(wrapped)).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, shared in zip(*found, strict=True):
        torch.testing.assert_close(plain, shared)
