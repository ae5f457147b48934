"""Adding, removing and renaming experts: what stays, what grows, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DataParallel

import moe_lora
from moe_lora import MoELoraConfig, Router
from moe_lora.composition.resized_config import raise_rank
from moe_lora.routing import FixedRouter, UniformRouter

WEIGHTS = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.1, 0.2]])


@torch.no_grad()
def output(model, images, weights=None, **options):
    if weights is None:
        return model(images)
    with moe_lora.route(model, weights, **options):
        return model(images)


def with_zero(weights: Tensor) -> Tensor:
    return torch.cat([weights, torch.zeros(len(weights), 1)], -1)


def experts_of(model) -> dict[str, Any]:
    return moe_lora.export.expert_table.experts_by_layer(model.get_base_model(), "default")


def state_of(model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def slow_output(model, images, weights: Tensor) -> Tensor:
    """Add the experts one by one to copies of the base weights, sample by sample."""
    found = []
    for image, row in zip(images, weights, strict=True):
        plain = copy.deepcopy(model).unload()
        for path, experts in experts_of(model).items():
            weight = plain.get_submodule(path).weight
            for index, share in enumerate(row):
                A, B = experts.lora_A[index].flatten(1), experts.lora_B[:, index]
                weight.data += share * experts.scaling * (B @ A).view_as(weight)
        found.append(plain(image[None]))
    return torch.cat(found).detach()


class TestAdding:
    def test_the_other_experts_and_logits_stay_to_the_last_bit(self, make_model, images):
        model = make_model()
        expected = output(model, images)
        logits = moe_lora.current_routing(model).logits
        before = {path: (e.lora_A, e.lora_B) for path, e in experts_of(model).items()}
        routed = output(model, images, WEIGHTS, top_k=3)
        moe_lora.add_expert(model, "glow")
        for path, experts in experts_of(model).items():
            assert torch.equal(experts.lora_A[:3], before[path][0])
            assert torch.equal(experts.lora_B[:, :3], before[path][1])
            assert experts.lora_A.shape[0] == experts.lora_B.shape[1] == 4
        found = output(model, images)
        decision = moe_lora.current_routing(model)
        assert torch.equal(decision.logits[:, :3], logits)
        assert (decision.logits[:, 3] == -5).all()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # at a weight of 0.2 %
        torch.testing.assert_close(output(model, images, with_zero(WEIGHTS), top_k=3), routed)

    def test_outputs_are_equal_to_the_last_bit_at_a_weight_of_zero(self, make_model, images):
        # Linear layers compute the chosen experts only, in products of the same sizes as before.
        model = make_model(target_modules=["to_q", "to_out"], init_lora_weights=False)
        two = torch.tensor([[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]])
        expected = output(model, images, two, top_k=2)
        moe_lora.add_expert(model, "glow", init=False)
        assert torch.equal(output(model, images, with_zero(two), top_k=2), expected)

    def test_the_mixture_is_the_slow_sum_of_its_experts(self, make_model, make_lora, images):
        model = make_model()
        moe_lora.add_expert(model, "glow", lora=make_lora(r=6, rank_pattern={"to_q": 2})[0])
        moe_lora.add_expert(model, "shadow", init=False)
        weights = torch.rand(2, 5)
        expected = slow_output(model, images, weights)
        torch.testing.assert_close(output(model, images, weights), expected)

    @pytest.mark.parametrize("r", [2, 4, 7])
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_a_plain_lora_is_the_expert_and_the_others_stay(
        self, make_model, make_lora, images, r, use_rslora
    ):
        model = make_model(lora_alpha=3, use_rslora=use_rslora)
        before = output(model, images, WEIGHTS)
        scalings = {path: e.scaling for path, e in experts_of(model).items()}
        folder, plain = make_lora(r=r, lora_alpha=5, target_modules=["conv", "to_q"])
        moe_lora.add_expert(model, "glow", lora=folder)
        alone = torch.eye(4)[3].expand(2, 4)
        torch.testing.assert_close(output(model, images, alone), output(plain, images))
        torch.testing.assert_close(output(model, images, with_zero(WEIGHTS)), before)
        layers, config = experts_of(model), model.peft_config["default"]
        assert {path: e.scaling for path, e in layers.items()} == scalings
        for path, experts in layers.items():
            assert experts.r >= (r if path != "to_out" else 4)
            assert config.rank_of(path) == experts.r == experts.lora_A.shape[1]
            assert config.alpha_of(path) == experts.lora_alpha

    def test_a_lora_of_the_same_rank_and_scaling_is_copied_bit_by_bit(self, make_model, make_lora):
        folder, plain = make_lora(lora_alpha=8)
        model = make_model()
        moe_lora.add_expert(model, "glow", lora=folder)
        stored = plain.state_dict()
        for path, experts in experts_of(model).items():
            for factor, own in zip(("lora_A", "lora_B"), experts.expert(3), strict=True):
                saved = stored[f"base_model.model.{path}.{factor}.default.weight"]
                assert torch.equal(own, saved.reshape(own.shape))

    def test_an_expert_can_start_as_a_copy(self, make_model, images):
        model = make_model()
        moe_lora.add_expert(model, "again", init="b")
        copies = [torch.eye(4)[i].expand(2, 4) for i in (1, 3)]
        assert torch.equal(*(output(model, images, w) for w in copies))

    @pytest.mark.parametrize(
        ("init", "is_zero"), [(True, True), ("gaussian", True), (False, False)]
    )
    def test_an_initialization_of_the_config_can_be_chosen(self, make_model, init, is_zero):
        model = make_model()
        moe_lora.add_expert(model, "glow", init=init)
        for experts in experts_of(model).values():
            lora_A, lora_B = experts.expert(3)
            assert lora_A.all()
            assert (lora_B == 0).all() == is_zero

    @pytest.mark.parametrize("logit", [-80.0, 0.0])
    def test_the_first_logit_can_be_chosen(self, make_model, images, logit):
        model = make_model()
        before = output(model, images)
        moe_lora.add_expert(model, "glow", router_logit=logit)
        after = output(model, images)
        assert (moe_lora.current_routing(model).logits[:, 3] == logit).all()
        if logit < -50:
            torch.testing.assert_close(after, before)

    def test_uniform_weights_become_those_of_all_experts(self, make_model, images):
        model = make_model(router=None)
        moe_lora.add_expert(model, "glow", init=False)
        expected = slow_output(model, images, torch.full((2, 4), 0.25))
        torch.testing.assert_close(output(model, images), expected)

    def test_names_statistics_and_hints_follow(self, make_model, images):
        model = make_model()
        output(model, images)
        stats = moe_lora.routing_stats(model)
        moe_lora.add_expert(model, "glow")
        config = model.peft_config["default"]
        assert (config.expert_names, config.num_experts) == (("a", "b", "c", "glow"), 4)
        assert stats is moe_lora.routing_stats(model)
        assert stats.usage == [0] * 4
        with moe_lora.router_inputs(model, task_hint="glow_only"):
            output(model, images)
        assert moe_lora.current_routing(model).weights.tolist() == [[0.0, 0.0, 0.0, 1.0]] * 2
        assert stats.usage == [0, 0, 0, 2]

    def test_a_config_shared_with_another_model_stays(self, make_model):
        config = MoELoraConfig(target_modules=["to_q"], num_experts=2)
        one, other = (get_peft_model(copy.deepcopy(make_model().unload()), config) for _ in "ab")
        moe_lora.add_expert(one, "glow")
        assert other.peft_config["default"].num_experts == config.num_experts == 2
        assert one.peft_config["default"].num_experts == 3

    def test_only_the_named_adapter_grows(self, make_model, images):
        model = make_model()
        model.add_adapter("other", MoELoraConfig(target_modules=["to_q"], num_experts=2))
        moe_lora.add_expert(model, "glow", adapter_name="other")
        assert len(model.peft_config["default"].experts) == 3
        assert len(model.peft_config["other"].experts) == 3
        model.set_adapter("other")
        assert output(model, images, torch.rand(2, 3)).isfinite().all()

    @pytest.mark.parametrize("active", [True, False])
    def test_trained_and_disabled_adapters_stay_what_they_are(self, make_model, images, active):
        model = make_model()
        plain = model.get_base_model()
        if not active:
            for layer in plain.modules():
                if hasattr(layer, "set_requires_grad"):
                    layer.set_requires_grad("default", False)
        moe_lora.add_expert(model, "glow")
        own = [p for n, p in model.named_parameters() if "moe_lora_" in n]
        assert {p.requires_grad for p in own} == {active}
        with model.disable_adapter():
            assert torch.equal(output(model, images), output(copy.deepcopy(model).unload(), images))


class TestRemovingAndRenaming:
    @pytest.mark.parametrize("router", ["grows_in_tests", None])
    def test_removing_an_added_expert_restores_every_bit(self, make_model, images, router):
        model = make_model(router=router)
        state, expected = state_of(model), output(model, images)
        config = model.peft_config["default"].to_dict()
        moe_lora.add_expert(model, "glow", init=False)
        moe_lora.remove_expert(model, "glow")
        restored = state_of(model)
        assert restored.keys() == state.keys()
        assert all(torch.equal(tensor, restored[name]) for name, tensor in state.items())
        assert torch.equal(output(model, images), expected)
        after = model.peft_config["default"].to_dict()
        after["router_kwargs"] = config["router_kwargs"]
        assert after == config

    def test_the_others_keep_their_weights_in_relation(self, make_model, images):
        model = make_model()
        output(model, images)
        before = moe_lora.current_routing(model)
        kept = [{path: e.expert(i) for path, e in experts_of(model).items()} for i in (0, 2)]
        moe_lora.remove_expert(model, "b")
        output(model, images)
        after = moe_lora.current_routing(model)
        assert torch.equal(after.logits, before.logits[:, [0, 2]])
        expected = before.weights[:, [0, 2]]
        torch.testing.assert_close(after.weights, expected / expected.sum(-1, keepdim=True))
        for path, experts in experts_of(model).items():
            for index, old in enumerate(kept):
                assert all(map(torch.equal, experts.expert(index), old[path]))

    def test_renaming_changes_names_only(self, make_model, images, tmp_path):
        model = make_model()
        expected, parameters = output(model, images), list(model.parameters())
        usage = moe_lora.routing_stats(model).usage
        moe_lora.rename_expert(model, "b", "glow")
        assert model.peft_config["default"].expert_names == ("a", "glow", "c")
        assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
        assert moe_lora.routing_stats(model).usage == usage
        assert "glow=" in moe_lora.routing_stats(model).log_line()
        assert torch.equal(output(model, images), expected)
        moe_lora.save_experts(model, tmp_path)
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["a", "c", "glow"]


class TestFilesAndCopies:
    def test_a_grown_mixture_is_saved_and_loaded_by_stock_calls(
        self, make_model, make_lora, images, tmp_path
    ):
        model = make_model()
        moe_lora.add_expert(model, "glow", lora=make_lora(r=7)[0])
        expected = output(model, images)
        model.save_pretrained(tmp_path / "stock")
        moe_lora.save_adapter(model, tmp_path / "ours")
        for folder in ("stock", "ours"):
            base = copy.deepcopy(model).unload()
            loaded = PeftModel.from_pretrained(base, tmp_path / folder).eval()
            assert torch.equal(output(loaded, images), expected)
            assert loaded.peft_config["default"].experts == ("a", "b", "c", "glow")

    def test_the_next_step_after_loading_is_that_of_the_uninterrupted_run(
        self, make_model, images, tmp_path
    ):
        def step(model):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            model(images).square().mean().backward()
            optimizer.step()
            return {n: p for n, p in model.named_parameters() if p.requires_grad}

        model = make_model()
        moe_lora.add_expert(model, "glow", init="a", router_logit=0.0)
        model.save_pretrained(tmp_path)
        base = copy.deepcopy(model).unload()
        loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
        expected, found = step(model), step(loaded)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    def test_experts_and_fixed_mixtures_are_exported(self, make_model, make_lora, images, tmp_path):
        model = make_model()
        folder, plain = make_lora(r=6)
        moe_lora.add_expert(model, "glow", lora=folder)
        moe_lora.export_lora(model, tmp_path / "glow", "glow", format="peft")
        moe_lora.save_experts(model, tmp_path / "experts")
        for path in (tmp_path / "glow", tmp_path / "experts" / "glow"):
            loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), path).eval()
            torch.testing.assert_close(output(loaded, images), output(plain, images))

    def test_merging_works_afterwards_and_is_refused_before(self, make_model, images):
        model = make_model()
        moe_lora.merge(model, [0.2, 0.3, 0.5])
        for change in (
            lambda: moe_lora.add_expert(model, "glow"),
            lambda: moe_lora.remove_expert(model, "a"),
        ):
            with pytest.raises(ValueError, match="merged"):
                change()
        moe_lora.unmerge(model)
        moe_lora.add_expert(model, "glow", init=False)
        weights = torch.tensor([0.2, 0.3, 0.1, 0.4])
        expected = output(model, images, weights)
        moe_lora.merge(model, weights)
        torch.testing.assert_close(output(model, images), expected)

    @pytest.mark.parametrize("router", ["three_expert_removal", "mask_aware"])
    def test_the_command_line_reads_grown_checkpoints(self, make_flux, tmp_path, capsys, router):
        from moe_lora.cli import main

        config = MoELoraConfig(r=2, target_modules=["to_q"], router=router)
        model = get_peft_model(make_flux(), config)
        moe_lora.add_expert(model, "glow", init=False)
        model.save_pretrained(tmp_path / "grown")
        assert main(["inspect", str(tmp_path / "grown")]) == 0
        assert "glow" in capsys.readouterr().out
        target = tmp_path / "glow.safetensors"
        assert main(["export", str(tmp_path / "grown"), str(target), "--weights", "glow"]) == 0
        moe_lora.export_lora(model, tmp_path / "same.safetensors", "glow")
        expected, found = load_file(tmp_path / "same.safetensors"), load_file(target)
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    def test_a_copy_is_independent(self, make_model, images):
        model = make_model()
        other = copy.deepcopy(model)
        expected = output(other, images)
        moe_lora.add_expert(model, "glow")
        assert torch.equal(output(other, images), expected)
        assert other.peft_config["default"].num_experts == 3

    def test_experts_in_bfloat16_stay_so(self, make_model):
        model = make_model()
        for experts in experts_of(model).values():
            experts.bfloat16()
        moe_lora.add_expert(model, "glow")
        assert {p.dtype for e in experts_of(model).values() for p in e.parameters()} == {
            torch.bfloat16
        }


class TestRouters:
    @pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            ("three_expert_removal", {}),
            ("three_expert_removal", {"num_layers": "auto", "time_aware": True}),
            ("token_removal", {}),
            ("mask_aware", {}),
            ("mask_aware", {"num_layers": "auto", "mode": "content_adaptive"}),
        ],
    )
    def test_the_routers_of_the_library_grow_and_shrink(
        self, make_flux, make_flux_inputs, tmp_path, name, kwargs
    ):
        config = MoELoraConfig(
            r=2, target_modules=["to_q", "to_v"], router=name, router_kwargs=kwargs
        )
        model = get_peft_model(make_flux(), config).eval()
        inputs = make_flux_inputs()
        with torch.no_grad():
            model(**inputs)
        before, state = moe_lora.current_routing(model), state_of(model)
        parameters = set(map(id, model.get_submodule("base_model.model.moe_router").parameters()))
        moe_lora.add_expert(model, "glow", router_logit=-3.0)
        with torch.no_grad():
            model(**inputs)
        after = moe_lora.current_routing(model)
        assert torch.equal(after.logits[..., :3], before.logits)
        assert (after.logits[..., 3] == -3).all()
        kept = set(map(id, model.get_submodule("base_model.model.moe_router").parameters()))
        assert parameters < kept
        moe_lora.save_adapter(model, tmp_path)
        loaded = PeftModel.from_pretrained(make_flux(), tmp_path).eval()
        with torch.no_grad():
            loaded(**inputs)
        assert torch.equal(moe_lora.current_routing(loaded).logits, after.logits)
        moe_lora.remove_expert(model, "glow")
        assert all(torch.equal(t, state[n]) for n, t in state_of(model).items())

    def test_any_number_of_experts_has_a_learned_router(self, make_flux, make_flux_inputs):
        config = MoELoraConfig(target_modules=["to_q"], num_experts=2, router="mask_aware")
        model = get_peft_model(make_flux(), config).train()
        model(**make_flux_inputs())[0].square().mean().backward()
        assert moe_lora.current_routing(model).weights.shape == (2, 2)
        router = next(m for m in model.modules() if isinstance(m, Router))
        assert router.init_kwargs["num_experts"] == 2
        assert all(p.requires_grad for p in router.parameters())

    def test_experts_with_rules_cannot_be_removed(self, make_flux):
        config = MoELoraConfig(target_modules=["to_q"], router="three_expert_removal")
        model = get_peft_model(make_flux(), config)
        with pytest.raises(ValueError, match="has rules"):
            moe_lora.remove_expert(model, "background_expert")
        assert model.peft_config["default"].num_experts == 3

    def test_fixed_weights_stay_and_are_renormalized(self):
        router = FixedRouter([0.5, 0.3, 0.2])
        router.add_expert(router.new_expert_logit)
        assert router.weights == (0.5, 0.3, 0.2, 0.0)
        router.remove_expert(3)
        assert router.weights == (0.5, 0.3, 0.2)
        router.remove_expert(2)
        assert router.weights == pytest.approx((0.625, 0.375))
        router.add_expert(math.log(0.25))
        assert router.weights == pytest.approx((0.5, 0.3, 0.2))
        assert router.init_kwargs == {"weights": list(router.weights)}

    def test_the_last_fixed_weight_above_zero_stays(self):
        with pytest.raises(ValueError, match="weight > 0"):
            FixedRouter([1.0, 0.0]).remove_expert(0)

    def test_the_uniform_router_has_no_other_logit(self):
        with pytest.raises(ValueError, match="router_logit"):
            UniformRouter().add_expert(-1.0)

    def test_a_router_without_the_methods_says_so(self, make_model):
        class Plain(Router):
            def logits(self, inputs):
                return torch.zeros(inputs.batch_size, 3)

        model = make_model()
        moe_lora.attach_router(model, Plain())
        state = state_of(model)
        with pytest.raises(TypeError, match=r"Plain has no add_expert\(logit\)"):
            moe_lora.add_expert(model, "glow")
        with pytest.raises(TypeError, match=r"Plain has no remove_expert\(index\)"):
            moe_lora.remove_expert(model, "a")
        assert state_of(model).keys() == state.keys()
        assert all(torch.equal(t, state[n]) for n, t in state_of(model).items())

    def test_a_router_that_a_checkpoint_could_not_rebuild_is_refused(self, make_model, images):
        class Forgetful(type(next(m for m in make_model().modules() if isinstance(m, Router)))):
            def add_expert(self, logit):
                super().add_expert(logit)
                self.init_kwargs["num_experts"] = 3

        model = make_model()
        moe_lora.attach_router(model, Forgetful())
        expected = output(model, images)
        with pytest.raises(ValueError, match="init_kwargs"):
            moe_lora.add_expert(model, "glow")
        assert torch.equal(output(model, images), expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: moe_lora.add_expert(m, "A"), "distinct"),
            (lambda m: moe_lora.add_expert(m, "x/y"), "name of a folder"),
            (lambda m: moe_lora.add_expert(m, "d", init="nobody"), "`init`"),
            (lambda m: moe_lora.add_expert(m, "d", lora="x", init=True), "one of `lora`"),
            (lambda m: moe_lora.add_expert(m, "d", adapter_name="x"), "adapter_name"),
            (lambda m: moe_lora.remove_expert(m, "d"), "one of the experts"),
            (lambda m: moe_lora.rename_expert(m, "a", "B"), "distinct"),
            (lambda m: moe_lora.rename_expert(m, "d", "e"), "one of the experts"),
        ],
    )
    def test_wrong_arguments(self, make_model, images, change, message):
        model = make_model()
        expected = output(model, images)
        with pytest.raises(ValueError, match=message):
            change(model)
        assert torch.equal(output(model, images), expected)

    def test_layers_that_the_mixture_does_not_adapt(self, make_model, make_lora):
        model = make_model(target_modules=["to_q"])
        with pytest.raises(ValueError, match=r"also adapts 'conv'.*from_loras"):
            moe_lora.add_expert(model, "glow", lora=make_lora()[0])

    def test_a_lora_for_another_width(self, make_flux, tmp_path):
        plain, config = (
            MoELoraConfig(target_modules=["x_embedder"], init_lora_weights=False) for _ in "ab"
        )
        plain = get_peft_model(make_flux(in_channels=64), plain)
        moe_lora.export_lora(plain, tmp_path / "plain.safetensors", "removal_expert")
        model: FluxTransformer2DModel = make_flux()
        model.add_adapter(config)
        with pytest.raises(ValueError, match="64 input channels, this one has 384"):
            moe_lora.add_expert(model, "glow", lora=tmp_path / "plain.safetensors")

    def test_the_last_expert_and_too_few_for_top_k(self, make_model):
        model = make_model(num_experts=1, expert_names=("a",), router=None)
        with pytest.raises(ValueError, match="only one"):
            moe_lora.remove_expert(model, "a")
        model = make_model(routing_strategy="topk", top_k=3)
        with pytest.raises(ValueError, match="top_k"):
            moe_lora.remove_expert(model, "a")

    def test_inside_of_a_context(self, make_model):
        model = make_model()
        with (
            moe_lora.route(model, torch.ones(3) / 3),
            pytest.raises(ValueError, match="open moe_lora"),
        ):
            moe_lora.add_expert(model, "glow")

    @pytest.mark.parametrize("function", ["add_expert", "remove_expert", "train_only"])
    def test_an_optimizer_made_before_raises(self, make_model, images, function):
        model = make_model()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        if function == "train_only":
            moe_lora.train_only(model, ["a"])
        else:
            getattr(moe_lora, function)(model, "glow" if function == "add_expert" else "a")
        with pytest.raises(RuntimeError, match=f"{function} has replaced"):
            optimizer.step()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()

    def test_a_replicated_model_is_no_obstacle(self, make_model):
        model = DataParallel(make_model())
        moe_lora.add_expert(model, "glow")
        assert model.module.peft_config["default"].num_experts == 4


@pytest.mark.parametrize("scaling", [(3.0, 7), (10.0, 3), (0.1, 9), (1.0, 49)])
def test_raised_ranks_keep_the_scaling_to_the_last_bit(make_model, scaling):
    alpha, r = scaling
    experts = next(iter(experts_of(make_model(r=r, lora_alpha=alpha)).values()))
    for rank in range(r, r + 40):
        raised, new_alpha = raise_rank(experts, rank, use_rslora=False)
        assert raised >= rank
        assert new_alpha / raised == experts.base_scaling
