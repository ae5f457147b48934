"""Expert signals: every specialised loss trains its own expert, and the base loss all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.losses.reduction import at_least_float32
from moe_lora.losses.removal import RemovalLoss, RemovalLossOutput

EXPERT_OF = {
    "boundary": "removal_expert",
    "consistency": "background_expert",
    "detail": "completion_expert",
}
"""Which expert a specialised loss trains, unless said otherwise."""


class ExpertSignals(nn.Module):
    """Give each sample one component of a removal loss, whose gradient reaches one expert only.

    One backward pass cannot tell components apart that came through the same sample, so every
    sample gets one of them: with probability `base_share` the base loss, which trains all experts,
    else one of the specialised losses. Samples above `max_sigma`, which those leave out, get the
    base loss. Each value is weighted by the inverse of its probability, so that the expected total
    is that of the removal loss; its variance is larger, and fewer pictures are decoded.

    Args:
        loss: the removal loss, with the base loss and at least one specialised one.
        experts: which expert each specialised loss trains; `EXPERT_OF` by default.
        expert_names: the model's experts, in order.
        base_share: probability of the base loss, in (0, 1).

    Raises:
        ValueError: for a loss without base or specialised components or with `specialised_every`
            above 1, an expert that is not among the names, or a share outside (0, 1).

    Example:
        >>> signals = ExpertSignals(RemovalLoss(detail=0))
        >>> signals.components
        ('base', 'boundary', 'consistency')
        >>> signals.learners(torch.tensor([0, 2]))
        tensor([[1., 1., 1.],
                [0., 1., 0.]])
    """

    def __init__(
        self,
        loss: RemovalLoss,
        *,
        experts: Mapping[str, str] | None = None,
        expert_names: Sequence[str] = tuple(EXPERT_OF.values()),
        base_share: float = 0.5,
    ) -> None:
        super().__init__()
        if "base" not in loss.enabled or not loss.specialised:
            raise ValueError(
                "Expected a loss with the base and at least one specialised component, but got "
                f"{list(loss.enabled)}."
            )
        if loss.specialised_every != 1:
            raise ValueError(
                "Expected a loss whose specialised components are computed at every step, but got "
                f"`specialised_every={loss.specialised_every}`."
            )
        if not 0 < base_share < 1:
            raise ValueError(f"Expected `base_share` to be in (0, 1), but got {base_share}.")
        self.loss, self.base_share = loss, base_share
        self.components = loss.enabled
        taught = {**EXPERT_OF, **(experts or {})}
        names = list(expert_names)
        for component in self.components[1:]:
            if taught[component] not in names:
                raise ValueError(
                    f"Expected the expert that {component!r} trains to be one of {names}, but got "
                    f"{taught[component]!r}."
                )
        rows = [torch.ones(len(names))]
        rows += [_one_hot(names.index(taught[c]), len(names)) for c in self.components[1:]]
        self.register_buffer("_learners", torch.stack(rows), persistent=False)

    def assign(self, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw which component each sample gets.

        The draws of a batch are spread evenly: its shares differ from the probabilities by less
        than one sample.

        Args:
            sigma: `(B,)`, in [0, 1].
            generator: of the draw, on the CPU.

        Returns:
            `(B,)`, integers: the place among `components`.
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

    def learners(self, assignment: Tensor) -> Tensor:
        """Return which experts each sample trains, for `moe_lora.teach_experts`.

        Args:
            assignment: `(B,)`, from `assign`.

        Returns:
            `(B, E)`, 0 or 1.
        """
        table: Tensor = self.get_buffer("_learners")
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
        """Compute every sample's component.

        Args:
            velocity: as `RemovalLoss.forward` takes it, like the other inputs.
            target_velocity: likewise.
            assignment: `(B,)`, from `assign`; the model was called inside
                `moe_lora.teach_experts(model, signals.learners(assignment))`.
            sigma: `(B,)`, in [0, 1].
            inputs: `x_t`, `mask`, `target`, `height`, `width`.

        Returns:
            The total, and the components' means over the samples that got them.

        Raises:
            ValueError: for an assignment of another shape, or as `RemovalLoss.forward` raises.
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
                value = self._component(name, chosen, {**tensors, **inputs})
                total = total + self.loss.weights[name] * factor * len(chosen) * value
                sums.setdefault(name, []).append((len(chosen), value))
        return RemovalLossOutput(total, {name: _mean(parts) for name, parts in sums.items()})

    def _groups(self, assignment: Tensor, passed: Tensor) -> Iterator[tuple[str, Tensor, float]]:
        """Yield samples of one component, and what each of them counts in the total."""
        drawn = max(int(passed.sum()), 1)
        for place, (name, share) in enumerate(zip(self.components, self._shares(), strict=True)):
            whole = len(passed) if name == "base" else drawn
            yield name, (assignment == place) & passed, 1 / (share * whole)
        yield "base", ~passed, 1 / len(passed)

    def _component(self, name: str, chosen: Tensor, inputs: Mapping[str, Any]) -> Tensor:
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
