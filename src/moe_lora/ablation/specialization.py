"""What each expert is for: leave one out, and see which losses rise."""

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
    acting_experts,
    left_as_it_was,
    observe,
)

PAIRS = {
    "removal_expert": "boundary",
    "background_expert": "consistency",
    "completion_expert": "detail",
}
"""The component that each expert is meant for, unless `specialisation` is told otherwise."""


@dataclass(frozen=True, eq=False)
class Specialisation:
    """Hold how much worse every component gets without each expert; see `specialisation`.

    Args:
        expert_names: the `E` experts, in the order of the weights.
        component_names: the `C` losses and metrics, in the order of `evaluate`.
        rises: `(E, C)`, float64, in the component's unit, mean over the observations; > 0 where the
            component is worse without the expert.
        spreads: `(E, C)`, float64, the standard deviations of the rises over the observations (with
            a divisor of their number); 0 for a single one.
        baseline: `(C,)`, float64, the components of the whole mixture, mean over the observations.
        counts: `(C,)`, int64, the observations of every component.
        pairs: the component of each expert that has one.

    Example:
        >>> found = Specialisation(
        ...     expert_names=("a", "b"),
        ...     component_names=("edge", "colour"),
        ...     rises=torch.tensor([[0.75, -0.1], [0.25, 0.2]], dtype=torch.float64),
        ...     spreads=torch.zeros(2, 2, dtype=torch.float64),
        ...     baseline=torch.tensor([0.5, 0.25], dtype=torch.float64),
        ...     counts=torch.tensor([8, 8]),
        ...     pairs={"a": "edge", "b": "colour"},
        ... )
        >>> found.shares
        {'a': 0.75, 'b': 1.0}
        >>> found.score
        0.875
        >>> print(found)
        rise without            edge      colour
        (whole mixture)          0.5        0.25
        a                     *+0.75        -0.1
        b                      +0.25       *+0.2
        diagonal share (*) 0.875, without specialisation 0.500
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
        """Return for every paired expert the share of its component's rises that is its own.

        max(rise of its own, 0) / sum over the experts of max(rise, 0), and 0 where nothing rises.
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
        """Return the diagonal share, the mean of `shares`; `None` without pairs.

        1 when every component depends on its own expert alone, 1/E when it depends on all alike.
        """
        shares = self.shares
        return sum(shares.values()) / len(shares) if shares else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers by name, for JSON.

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
                f"diagonal share (*) {self.score:.3f}, without specialisation {chance:.3f}"
            )
        return "\n".join(lines)


def specialisation(
    model: nn.Module,
    batches: Iterable[Batch],
    evaluate: Evaluate[Batch],
    *,
    higher_is_better: Collection[str] = (),
    pairs: Mapping[str, str] | None = None,
    renormalise: bool = False,
    adapter_name: str = "default",
    seed: int = 0,
) -> Specialisation:
    """Measure what each expert is for, by leaving one out at a time.

    rise(expert, component) = component without the expert − component of the whole mixture

    (the other way round for metrics where higher is better), the mean over all observations.
    Without an expert, routing weights are as router, mode or `moe_lora.route` decide them, but that
    expert's are 0; the others are *not* renormalised, so that they do what they did before and
    nothing else. It works for any router, strategy and shape of weights.

    A batch is evaluated E + 1 times in a row, in eval mode, without gradient and with the same
    random numbers of torch's global generators. Afterwards the model is as it was: modes, routing
    mode, router inputs and statistics, and so are the generators.

    Args:
        model: the adapted model, or a wrapper around it.
        batches: whatever `evaluate` takes, one after the other; it is gone through once.
        evaluate: called as `evaluate(model, batch)`; runs the model and returns losses and metrics
            by name: a number for the batch, which is one observation, or `(B,)` with one for each
            sample. NaN in all E + 1 runs (a region that is empty) is left out.
        higher_is_better: names of metrics such as PSNR, whose rise is their fall.
        pairs: the component that each expert is meant for, `{expert: component}`; of `PAIRS` those
            that occur, by default.
        renormalise: divide the other experts' weights by their sum. An image or token that went to
            the left-out expert alone is then left to the base model, as it is without this.
        adapter_name: whose experts.
        seed: of the random numbers; a batch's depend on it and on the batch's place.

    Returns:
        The matrix of rises, the baseline and the diagonal share.

    Raises:
        ValueError: for a model without that adapter or with an adapter that does not act (disabled,
            not active or merged), no batches, an `evaluate` that does not run the model, returns no
            or other components than before or a value that is not finite, and for unknown names
            in `pairs` and `higher_is_better`.

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
        ...     wanted = torch.tensor([0.5, 0.5])  # what the whole mixture makes of 1
        ...     error = (model(batch) - wanted).square().mean(0)
        ...     return {"x": error[0], "y": error[1]}
        >>> pairs = {"expert_0": "x", "expert_1": "y"}
        >>> found = specialisation(model, [torch.ones(4, 1)], evaluate, pairs=pairs)
        >>> found.rises.tolist(), found.score
        ([[0.25, 0.0], [0.0, 0.25]], 1.0)
    """
    experts = acting_experts(model, adapter_name)
    with left_as_it_was(model):
        observed = [
            observe(
                model,
                batch,
                evaluate,
                adapter_name=adapter_name,
                renormalise=renormalise,
                seed=seed * 1_000_003 + index,
            )
            for index, batch in enumerate(batches)
        ]
    if not observed:
        raise ValueError("Expected at least one batch to evaluate, but `batches` holds none.")
    return _summary(observed, experts, higher_is_better, pairs)


def _summary(
    observed: list[Observations],
    expert_names: tuple[str, ...],
    higher_is_better: Collection[str],
    pairs: Mapping[str, str] | None,
) -> Specialisation:
    names = tuple(observed[0])
    for later in observed:
        if set(later) != set(names):
            raise ValueError(
                f"Expected `evaluate` to return the components {sorted(names)} for every batch, "
                f"but got {sorted(later)}."
            )
    if isinstance(higher_is_better, str) or not set(higher_is_better) <= set(names):
        raise ValueError(
            f"Expected `higher_is_better` to hold names of {list(names)}, but got "
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
    return Specialisation(
        expert_names=expert_names,
        component_names=names,
        rises=torch.stack([column[0] for column in columns], dim=1),
        spreads=torch.stack([column[1] for column in columns], dim=1),
        baseline=torch.stack([column[2] for column in columns]),
        counts=torch.tensor([len(column[3]) for column in columns]),
        pairs=_checked_pairs(pairs, expert_names, names),
    )


def _checked_pairs(
    pairs: Mapping[str, str] | None, expert_names: tuple[str, ...], names: tuple[str, ...]
) -> dict[str, str]:
    if pairs is None:
        return {e: c for e, c in PAIRS.items() if e in expert_names and c in names}
    for expert, component in pairs.items():
        if expert not in expert_names or component not in names:
            raise ValueError(
                f"Expected `pairs` to pair experts of {list(expert_names)} with components of "
                f"{list(names)}, but got {expert!r}: {component!r}."
            )
    return dict(pairs)
