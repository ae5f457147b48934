"""Random lives of a mixture beside two plain LoRAs and a LoHa, compared with the reference.

What is there, active, scaled and enabled is noted beside the model and never read off it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from stress.reference import Delta, Mixture, Reference, delta_of, mixture_of
from stress.toys import assert_close, rows
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig

pytestmark = pytest.mark.slow

UNIFORM = torch.full((3,), 1 / 3)
MOE = "default"
TARGETS = {
    MOE: ["x_embedder", "to_q", "to_out.0", "norm1.linear", "ff.net.2", "proj_mlp"],
    "turbo": ["to_q", "to_v", "ff.net.2"],
    "style": ["to_q", "to_k", "proj_mlp", "norm1.linear"],
    "loha": ["to_v", "to_out.0", "ff.net.2"],
}


def config_of(name: str) -> MoELoraConfig | LoraConfig | LoHaConfig:
    if name == MOE:
        return MoELoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=TARGETS[name],
            router="three_expert_removal",
            init_lora_weights=False,
        )
    if name == "loha":
        return LoHaConfig(r=2, alpha=2, target_modules=TARGETS[name], init_weights=False)
    return LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[name], init_lora_weights=False)


class Life:
    """Act on a model, and note what each act means."""

    def __init__(self, base: nn.Module, inputs: dict[str, Tensor], folder: Path, seed: int) -> None:
        self.model, self.reference = base, Reference(base)
        self.inputs, self.folder = inputs, folder
        self.random = random.Random(seed)
        self.deltas: dict[str, Delta] = {}
        self.present: list[str] = []
        self.strengths: dict[str, float] = {}
        self.enabled, self.uniform, self.saved = True, False, False
        self.did: list[str] = []

    def acts(self) -> list[Callable[[], None]]:
        """List what can be done now."""
        found = [self.add] if len(self.present) < len(TARGETS) else []
        if self.present:
            found += [self.delete, self.activate, self.switch, self.copy]
        if MOE in self.strengths and self.enabled:
            found += [self.set_mode, self.train, self.merge_and_back]
        if MOE in self.present:
            found.append(self.save)
        elif self.saved:
            found += [self.load] * 2
        return found

    def add(self) -> None:
        name = self.random.choice([name for name in TARGETS if name not in self.present])
        self.did[-1] += f" {name}"
        torch.manual_seed(len(self.did))
        self.model.add_adapter(config_of(name), adapter_name=name)
        self._note(name)

    def load(self) -> None:
        moe_lora.load_adapter(self.model, self.folder, MOE, is_trainable=True)
        self._note(MOE)

    def _note(self, name: str) -> None:
        self.present.append(name)
        if name == MOE:
            # The mode is saved with the adapter.
            self.uniform = self.did[-1] == "load" and self.saved_uniform
        else:
            self.deltas[name] = delta_of(self.model, name)
        self.enable()
        self.activate()

    def delete(self) -> None:
        name = self.random.choice(self.present)
        self.did[-1] += f" {name}"
        self.enable()
        self.model.delete_adapters(name)
        self.present.remove(name)
        self.strengths.pop(name, None)
        if self.present:
            self.activate()

    def activate(self) -> None:
        names = self.random.sample(self.present, self.random.randint(1, len(self.present)))
        self.strengths = {name: self.random.choice([0.5, 1.0, 2.0]) for name in names}
        self.did[-1] += f" -> {self.strengths}"
        self.model.set_adapters(names, weights=list(self.strengths.values()))

    def switch(self) -> None:
        self.enabled = not self.enabled
        if self.enabled:
            self.model.enable_adapters()
        else:
            self.model.disable_adapters()

    def enable(self) -> None:
        self.enabled = True
        self.model.enable_adapters()

    def copy(self) -> None:
        old, self.model = self.model, copy.deepcopy(self.model)
        with torch.no_grad():
            for name, parameter in old.named_parameters():
                if "lora" in name:
                    parameter.fill_(torch.nan)  # nothing of the old one may be in use

    def set_mode(self) -> None:
        self.uniform = not self.uniform
        moe_lora.set_routing_mode(self.model, "uniform" if self.uniform else "routed")

    def train(self) -> None:
        learned = [p for n, p in self.model.named_parameters() if ".moe_lora_experts." in n]
        for p in learned:
            p.requires_grad_()
        loss = self.model(**self.inputs)[0].square().mean()
        expected = self.expected(self._weights()).square().mean()
        grads = torch.autograd.grad(loss, learned)
        assert_close(grads, torch.autograd.grad(expected, learned))
        with torch.no_grad():
            for p, grad in zip(learned, grads, strict=True):
                p -= 0.1 * grad / (1 + grad.norm())

    def merge_and_back(self) -> None:
        weights = rows(len(self.did), 1)[0]
        moe_lora.merge(self.model, weights)
        with torch.no_grad():
            assert_close(self.model(**self.inputs)[0], self.expected(weights))
        moe_lora.unmerge(self.model)

    def save(self) -> None:
        moe_lora.save_adapter(self.model, self.folder, MOE)
        self.saved, self.saved_uniform = True, self.uniform
        fresh = copy.deepcopy(self.reference.model)
        moe_lora.load_adapter(fresh, self.folder, MOE)
        weights = rows(1)
        with torch.no_grad(), moe_lora.route(fresh, weights):
            expected = self.reference([mixture_of(self.model, weights, MOE)], **self.inputs)[0]
            assert_close(fresh(**self.inputs)[0], expected)

    def _weights(self) -> Tensor:
        """Return the weights that the last pass of the model was to have."""
        if self.uniform or MOE not in self.strengths:
            return UNIFORM
        decision = moe_lora.current_routing(self.model, MOE)
        assert decision is not None
        return decision.weights.detach()

    def expected(self, weights: Tensor) -> Tensor:
        terms: list[Mixture | Delta] = []
        for name, strength in self.strengths.items() if self.enabled else ():
            if name == MOE:
                terms.append(mixture_of(self.model, weights, MOE, strength))
            else:
                terms.append(Delta(self.deltas[name].weights, strength))
        return self.reference(terms, **self.inputs)[0]

    @torch.no_grad()
    def check(self) -> None:
        found = self.model(**self.inputs)[0]
        weights = self._weights() if self.enabled else UNIFORM
        assert_close(found, self.expected(weights))
        if MOE in self.present:
            weights = rows(len(self.did))
            with moe_lora.route(self.model, weights):
                assert_close(self.model(**self.inputs)[0], self.expected(weights))

    def live(self, steps: int) -> None:
        """Act and compare; an error names what was done."""
        for _ in range(steps):
            act = self.random.choice(self.acts())
            self.did.append(act.__name__)
            try:
                act()
                self.check()
            except Exception as error:
                error.add_note("did: " + "; ".join(self.did))
                raise


@pytest.fixture
def make_life(make_flux, make_flux_inputs, tmp_path):
    def make(seed: int) -> Life:
        base = make_flux().eval()
        with torch.no_grad():
            for parameter in base.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
        base.requires_grad_(False)
        return Life(base, make_flux_inputs(), tmp_path / "saved", seed)

    return make


@pytest.mark.parametrize("seed", range(16))
def test_a_random_life(make_life, seed):
    make_life(seed).live(steps=12)


ORDERS = [
    [MOE, "turbo", "style"],
    ["turbo", MOE, "style"],
    ["turbo", "style", MOE],
    ["loha", MOE, "turbo", "style"],
    [MOE, "loha", "turbo", "style"],
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("deleted", [None, "turbo", MOE])
def test_plain_adapters_beside_a_mixture_in_any_order(make_life, order, deleted):
    life = make_life(0)
    for name in order:
        torch.manual_seed(len(life.present))
        life.did.append("add")
        life.model.add_adapter(config_of(name), adapter_name=name)
        life._note(name)
        life.check()
    if deleted is not None:
        life.model.delete_adapters(deleted)
        life.present.remove(deleted)
        life.activate()
        life.check()
    life.strengths = dict.fromkeys(life.present, 0.5)
    life.model.set_adapters(life.present, weights=[0.5] * len(life.present))
    life.check()
    if deleted == "turbo":
        life.save()
