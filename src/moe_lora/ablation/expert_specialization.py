"""Specialization of experts: the rise of each loss when one expert is ablated."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.ablation.leave_one_out import (
    Batch,
    Evaluate,
    Observations,
    active_expert_names,
    observe,
    restored_state,
)
from moe_lora.losses import EXPERT_OF_LOSS


@dataclass(frozen=True, eq=False)
class Specialization:
    """Rise of every component under the ablation of each expert; see `specialization`.

    Args:
        expert_names: names of the `E` experts, in the order of the routing weights.
        component_names: names of the `C` losses and metrics, in the order of `evaluate`.
        rises: `(E, C)`, float64, in the component's unit, mean over the observations; > 0 where the
            component is worse without the expert.
        spreads: `(E, C)`, float64, population standard deviations of the rises over the
            observations; 0 for a single observation.
        baseline: `(C,)`, float64, components of the whole mixture, mean over the observations.
        counts: `(C,)`, int64, number of observations of every component.
        pairs: component by expert, for the experts with a component of their own.

    Example:
        >>> found = Specialization(
        ...     expert_names=("a", "b"),
        ...     component_names=("edge", "color"),
        ...     rises=torch.tensor([[0.75, -0.1], [0.25, 0.2]], dtype=torch.float64),
        ...     spreads=torch.zeros(2, 2, dtype=torch.float64),
        ...     baseline=torch.tensor([0.5, 0.25], dtype=torch.float64),
        ...     counts=torch.tensor([8, 8]),
        ...     pairs={"a": "edge", "b": "color"},
        ... )
        >>> found.shares
        {'a': 0.75, 'b': 1.0}
        >>> found.score
        0.875
        >>> print(found)
        rise without            edge       color
        (whole mixture)          0.5        0.25
        a                     *+0.75        -0.1
        b                      +0.25       *+0.2
        diagonal share (*) 0.875, without specialization 0.500
    """

    expert_names: tuple[str, ...]
    component_names: tuple[str, ...]
    rises: Tensor
    spreads: Tensor
    baseline: Tensor
    counts: Tensor
    pairs: Mapping[str, str]

    @property
    def shares(self) -> dict[str, float]:
        """Share of each paired expert in the rises of its component.

        share(e) = max(rise(e, c), 0) / sum over the experts e' of max(rise(e', c), 0), c being the
        component of e; 0 where no rise is positive.
        """
        positive = self.rises.clamp_min(0)
        found = {}
        for expert, component in self.pairs.items():
            column = positive[:, self.component_names.index(component)]
            own = column[self.expert_names.index(expert)]
            found[expert] = float(own / column.sum()) if column.sum() > 0 else 0.0
        return found

    @property
    def score(self) -> float | None:
        """Diagonal share, the mean of `shares`; `None` without pairs.

        1 if every component depends on its own expert only, 1/E if it depends on all experts
        equally.
        """
        shares = self.shares
        return sum(shares.values()) / len(shares) if shares else None

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain numbers by name, ready for JSON.

        Returns:
            `rises` and `spreads` by expert and component, `baseline` and `counts` by component,
            `pairs`, `shares` and `score`.
        """
        components = self.component_names

        def by_name(matrix: Tensor) -> dict[str, dict[str, float]]:
            rows = zip(self.expert_names, matrix.tolist(), strict=True)
            return {expert: dict(zip(components, row, strict=True)) for expert, row in rows}

        return {
            "rises": by_name(self.rises),
            "spreads": by_name(self.spreads),
            "baseline": dict(zip(components, self.baseline.tolist(), strict=True)),
            "counts": dict(zip(components, self.counts.tolist(), strict=True)),
            "pairs": dict(self.pairs),
            "shares": self.shares,
            "score": self.score,
        }

    def __str__(self) -> str:
        wide = max(16, *map(len, self.expert_names))
        widths = [max(12, len(name) + 2) for name in self.component_names]
        rows = [("rise without", list(self.component_names))]
        rows.append(("(whole mixture)", [f"{value:.4g}" for value in self.baseline.tolist()]))
        for expert, rises in zip(self.expert_names, self.rises.tolist(), strict=True):
            own = self.pairs.get(expert)
            named = zip(self.component_names, rises, strict=True)
            rows.append((expert, [f"{'*' * (name == own)}{rise:+.3g}" for name, rise in named]))
        lines = [
            f"{head:<{wide}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
            for head, cells in rows
        ]
        if self.score is not None:
            chance = 1 / len(self.expert_names)
            lines.append(
                f"diagonal share (*) {self.score:.3f}, without specialization {chance:.3f}"
            )
        return "\n".join(lines)


def specialization(
    model: nn.Module,
    batches: Iterable[Batch],
    evaluate: Evaluate[Batch],
    *,
    higher_is_better: Collection[str] = (),
    pairs: Mapping[str, str] | None = None,
    renormalize: bool = False,
    adapter_name: str = "default",
    seed: int = 0,
) -> Specialization:
    """Measure the specialization of experts by ablating one expert at a time.

    rise(expert, component) = component without the expert − component of the whole mixture

    averaged over all observations; the sign is reversed for metrics in `higher_is_better`. An
    ablated expert has routing weight 0. The other weights keep the values from the router, the
    routing mode or `moe_lora.route`, and are *not* renormalized by default, so that the other
    experts contribute exactly as before. Any router, routing strategy and weight shape works.

    Each batch is evaluated E + 1 times in eval mode, without gradient and with the same random
    numbers from torch's global generators. Afterwards the training modes, routing mode, router
    inputs and statistics of the model and the generators are restored.

    Args:
        model: the adapted model, or a wrapper around it.
        batches: batches for `evaluate`; iterated once.
        evaluate: function called as `evaluate(model, batch)` that runs the model and returns losses
            and metrics by name: a scalar per batch (one observation), or `(B,)` (one observation
            per sample). Entries that are NaN in all E + 1 runs, such as those of an empty region,
            are ignored.
        higher_is_better: names of metrics such as PSNR.
        pairs: component by expert, `{expert: component}`; by default the pairs of
            `moe_lora.losses.EXPERT_OF_LOSS` whose expert and component both occur.
        renormalize: divide the remaining weights by their sum. A sample or token with no remaining
            weight gets no adapter output in either case.
        adapter_name: name of the adapter.
        seed: seed of the random numbers; those of a batch depend on it and on the batch's index.

    Returns:
        The matrix of rises, with the baseline and the diagonal share.

    Raises:
        ValueError: if the adapter is unknown, inactive, disabled or merged; if `batches` is empty;
            if `evaluate` does not call the model, or returns no component, different components or
            non-finite values; if `pairs` or `higher_is_better` contains an unknown name.

    Example:
        >>> from peft import get_peft_model
        >>> from moe_lora import MoELoraConfig
        >>> config = MoELoraConfig(r=1, lora_alpha=1, target_modules=["0"], num_experts=2)
        >>> base = nn.Sequential(nn.Linear(1, 2, bias=False))
        >>> _ = nn.init.zeros_(base[0].weight)
        >>> model = get_peft_model(base, config)
        >>> experts = model.base_model.model[0].moe_lora_experts["default"]
        >>> _ = experts.lora_A.data.fill_(1)
        >>> experts.lora_B.data = torch.eye(2).unsqueeze(-1)  # one output for each expert
        >>> def evaluate(model, batch):
        ...     target = torch.tensor([0.5, 0.5])  # the output of the whole mixture
        ...     error = (model(batch) - target).square().mean(0)
        ...     return {"x": error[0], "y": error[1]}
        >>> pairs = {"expert_0": "x", "expert_1": "y"}
        >>> found = specialization(model, [torch.ones(4, 1)], evaluate, pairs=pairs)
        >>> found.rises.tolist(), found.score
        ([[0.25, 0.0], [0.0, 0.25]], 1.0)
    """
    experts = active_expert_names(model, adapter_name)
    with restored_state(model):
        observed = [
            observe(
                model,
                batch,
                evaluate,
                adapter_name=adapter_name,
                renormalize=renormalize,
                seed=seed * 1_000_003 + index,
            )
            for index, batch in enumerate(batches)
        ]
    if not observed:
        raise ValueError("Expected at least one batch to evaluate, but got no batch.")
    return _summarize(observed, experts, higher_is_better, pairs)


def _summarize(
    observed: list[Observations],
    expert_names: tuple[str, ...],
    higher_is_better: Collection[str],
    pairs: Mapping[str, str] | None,
) -> Specialization:
    names = tuple(observed[0])
    for later in observed:
        if set(later) != set(names):
            raise ValueError(
                f"Expected `evaluate` to return the components {sorted(names)} for every batch, "
                f"but got {sorted(later)}."
            )
    if isinstance(higher_is_better, str) or not set(higher_is_better) <= set(names):
        raise ValueError(
            f"Expected `higher_is_better` to contain names of {list(names)}, but got "
            f"{higher_is_better!r}."
        )
    columns = []
    for name in names:
        values = torch.cat([found[name] for found in observed], dim=1)
        if values.shape[1] == 0:
            raise ValueError(f"Expected a number for {name!r} in some batch, but got NaN in all.")
        rises = (values[1:] - values[0]) * (-1 if name in higher_is_better else 1)
        columns.append((rises.mean(1), rises.std(1, correction=0), values[0].mean(), rises[0]))
    if not columns:
        raise ValueError("Expected `evaluate` to return at least one component, but got none.")
    return Specialization(
        expert_names=expert_names,
        component_names=names,
        rises=torch.stack([column[0] for column in columns], dim=1),
        spreads=torch.stack([column[1] for column in columns], dim=1),
        baseline=torch.stack([column[2] for column in columns]),
        counts=torch.tensor([len(column[3]) for column in columns]),
        pairs=_resolve_pairs(pairs, expert_names, names),
    )


def _resolve_pairs(
    pairs: Mapping[str, str] | None, expert_names: tuple[str, ...], names: tuple[str, ...]
) -> dict[str, str]:
    if pairs is None:
        return {e: c for c, e in EXPERT_OF_LOSS.items() if e in expert_names and c in names}
    for expert, component in pairs.items():
        if expert not in expert_names or component not in names:
            raise ValueError(
                f"Expected `pairs` to pair experts of {list(expert_names)} with components of "
                f"{list(names)}, but got {expert!r}: {component!r}."
            )
    return dict(pairs)
