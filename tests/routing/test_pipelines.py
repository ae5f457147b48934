"""Stock pipelines with guidance and several images per prompt: every sample as if it ran alone."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import TEXT_PARTS, tiny_flux, tiny_vae

import moe_lora
from moe_lora import MoELoraConfig

pytestmark = pytest.mark.slow

TARGETS = ["to_q", "to_v", "to_out.0", "add_q_proj", "norm1.linear", "ff.net.2"]
SIZE = {"height": 32, "width": 48}


def adapt(model, router, **kwargs):
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    torch.manual_seed(2)
    model.add_adapter(
        MoELoraConfig(
            r=2,
            lora_alpha=3,
            init_lora_weights=False,
            target_modules=TARGETS,
            router=router,
            router_kwargs=kwargs,
        )
    )
    return model


@pytest.fixture(autouse=True)
def _same_picture_same_latents(monkeypatch):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_, **__: self.mode())


def masks(count):
    """Return masks that differ in size and shape."""
    mask = torch.zeros(count, 1, SIZE["height"], SIZE["width"])
    for index in range(count):
        mask[index, :, 2 : 8 + 7 * index, 4 : 12 + 10 * index] = 1
    return mask


def flux(kind, router, **kwargs):
    import diffusers

    cls = {"plain": "FluxPipeline", "fill": "FluxFillPipeline", "kontext": "FluxKontextPipeline"}
    transformer = tiny_flux(384 if kind == "fill" else 64)
    pipe = getattr(diffusers, cls[kind])(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        transformer=adapt(transformer, router, **kwargs),
        **dict.fromkeys(TEXT_PARTS),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3(router, **kwargs):
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    names = ("text_encoder", "tokenizer")
    parts = dict.fromkeys(f"{name}{end}" for name in names for end in ("", "_2", "_3"))
    pipe = diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        transformer=adapt(transformer, router, **kwargs),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(channels, router, **kwargs):
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = diffusers.StableDiffusionInpaintPipeline(
        vae=tiny_vae(4),
        unet=adapt(unet, router, **kwargs),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **dict.fromkeys(("text_encoder", "tokenizer")),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def run(pipe, text, latents, *, images_per_prompt=1, guidance, mask=None, **more):
    """Return latents of two steps."""
    name = type(pipe).__name__
    if hasattr(pipe, "transformer"):
        # Transformer pipelines repeat the text that they encode, but none that is given.
        text, images_per_prompt = text.repeat_interleave(images_per_prompt, dim=0), 1
    arguments = {"prompt_embeds": text, **more}
    if "Flux" in name or "3" in name:
        arguments["pooled_prompt_embeds"] = text.mean(1)
        if "3" in name:
            arguments["negative_pooled_prompt_embeds"] = torch.zeros_like(text.mean(1))
    if "Diffusion" in name:
        arguments["negative_prompt_embeds"] = torch.zeros_like(text)
    if "Flux" in name:
        packed = latents.unflatten(2, (2, 2)).unflatten(-1, (3, 2)).permute(0, 2, 4, 1, 3, 5)
        latents = packed.reshape(len(latents), 6, 64)
    if mask is not None:
        arguments["mask_image"] = mask
    if "Inpaint" in name:
        arguments["strength"] = 1.0
    return pipe(
        latents=latents,
        num_images_per_prompt=images_per_prompt,
        guidance_scale=guidance,
        num_inference_steps=2,
        output_type="latent",
        **SIZE,
        **arguments,
    ).images


def weights_seen(pipe, *args, **kwargs):
    """Return result and the routing weights of every call."""
    model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    seen = []
    handle = model.register_forward_hook(
        lambda *_: seen.append(moe_lora.current_routing(model).weights)
    )
    result = run(pipe, *args, **kwargs)
    handle.remove()
    return result, seen


ROUTERS = ("three_expert_removal", "token_removal")
IMAGES = torch.rand(3, 3, 32, 48)


def noise_for(count, channels):
    return torch.randn(count, channels, 4, 6, generator=torch.Generator().manual_seed(5))


def check(pipe, channels, *, guidance, given, images_per_prompt=1, picture=None, distinct=True):
    """Compare a batch with the runs of its samples; `given` masks go to the router by hand."""
    model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    prompts, count = 2, 2 * images_per_prompt
    text = torch.randn(prompts, 5, 16, generator=torch.Generator().manual_seed(6))
    noise, mask = noise_for(count, channels), masks(prompts)
    rows = torch.arange(prompts).repeat_interleave(images_per_prompt)
    # Pipelines that carry a mask repeat masks and pictures in another order than prompts.
    carried = torch.arange(prompts).repeat(images_per_prompt)
    more = {} if picture is None else {"image": picture[:prompts]}
    # A mask that is given goes with its sample's image, where there is one.
    own = carried if "Inpaint" in type(pipe).__name__ else rows
    if given:
        moe_lora.set_router_inputs(model, mask=mask[own])
    carry = {"mask": mask} if "Fill" in type(pipe).__name__ or "Inpaint" in str(type(pipe)) else {}
    together, _ = weights_seen(
        pipe,
        text,
        noise,
        images_per_prompt=images_per_prompt,
        guidance=guidance,
        **carry,
        **more,
    )
    results = []
    for index in range(count):
        one = carried[index : index + 1]
        if given:
            moe_lora.set_router_inputs(model, mask=mask[own[index] : own[index] + 1])
        results.append(
            run(
                pipe,
                text[rows[index] : rows[index] + 1],
                noise[index : index + 1],
                guidance=guidance,
                **({"mask": mask[one]} if carry else {}),
                **({} if picture is None else {"image": picture[one]}),
            )
        )
        torch.testing.assert_close(together[index : index + 1], results[-1], rtol=1e-3, atol=1e-4)
    if not given:
        return

    def again(masks_given):
        moe_lora.set_router_inputs(model, mask=masks_given)
        images = {"images_per_prompt": images_per_prompt, "guidance": guidance}
        return run(pipe, text, noise, **images, **carry, **more)

    # With the masks of the others it is another result.
    assert (again(mask[own].flip(0)) - together).abs().max() > 1e-3
    if images_per_prompt > 1:
        with pytest.raises(ValueError, match=r"samples of the call, .* but got 2.* Pass one per"):
            again(mask)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("images", [1, 2])
def test_flux_fill_routes_every_sample_by_the_mask_that_it_carries(router, images):
    pipe = flux("fill", router)
    check(pipe, 16, guidance=30.0, given=False, images_per_prompt=images, picture=IMAGES)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("images", [1, 2])
def test_flux_routes_by_the_masks_of_the_samples(router, images):
    check(flux("plain", router), 16, guidance=3.5, given=True, images_per_prompt=images)


@pytest.mark.parametrize("router", ROUTERS)
def test_kontext_routes_beside_its_references(router):
    pipe = flux("kontext", router)
    more = {"max_area": 32 * 48, "_auto_resize": False}
    picture = IMAGES[:2]
    text = torch.randn(2, 5, 16)
    noise, mask = noise_for(2, 16), masks(2)
    moe_lora.set_router_inputs(pipe.transformer, mask=mask)
    together, seen = weights_seen(pipe, text, noise, guidance=3.5, image=picture, **more)
    if router == "token_removal":
        assert seen[0].shape == (2, 6, 3)
    for index in range(2):
        one = slice(index, index + 1)
        moe_lora.set_router_inputs(pipe.transformer, mask=mask[one])
        alone = run(pipe, text[one], noise[one], guidance=3.5, image=picture[one], **more)
        torch.testing.assert_close(together[one], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("images", [1, 2])
def test_sd3_routes_the_doubled_batch_of_guidance(router, guidance, images):
    check(sd3(router), 16, guidance=guidance, given=True, images_per_prompt=images)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("images", [1, 2])
def test_stable_diffusion_inpainting_routes_the_doubled_batch(router, channels, images):
    pipe = stable_diffusion(channels, router)
    given = channels == 4
    check(pipe, 4, guidance=5.0, given=given, images_per_prompt=images, picture=IMAGES)


def test_time_is_read_in_the_models_own_counting():
    for make in (
        lambda: flux("plain", "token_removal", time_aware=True),
        lambda: sd3("three_expert_removal", time_aware=True),
    ):
        pipe = make()
        check(pipe, 16, guidance=5.0, given=True)


def test_offloaded_and_compiled_transformers_route_alike():
    from accelerate import cpu_offload

    pipe = sd3("token_removal", time_aware=True)
    text, noise = torch.randn(2, 5, 16), noise_for(2, 16)
    moe_lora.set_router_inputs(pipe.transformer, mask=masks(2))
    expected = run(pipe, text, noise, guidance=5.0)
    torch._dynamo.reset()
    compiled = copy.copy(pipe)
    compiled.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    torch.testing.assert_close(
        run(compiled, text, noise, guidance=5.0), expected, rtol=1e-3, atol=1e-4
    )
    for part in (pipe.transformer, pipe.vae):  # as enable_sequential_cpu_offload does
        cpu_offload(part, execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).is_meta
    torch.testing.assert_close(run(pipe, text, noise, guidance=5.0), expected)
