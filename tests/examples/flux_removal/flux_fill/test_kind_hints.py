from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import moe_lora
from flux_fill.kind_hints import KindHints, set_task_hint
from training_run.parts import build_hints

KINDS = ["glow", "shadow", "text"]


def test_hints_are_those_of_the_kinds() -> None:
    hints = KindHints(KINDS, ["shadow=removal_expert", "glow"], "focus", dropout=0.9)
    assert hints.of(torch.tensor([1, 0, 2, -1])) == ["removal_focus", "glow_focus", None, None]


def test_dropout_leaves_out_its_share_and_depends_on_the_generator() -> None:
    hints = KindHints(KINDS, ["glow"], "only", dropout=0.3)
    kind = torch.zeros(2000, dtype=torch.long)
    found = [hints.of(kind, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    share = found[0].count(None) / 2000
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    whole = KindHints(KINDS, ["glow"], "only").of(kind, torch.Generator().manual_seed(1))
    assert whole.count("glow_only") == 2000


def test_kinds_that_the_data_lack_raise() -> None:
    with pytest.raises(ValueError, match=r"kinds of the data, \['glow', .* but got \['fog'\]"):
        KindHints(KINDS, ["fog"], "only")
    options: Any = SimpleNamespace(kind_experts=["glow", "fog"], kind_hint="only", hint_dropout=0.0)
    with pytest.raises(ValueError, match=r"but got \['fog'\]"):
        build_hints(options, KINDS)
    options.kind_experts = []
    assert build_hints(options, KINDS) is None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.to_q(hidden_states)
        return output


def adapted(router: str | None) -> nn.Module:
    from peft import get_peft_model

    config = moe_lora.MoELoraConfig(
        r=2, target_modules=["to_q"], expert_names=tuple(KINDS), router=router
    )
    return get_peft_model(Layer(), config)


def test_a_batch_is_hinted_inside_of_the_context_only() -> None:
    model = adapted("uniform")
    hints = KindHints(KINDS, KINDS, "only")
    x = torch.randn(3, 2, 4)
    with hints.given(model, {"kind": torch.tensor([2, -1, 0])}):
        model(x)
        decision = moe_lora.current_routing(model)
    assert decision is not None
    expected = [[0, 0, 1], [1 / 3] * 3, [1, 0, 0]]
    torch.testing.assert_close(decision.weights, torch.tensor(expected))
    model(x)
    decision = moe_lora.current_routing(model)
    assert decision is not None
    torch.testing.assert_close(decision.weights, torch.full((3, 3), 1 / 3))


def test_one_hint_stays_and_needs_a_router() -> None:
    model = adapted("uniform")
    set_task_hint(model, None)
    set_task_hint(model, "shadow_only")
    model(torch.randn(1, 2, 4))
    decision = moe_lora.current_routing(model)
    assert decision is not None
    assert decision.weights.tolist() == [[0, 1, 0]]
    with pytest.raises(ValueError, match="'fog_only'"):
        set_task_hint(model, "fog_only")
    with pytest.raises(ValueError, match="with a router for the task hint 'shadow_only'"):
        set_task_hint(adapted(None), "shadow_only")
