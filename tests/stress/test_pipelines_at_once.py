"""Tiny FLUX Fill models and stock pipelines, at once and interleaved, against the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stress.reference import Reference, mixture_of
from stress.toys import assert_close, in_threads, meet, rows
from tiny_models import tiny_flux_fill, tiny_vae
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig

pytestmark = pytest.mark.slow

SIZE = {"height": 32, "width": 48}


@pytest.fixture
def flux(make_flux, flux_targets):
    """Return an adapted model and its reference."""
    model = make_flux(layers=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    reference = Reference(model)
    torch.manual_seed(2)
    model.add_adapter(
        MoELoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=flux_targets,
            router="three_expert_removal",
            init_lora_weights=False,
        )
    )
    return model, reference


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [model.transformer_blocks[0], model.single_transformer_blocks[0]]


def weights_alone(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return what the router says of a call, asked by a copy that nobody else uses."""
    alone = copy.deepcopy(model)
    with torch.no_grad():
        alone(**inputs)
    return moe_lora.current_routing(alone).weights


def filled(inputs: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return inputs with a mask over the first tokens, unlike those of other shares."""
    hidden = inputs["hidden_states"].clone()
    hidden[..., 128:] = 0
    hidden[:, : int(share * hidden.shape[1]), 128:] = 1
    return {**inputs, "hidden_states": hidden}


def test_threads_with_masks_of_their_own(flux, make_flux_inputs):
    model, reference = flux
    sizes = [(1, 4, 6), (2, 4, 6), (1, 6, 4), (3, 2, 6)]
    calls = [
        filled(make_flux_inputs(*size), share)
        for size, share in zip(sizes, (0.02, 0.3, 0.6, 0.95), strict=True)
    ]
    weights = [weights_alone(model, call) for call in calls]
    assert (weights[0][0] - weights[3][0]).abs().max() > 0.2
    with torch.no_grad():
        expected = [
            reference([mixture_of(model, w)], **call)[0]
            for w, call in zip(weights, calls, strict=True)
        ]
        given = rows(1, batch=2)
        expected.append(reference([mixture_of(model, given)], **calls[1])[0])
    meet(5, *blocks_of(model))

    def call(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model(**inputs)[0]

    def given_call() -> Tensor:
        with moe_lora.route(model, given):
            return call(calls[1])

    found = in_threads(*(lambda c=c: call(c) for c in calls), given_call)
    for got, wanted in zip(found, expected, strict=True):
        assert_close(got, wanted)


class Pipeline:
    """A `FluxFillPipeline` that shares everything but its scheduler, with a mask of its own."""

    def __init__(self, transformer: nn.Module, vae: nn.Module, share: float, seed: int) -> None:
        self.pipe = tiny_flux_fill(transformer=transformer, vae=vae)
        self.share, self.seed = share, seed

    def alone(self) -> Tensor:
        """Return the output of copies of all parts, which nobody else uses."""
        return Pipeline(
            copy.deepcopy(self.pipe.transformer),
            copy.deepcopy(self.pipe.vae),
            self.share,
            self.seed,
        )()

    def __call__(self, **kwargs: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        mask = torch.zeros(1, 1, *SIZE.values())
        mask[..., : int(self.share * SIZE["height"]), :] = 1
        return self.pipe(
            prompt_embeds=torch.randn(1, 5, 16, generator=generator),
            pooled_prompt_embeds=torch.randn(1, 16, generator=generator),
            image=torch.rand(1, 3, *SIZE.values(), generator=generator),
            mask_image=mask,
            num_inference_steps=2,
            generator=generator,
            output_type="latent",
            **SIZE,
            **kwargs,
        ).images


@pytest.fixture
def pipelines(flux):
    """Return three pipelines on one model and one VAE."""
    vae = tiny_vae().eval()
    shares = (0.1, 0.5, 1.0)
    return [Pipeline(flux[0], vae, share, seed) for seed, share in enumerate(shares)]


def test_a_pipeline_is_what_the_reference_makes_of_every_step(flux, pipelines):
    model, reference = flux
    calls: list[tuple[dict[str, Any], Tensor]] = []
    model.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    pipelines[0]()
    model._forward_hooks.popitem()
    assert len(calls) == 2
    for inputs, out in calls:
        with torch.no_grad():
            term = mixture_of(model, weights_alone(model, inputs))
            assert_close(out, reference([term], **inputs)[0])


def test_one_pipeline_per_thread(flux, pipelines):
    expected = [pipeline.alone() for pipeline in pipelines]
    meet(len(pipelines), *blocks_of(flux[0]))
    for found, wanted in zip(in_threads(*pipelines), expected, strict=True):
        assert_close(found, wanted)


def test_one_pipeline_per_thread_under_weights_of_its_own(flux, pipelines):
    model, _ = flux
    weights = [rows(seed, batch=1) for seed in range(3)]

    def run(pipeline: Pipeline, w: Tensor) -> Tensor:
        with moe_lora.route(pipeline.pipe.transformer, w):
            return pipeline()

    expected = []
    for pipeline, w in zip(pipelines, weights, strict=True):
        alone = Pipeline(copy.deepcopy(model), pipeline.pipe.vae, pipeline.share, pipeline.seed)
        expected.append(run(alone, w))
    assert not torch.allclose(expected[0], pipelines[0].alone())
    meet(len(pipelines), *blocks_of(model))
    pairs = zip(pipelines, weights, strict=True)
    found = in_threads(*(lambda pair=pair: run(*pair) for pair in pairs))
    for got, wanted in zip(found, expected, strict=True):
        assert_close(got, wanted)


def test_a_pipeline_that_runs_another_at_the_end_of_every_step(pipelines):
    first, second, third = pipelines
    expected = [pipeline.alone() for pipeline in pipelines]
    w = rows(1, batch=1)

    def run_third(_: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert_close(third(), expected[2])
        return kwargs

    def run_second(_: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert_close(second(callback_on_step_end=run_third), expected[1])
        with moe_lora.route(second.pipe.transformer, w):
            third()
        return kwargs

    assert_close(first(callback_on_step_end=run_second), expected[0])


def test_a_pipeline_that_runs_another_inside_a_block(flux, pipelines):
    first, second, _ = pipelines
    expected = [pipeline.alone() for pipeline in (first, second)]
    inside = []

    def run_second(*_: object) -> None:
        if not inside:
            inside.append(True)
            assert_close(second(), expected[1])
            inside.clear()

    flux[0].single_transformer_blocks[0].register_forward_pre_hook(run_second)
    assert_close(first(), expected[0])


def test_pipelines_that_take_turns_step_by_step(flux, pipelines):
    expected = [pipeline.alone() for pipeline in pipelines]
    turns = meet(len(pipelines))

    def take_turns(_: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        turns.wait()
        return kwargs

    def run(pipeline: Pipeline) -> Tensor:
        return pipeline(callback_on_step_end=take_turns)

    found = in_threads(*(lambda p=pipeline: run(p) for pipeline in pipelines))
    for got, wanted in zip(found, expected, strict=True):
        assert_close(got, wanted)
