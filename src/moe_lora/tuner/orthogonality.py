"""A loss on the overlap between the outputs of a layer's experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_lora.routing.lookup import routing_state
from moe_lora.tuner.experts import MoELoraExperts


def orthogonality_loss(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """Penalize the overlap between the outputs of the experts.

    The mean of `expert_overlap` over layers and pairs of experts. It depends on the parameters
    only, so it can be computed before or after the forward pass, or every few steps, without any
    `(out, in)` matrix. Initially, when every `lora_B` is zero, it is 0.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: the adapter.

    Returns:
        A scalar in [0, 1]: 0 for experts with orthogonal outputs, 1 for identical experts.

    Raises:
        ValueError: when the adapter does not exist, or has a single expert.
    """
    expert_names = routing_state(model).expert_names
    if adapter_name not in expert_names:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(expert_names)}, but got "
            f"{adapter_name!r}."
        )
    experts = len(expert_names[adapter_name])
    if experts < 2:
        raise ValueError(
            f"Expected at least 2 experts, but adapter {adapter_name!r} has {experts}."
        )
    first, second = torch.triu_indices(experts, experts, offset=1).unbind()
    overlaps = [
        expert_overlap(module.lora_A, module.lora_B)[first, second].mean()
        for module in _experts(model, adapter_name)
    ]
    return torch.stack([overlap.to(overlaps[0].device) for overlap in overlaps]).mean()


def expert_overlap(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Compute the pairwise overlap between the outputs of a layer's experts.

    With ΔW_e = B_e A_e, the output of expert e for white input has the covariance
    S_e = ΔW_e ΔW_eᵀ. The overlap of two experts is the cosine of their covariances,
    tr(S_e S_f) / √(tr S_e² · tr S_f²): 0 exactly when their outputs lie in orthogonal subspaces, 1
    when the covariances are equal up to a factor. It does not depend on the norm of an expert, and
    needs only products of `(r, r)` blocks of the Gram matrices A Aᵀ and Bᵀ B.

    Args:
        lora_A: `(E, r, in)`, or `(E, r, in, kh, kw)` of a convolution.
        lora_B: `(out, E, r)`.

    Returns:
        `(E, E)`, symmetric, in [0, 1], in float32 (float64 for float64 experts); a zero expert has
        overlap 0 with all experts, itself included.

    Source: Robert, Escoufier, "A unifying tool for linear multivariate statistical methods: the
        RV-coefficient", 1976. The cosine is this coefficient.

    Example:
        >>> same = torch.ones(2, 1, 3)
        >>> expert_overlap(same, torch.tensor([[[1.0], [1.0]], [[0.0], [1.0]]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    A, B = _unit_size(lora_A.flatten(2)), _unit_size(lora_B.transpose(0, 1))
    inner = A @ A.mT  # (E, r, r)
    outer = torch.einsum("eor,fos->efrs", B, B)
    # tr(S_e S_f) = tr(A_e A_eᵀ · B_eᵀ B_f · A_f A_fᵀ · B_fᵀ B_e)
    product = (inner.unsqueeze(1) @ outer @ inner.unsqueeze(0) * outer).sum((-2, -1))
    size = product.diagonal()
    nonzero = size > 0
    root = torch.where(nonzero, size, 1).sqrt()
    return torch.where(nonzero.unsqueeze(1) & nonzero, product / (root.unsqueeze(1) * root), 0)


def _unit_size(factors: Tensor) -> Tensor:
    """Divide each expert's factor by its norm, so that products of four factors do not underflow.

    The overlap does not depend on the norms, so they need no gradient.
    """
    factors = factors.to(torch.promote_types(factors.dtype, torch.float32))
    norms = factors.detach().flatten(1).norm(dim=1)
    return factors / torch.where(norms > 0, norms, 1).view(-1, 1, 1)


def _experts(model: nn.Module, adapter_name: str) -> Iterator[MoELoraExperts]:
    for name, module in model.named_modules():
        if isinstance(module, MoELoraExperts) and name.rpartition(".")[2] == adapter_name:
            yield module
