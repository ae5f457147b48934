from __future__ import annotations

import pytest
import torch

from moe_lora import RouterInputs, masks
from moe_lora.routing import MaskAwareRouter


def inputs(batch: int = 2) -> RouterInputs:
    mask = torch.zeros(batch, 1, 32, 48)
    mask[0, :, 4:20, 8:40] = 1
    mask[1:, :, 8:12, 8:12] = 1
    return RouterInputs(
        torch.randn(batch, 24, 8),
        mask_info=masks.analyze(mask),
        timestep=torch.rand(batch),
        timestep_range=(0, 1),
        grid_size=(4, 6),
    )


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("kwargs", [{}, {"time_aware": True}, {"num_layers": 3}])
def test_rows_sum_to_one_and_all_parameters_get_gradients(experts, kwargs):
    router = MaskAwareRouter(experts, 8, **kwargs).eval()
    decision = router(inputs())
    layers = (3,) if kwargs.get("num_layers") else ()
    assert decision.weights.shape == (2, *layers, experts)
    torch.testing.assert_close(decision.weights.sum(-1), torch.ones(2, *layers))
    (decision.logits * torch.randn_like(decision.logits)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in router.parameters())


def test_samples_are_routed_one_by_one():
    router, batch = MaskAwareRouter(4, 8).eval(), inputs()
    both = router(batch).logits
    for index in range(2):
        one = RouterInputs(
            batch.hidden_states[index : index + 1],
            mask_info=batch.mask_info.select(torch.tensor([index])),
            grid_size=(4, 6),
        )
        torch.testing.assert_close(router(one).logits[0], both[index])


def test_a_new_expert_learns_and_the_others_keep_their_logits():
    router, batch = MaskAwareRouter(2, 8).eval(), inputs()
    before, parameters = router(batch).logits, list(router.parameters())
    router.add_expert(-4.0)
    logits = router(batch).logits
    assert torch.equal(logits[:, :2], before)
    assert (logits[:, 2] == -4).all()
    logits[:, 2].sum().backward()
    assert router.heads[2].weight.grad.any()
    router.remove_expert(0)
    assert torch.equal(router(batch).logits, logits[:, 1:])
    assert all(any(p is q for q in parameters) for p in router.hidden.parameters())
    assert router.init_kwargs["num_experts"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "num_experts"), ((True,), "num_experts"), ((2, 8, 64), None)],
)
def test_numbers_of_experts_are_checked(arguments, message):
    if message is None:
        MaskAwareRouter(*arguments)
        return
    with pytest.raises(ValueError, match=message):
        MaskAwareRouter(*arguments)


def test_a_logit_of_a_new_expert_is_finite():
    with pytest.raises(ValueError, match="`router_logit`"):
        MaskAwareRouter(2).add_expert(float("-inf"))
