"""What holds for which model class of diffusers; docs/reference/model_families.md shows the table.

The classes are found in the installed diffusers; `family_cases` holds a tiny model of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers import ModelMixin
from family_cases import table
from family_cases.case import BATCH, Case, one_of
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.families import FAMILIES, candidate_targets, default_targets, family_of
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.layer import MoELoraLinear

# Without the slow tests these two stand for all: a transformer that packs its tokens, and a UNet.
CORE = ("FluxTransformer2DModel", "UNet2DConditionModel")


def param(case: Case, *further: int) -> Any:
    name = "-".join([case.name, *map(str, further)])
    return pytest.param(case, *further, id=name, marks=() if case.cls in CORE else pytest.mark.slow)


cases = pytest.mark.parametrize("case", [param(case) for case in table.CASES])


def build(case: Case) -> nn.Module:
    """Build the model with no weight at zero: gates that start closed would hide the experts."""
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, case.cls)(**case.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(mean=1.0, std=0.1)
    return model


def calls(case: Case, batch: int = BATCH) -> dict[str, Any]:
    torch.manual_seed(1)
    return case.inputs(batch)


def config_for(case: Case, *, router: bool = True) -> MoELoraConfig:
    return MoELoraConfig(
        r=2,
        lora_alpha=3,
        init_lora_weights=False,
        target_modules=None if case.targets is None else list(case.targets),
        router="three_expert_removal" if router else None,
        router_kwargs={k: v for k, v in case.router.items() if k == "input_dim"},
    )


def adapt(model: nn.Module, case: Case, *, router: bool = False) -> nn.Module:
    torch.manual_seed(2)
    config = config_for(case, router=router)
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
        return model
    return peft.inject_adapter_in_model(config, model)


def routed(case: Case) -> nn.Module:
    model = adapt(build(case), case, router=True)
    tell_router(model, case)
    return model


def tell_router(model: nn.Module, case: Case) -> None:
    """Set the masks that the call does not contain."""
    if not case.carries_mask:
        mask = torch.zeros(BATCH, 1, 32, 64)
        for index in range(BATCH):
            mask[index, :, 2 : 8 + 8 * index, 4 : 16 + 8 * index] = 1
        moe_lora.set_router_inputs(model, mask=mask, grid_size=case.router.get("grid_size"))


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def output(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Return all that a call gives, `(batch, everything)`."""
    found = model(**arguments)
    values = found.values() if isinstance(found, dict) else found
    return torch.cat([part.flatten(1) for value in values for part in parts(value)], dim=1)


def parts(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        yield torch.stack(list(value))


def experts_of(model: nn.Module) -> dict[str, Any]:
    return {
        path: module.moe_lora_experts["default"]
        for path, module in model.named_modules()
        if isinstance(module, RoutedLayer) and hasattr(module, "moe_lora_experts")
    }


def gradients(model: nn.Module, case: Case) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    output(model, calls(case)).square().mean().backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def weights_for(*shape: int) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(*shape, 3).mul(2).softmax(-1)


def discovered() -> set[str]:
    """Return the denoisers that diffusers exports, by their names and their base."""
    values = {
        name: getattr(diffusers, name)
        for name in dir(diffusers)
        if re.search("Transformer|UNet|UVit|DiT", name)
        and not re.search("ControlNet|Pipeline|Vae", name)
    }
    return {
        name
        for name, value in values.items()
        if isinstance(value, type) and issubclass(value, ModelMixin)
    }


class TestTable:
    def test_every_class_of_diffusers_is_tried_or_said_not_to_be(self) -> None:
        tried = {case.cls for case in table.CASES}
        assert tried & table.NOT_TRIED == set()
        assert discovered() == tried | table.NOT_TRIED

    def test_the_page_shows_the_table(self) -> None:
        text = table.PAGE.read_text(encoding="utf-8")
        assert text.partition(table.START)[2].partition(table.END)[0] == table.render()

    def test_writing_changes_nothing_but_the_table(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text(f"a\n{table.START}old\n{table.END}\nb\n", encoding="utf-8")
        table.write(page)
        assert page.read_text(encoding="utf-8") == (
            f"a\n{table.START}{table.render()}{table.END}\nb\n"
        )

    def test_every_default_is_tried(self) -> None:
        known = {name for family in FAMILIES if family.targets for name in family.classes}
        assert {case.cls for case in table.CASES if case.targets is None} == known


@cases
def test_a_routed_step_reaches_every_expert_and_the_router(case: Case) -> None:
    model = routed(case)
    found = gradients(model, case)
    layers = experts_of(model)
    assert layers
    for path in layers:
        a = found.get(f"{path}.moe_lora_experts.default.lora_A", torch.zeros(3, 1, 1))
        b = found.get(f"{path}.moe_lora_experts.default.lora_B", torch.zeros(1, 3, 1))
        reached = (a.flatten(1).abs().sum(1) > 0) & (b.abs().sum((0, 2)) > 0)
        idle = case.idle is not None and re.fullmatch(case.idle, path) is not None
        assert reached.tolist() == [not idle] * 3, path
    router = [name for name, _ in model.named_parameters() if "moe_lora_routers" in name]
    assert router
    for name in router:
        assert found[name].abs().sum() > 0, name


@cases
@torch.no_grad()
def test_a_batch_equals_its_samples(case: Case) -> None:
    model, arguments, weights = adapt(build(case), case), calls(case), weights_for(BATCH)
    with moe_lora.route(model, weights):
        together = output(model, arguments)
    with moe_lora.route(model, weights.flip(0)):
        assert distance(output(model, arguments), together) > 1e-3
    for index in range(BATCH):
        alone = {name: one_of(value, index) for name, value in arguments.items()}
        with moe_lora.route(model, weights[index : index + 1]):
            assert distance(output(model, alone), together[index : index + 1]) < 1e-5


@cases
@torch.no_grad()
def test_a_saved_adapter_gives_the_same_in_a_fresh_model(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(2)
    adapted = peft.get_peft_model(build(case), config_for(case)).eval()
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(case), tmp_path).eval()
    tell_router(adapted, case), tell_router(loaded, case)
    expected = output(adapted, calls(case))
    assert torch.equal(output(loaded, calls(case)), expected)
    with loaded.disable_adapter():
        assert distance(output(loaded, calls(case)), expected) > 1e-3


@cases
def test_checkpointing_changes_no_gradient(case: Case) -> None:
    model = routed(case)
    supported = getattr(diffusers, case.cls)._supports_gradient_checkpointing
    assert supported == (case.checkpointing != "none")
    if case.checkpointing == "none":
        return
    if case.checkpointing == "broken":
        base = build(case)
        base.enable_gradient_checkpointing()
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            base(**calls(case))
        return
    plain = gradients(model, case)
    model.enable_gradient_checkpointing()
    again = gradients(model, case)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


by_token = pytest.mark.parametrize(
    ("case", "tokens"),
    [param(case, tokens) for case in table.CASES for tokens in table.TOKENS.get(case.name, ())],
)


@by_token
@torch.no_grad()
def test_weights_per_token_are_followed(case: Case, tokens: int) -> None:
    model, arguments = adapt(build(case), case), calls(case)
    by_sample = weights_for(BATCH)
    with moe_lora.route(model, by_sample):
        expected = output(model, arguments)
    same = by_sample[:, None].expand(-1, tokens, -1)
    with moe_lora.route(model, same):
        assert distance(output(model, arguments), expected) < 1e-5
    weights = weights_for(BATCH, tokens)
    with moe_lora.route(model, weights):
        together = output(model, arguments)
    with moe_lora.route(model, weights.flip(1)):
        assert distance(output(model, arguments), together) > 1e-3
    for index in range(BATCH):
        alone = {name: one_of(value, index) for name, value in arguments.items()}
        with moe_lora.route(model, weights[index : index + 1]):
            assert distance(output(model, alone), together[index : index + 1]) < 1e-5
    wrong = weights_for(BATCH, max(table.TOKENS[case.name]) + 1)
    with moe_lora.route(model, wrong), pytest.raises(ValueError, match="tokens"):
        output(model, arguments)


def rows_of_first_image_layer(
    model: nn.Module, arguments: dict[str, Any], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return input and weights of the first layer that sees image tokens, row by row."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        (x,) = args
        if x.ndim > 2 and layer.stream != "text" and not found:
            routing = layer.context.routing_for("default")
            aligned, _ = layer._layer_weights(routing, "default", x)
            found.append((x.clone(), aligned.expand(*x.shape[:-1], -1).clone()))

    handles = [
        module.register_forward_pre_hook(keep)
        for module in model.modules()
        if isinstance(module, MoELoraLinear)
    ]
    with moe_lora.route(model, weights):
        output(model, arguments)
    for handle in handles:
        handle.remove()
    return found[0]


@pytest.mark.parametrize("case", [param(case) for case in table.CASES if case.name in table.TOKENS])
@torch.no_grad()
def test_a_token_has_the_weights_of_its_own_position_in_the_image(case: Case) -> None:
    """The outputs that change with a position of the latents use the weights of that position."""
    model, arguments = adapt(build(case), case), calls(case)
    name, latents = latents_of(arguments)
    pixels = latents.shape[-2] * latents.shape[-1]
    tokens = table.TOKENS[case.name][0] if latents.ndim == 3 else pixels
    swapped, moved, weights = [1, tokens - 2], latents.clone(), weights_for(BATCH, tokens)
    exchanged = weights.clone()
    exchanged[:, swapped] = weights[:, swapped[::-1]]  # which leaves the mean what it is
    for place in swapped:
        if latents.ndim == 3:
            moved[:, place::tokens] += 3
        else:
            moved[..., place // latents.shape[-1], place % latents.shape[-1]] += 3
    x, used = rows_of_first_image_layer(model, arguments, weights)
    touched = x != rows_of_first_image_layer(model, {**arguments, name: moved}, weights)[0]
    _, again = rows_of_first_image_layer(model, arguments, exchanged)
    taking = ((used - again).abs() > 1e-4).any(-1)
    assert taking.any()
    assert not (taking & ~touched.any(-1)).any()
    assert not taking.all()


def latents_of(arguments: dict[str, Any]) -> tuple[str, Tensor]:
    return next((n, arguments[n]) for n in ("hidden_states", "sample", "x") if n in arguments)


def cuts_patches(case: Case) -> bool:
    """Return whether the model makes tokens of pixels, each of pixels of its own."""
    mixes = "UNet" in case.cls or case.cls == "Transformer2DModel"
    return case.name in table.TOKENS and not mixes and latents_of(calls(case))[1].ndim > 3


@pytest.mark.parametrize("case", [param(case) for case in table.CASES if cuts_patches(case)])
@torch.no_grad()
def test_a_token_of_an_odd_image_has_the_weights_of_the_pixels_that_reach_it(case: Case) -> None:
    model, arguments = adapt(build(case), case), calls(case)
    name, latents = latents_of(arguments)
    old = latents.shape
    size = (old[-2] + 1, old[-1] + 1)
    for key, value in arguments.items():
        if isinstance(value, Tensor) and value.ndim == len(old) and value.shape[-2:] == old[-2:]:
            arguments[key] = torch.randn(*value.shape[:-2], *size)
    if case.cls in table.EVEN_SIZES:
        with pytest.raises(RuntimeError, match=r"(?i)shape|size"):
            output(model, arguments)
        return
    weights = weights_for(BATCH, size[0] * size[1])
    x, used = rows_of_first_image_layer(model, arguments, weights)
    reach = []
    for place in range(size[0] * size[1]):
        moved = arguments[name].clone()
        moved[..., place // size[1], place % size[1]] += 3
        y, _ = rows_of_first_image_layer(model, {**arguments, name: moved}, weights)
        reach.append((x != y).flatten(3 if x.ndim > 3 else 2).any(-1)[0].flatten())
    used = used.flatten(1, -2)
    for token, pixels in enumerate(torch.stack(reach, 1)):
        expected = weights[:, pixels].mean(1)
        torch.testing.assert_close(used[:, token], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [param(case) for case in table.CASES if case.targets is None])
@torch.no_grad()
def test_an_exported_expert_is_the_mixture_at_one_hot_weights(case: Case, tmp_path: Path) -> None:
    model, arguments = adapt(build(case), case), calls(case)
    folder = moe_lora.save_experts(model, tmp_path)[1]
    loaded = peft.PeftModel.from_pretrained(build(case), folder).eval()
    with moe_lora.route(model, torch.tensor([0.0, 1.0, 0.0])):
        expected = output(model, arguments)
    assert distance(output(loaded, arguments), expected) < 1e-5


TEXT_INPUTS = {
    "cap_feats",
    "encoder_hidden_states",
    "encoder_hidden_states_llama3",
    "encoder_hidden_states_t5",
    "siglip_feats",
    "text_bth",
    "text_encoder_layers",
}
IMAGE_INPUTS = {"audio_hidden_states", "hidden_states", "sample", "x"}


def shaken(value: Any) -> Any:
    if isinstance(value, list):
        return [shaken(item) for item in value]
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value + torch.randn_like(value) if floating else value


def inputs_of_layers(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Return the input of the first call of every linear layer."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = [*args, *kwargs.values()][0]
            found.setdefault(path, x.detach().clone())

        return hook

    handles = [
        module.register_forward_pre_hook(keep(path), with_kwargs=True)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    output(model, arguments)
    for handle in handles:
        handle.remove()
    return found


@cases
@torch.no_grad()
def test_layers_see_the_tokens_and_the_rows_that_their_paths_say(case: Case) -> None:
    model, arguments = build(case), calls(case)
    family = family_of(model)
    seen = inputs_of_layers(model, arguments)
    text = inputs_of_layers(
        model, {k: shaken(v) if k in TEXT_INPUTS else v for k, v in arguments.items()}
    )
    image = inputs_of_layers(
        model, {k: shaken(v) if k in IMAGE_INPUTS else v for k, v in arguments.items()}
    )
    for path, x in seen.items():
        layout = family.layout(path)
        if layout == "folded":
            assert x.shape[0] % BATCH == 0, path
        elif layout == "sample":
            apart = case.apart is not None and re.fullmatch(case.apart, path) is not None
            assert (x.shape[0] != BATCH) == apart, (path, x.shape)
        if x.ndim < 3 or layout != "sample":
            continue
        by_text, by_image = not torch.equal(x, text[path]), not torch.equal(x, image[path])
        if by_text != by_image:
            assert family.stream(path) == ("text" if by_text else "image"), path


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"to_q": nn.Linear(2, 2), "to_out": nn.Sequential(nn.Linear(2, 2), nn.Dropout())}
            )
            for _ in range(2)
        )
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class TestDefaultTargets:
    def test_an_unknown_family_is_named_with_its_candidates(self) -> None:
        expected = r"layers to adapt in Unknown, .*: to_q \(2\), to_out\.0 \(2\), head \(1\)\."
        with pytest.raises(ValueError, match=expected):
            peft.get_peft_model(Unknown(), MoELoraConfig())

    def test_candidates_are_bounded_and_usable(self) -> None:
        many = nn.ModuleDict({f"layer_{i}x": nn.Linear(1, 1) for i in range(30)})
        assert len(candidate_targets(many)) == 20
        assert len(candidate_targets(many, limit=3)) == 3
        targets = list(candidate_targets(Unknown()))
        model = peft.get_peft_model(Unknown(), MoELoraConfig(target_modules=targets))
        assert len(experts_of(model)) == 5
        with pytest.raises(ValueError, match="The model has no linear layer"):
            default_targets(nn.ReLU())

    def test_a_subclass_counts_as_its_base(self) -> None:
        known = type("FluxTransformer2DModel", (Unknown,), {})
        assert "add_q_proj" in default_targets(type("Mine", (known,), {})())

    def test_the_last_projection_is_left_out_and_targets_are_kept_in_the_config(self) -> None:
        for case in table.CASES:
            if case.targets is None:
                model = adapt(build(case), case)
                assert not any(path.startswith(("proj_out", "conv")) for path in experts_of(model))
                kept = model.peft_config["default"].target_modules
                assert kept == default_targets(model)
