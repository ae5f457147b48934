"""Expert-specific gradients: each specialized loss trains one expert, the base loss trains all."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.losses.expert_table import EXPERT_OF_LOSS
from moe_lora.losses.reduction import at_least_float32
from moe_lora.losses.removal import RemovalLoss, RemovalLossOutput


class ExpertSignals(nn.Module):
    """Assign one component of a removal loss to each sample, and its gradient to one expert.

    A backward pass cannot separate the components of one sample. Therefore each sample contributes
    to a single component: the base loss, which trains all experts, with probability `base_share`,
    otherwise one of the specialized losses, which train one expert each. Samples above `max_sigma`
    contribute to the base loss. Each value is divided by its probability, so that the expected
    total equals that of the removal loss, with a larger variance and fewer decoded images.

    Args:
        loss: removal loss with the base loss and at least one specialized loss.
        experts: expert by specialized loss; the default of each is that of `EXPERT_OF_LOSS`.
        expert_names: expert names of the model, in order.
        base_share: probability of the base loss, in (0, 1).

    Raises:
        ValueError: if the loss lacks the base loss or a specialized loss, or has
            `specialized_every` above 1; if an expert is not in `expert_names`; if `base_share` is
            outside (0, 1).

    Example:
        >>> signals = ExpertSignals(RemovalLoss(detail=0))
        >>> signals.components
        ('base', 'boundary', 'consistency')
        >>> signals.expert_grad_mask(torch.tensor([0, 2]))
        tensor([[1., 1., 1.],
                [0., 1., 0.]])
    """

    def __init__(
        self,
        loss: RemovalLoss,
        *,
        experts: Mapping[str, str] | None = None,
        expert_names: Sequence[str] = tuple(EXPERT_OF_LOSS.values()),
        base_share: float = 0.5,
    ) -> None:
        super().__init__()
        if "base" not in loss.enabled or not loss.specialized:
            raise ValueError(
                "Expected `loss` to have the base loss and at least one specialized loss, but got "
                f"{list(loss.enabled)}."
            )
        if loss.specialized_every != 1:
            raise ValueError(
                "Expected `loss` to have `specialized_every=1`, but got "
                f"`specialized_every={loss.specialized_every}`."
            )
        if not 0 < base_share < 1:
            raise ValueError(f"Expected `base_share` to be in (0, 1), but got {base_share}.")
        self.loss, self.base_share = loss, base_share
        self.components = loss.enabled
        expert_of = {**EXPERT_OF_LOSS, **(experts or {})}
        names = list(expert_names)
        for component in self.components[1:]:
            if expert_of[component] not in names:
                raise ValueError(
                    f"Expected the expert of {component!r} to be one of {names}, but got "
                    f"{expert_of[component]!r}."
                )
        rows = [torch.ones(len(names))]
        rows += [_one_hot(names.index(expert_of[c]), len(names)) for c in self.components[1:]]
        self.register_buffer("_grad_masks", torch.stack(rows), persistent=False)

    def assign(self, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample the component of each sample.

        Sampling is stratified: the counts in a batch differ from their expectation by less than one
        sample.

        Args:
            sigma: `(B,)`, noise levels in [0, 1].
            generator: random generator on the CPU; `None` for the global one.

        Returns:
            `(B,)`, int64, indices into `components`.
        """
        passed = (sigma <= self.loss.max_sigma).nonzero().flatten()
        count = len(passed)
        offset = torch.rand((), generator=generator)
        points = (torch.arange(count) + offset) / max(count, 1)
        edges = torch.tensor(self._shares()).cumsum(0)[:-1]
        drawn = torch.bucketize(points, edges, right=True)
        drawn = drawn[torch.randperm(count, generator=generator)]
        assignment = torch.zeros(len(sigma), dtype=torch.int64, device=sigma.device)
        assignment[passed] = drawn.to(sigma.device)
        return assignment

    def expert_grad_mask(self, assignment: Tensor) -> Tensor:
        """Return the mask of the experts that each sample trains.

        Args:
            assignment: `(B,)`, from `assign`.

        Returns:
            `(B, E)`, float32, 0.0 or 1.0; the argument of `teach_experts`.
        """
        table: Tensor = self.get_buffer("_grad_masks")
        return table.to(assignment.device)[assignment]

    def forward(
        self,
        velocity: Tensor,
        target_velocity: Tensor,
        *,
        assignment: Tensor,
        sigma: Tensor,
        **inputs: Any,
    ) -> RemovalLossOutput:
        """Compute the assigned component of every sample.

        Args:
            velocity: see `RemovalLoss.forward`.
            target_velocity: see `RemovalLoss.forward`.
            assignment: `(B,)`, from `assign`. The model call must be inside
                `teach_experts(model, signals.expert_grad_mask(assignment))`.
            sigma: `(B,)`, noise levels in [0, 1].
            inputs: `x_t`, `mask`, `target`, `height` and `width` of `RemovalLoss.forward`.

        Returns:
            The total, and the mean of each component over its samples.

        Raises:
            ValueError: if `assignment` has another shape than `sigma`, or an input is invalid for
                `RemovalLoss.forward`.
        """
        if assignment.shape != sigma.shape:
            raise ValueError(
                f"Expected `assignment` to have shape {tuple(sigma.shape)}, but got "
                f"{tuple(assignment.shape)}."
            )
        tensors = {"velocity": velocity, "target_velocity": target_velocity, "sigma": sigma}
        total = at_least_float32(velocity[:0]).sum()
        sums: dict[str, list[tuple[int, Tensor]]] = {}
        for name, group, factor in self._groups(assignment, sigma <= self.loss.max_sigma):
            chosen = group.nonzero().flatten()
            if len(chosen) and name in self.loss.weights:
                value = self._compute_component(name, chosen, {**tensors, **inputs})
                total = total + self.loss.weights[name] * factor * len(chosen) * value
                sums.setdefault(name, []).append((len(chosen), value))
        return RemovalLossOutput(total, {name: _mean(parts) for name, parts in sums.items()})

    def _groups(self, assignment: Tensor, passed: Tensor) -> Iterator[tuple[str, Tensor, float]]:
        """Yield, for each component, its samples and the weight of one sample in the total."""
        drawn = max(int(passed.sum()), 1)
        for index, (name, share) in enumerate(zip(self.components, self._shares(), strict=True)):
            whole = len(passed) if name == "base" else drawn
            yield name, (assignment == index) & passed, 1 / (share * whole)
        yield "base", ~passed, 1 / len(passed)

    def _compute_component(self, name: str, chosen: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        part = copy.copy(self.loss)
        part.weights = {name: self.loss.weights[name]}
        some = {k: v[chosen] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        output: RemovalLossOutput = part(some.pop("velocity"), some.pop("target_velocity"), **some)
        return output.components[name]

    def _shares(self) -> list[float]:
        others = len(self.components) - 1
        return [self.base_share, *[(1 - self.base_share) / others] * others]


def _one_hot(index: int, size: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(index), size).float()


def _mean(parts: list[tuple[int, Tensor]]) -> Tensor:
    first = parts[0][1]
    terms = [count * value for count, value in parts]
    return sum(terms, torch.zeros_like(first)) / sum(count for count, _ in parts)
