"""The row of token weights in every layer of a real model, against an independent table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.layer import MoELoraConv2d

E = 3


def adapt(model, targets):
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    torch.manual_seed(2)
    model.add_adapter(
        MoELoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=targets)
    )
    return model


def weights_for(*shape):
    return torch.randn(*shape, E).mul(2).softmax(-1)


def used_weights(model, call, weights):
    """Solve, by path, for the weight of every expert at every position of a layer's output.

    A layer's output less its base's is sum_e w_e d_e, with d_e what expert e gives alone; the w_e
    are found by least squares over the output's channels.
    """
    seen, handles = {}, []

    def hook(path):
        def keep(module, args, output):
            seen[path] = (module, args[0].detach(), output.detach())

        return keep

    for path, module in model.named_modules():
        if isinstance(module, RoutedLayer):
            handles.append(module.register_forward_hook(hook(path)))
    with torch.no_grad(), moe_lora.route(model, weights):
        model(**call)
    for handle in handles:
        handle.remove()
    found = {}
    for path, (module, x, output) in seen.items():
        experts = module.moe_lora_experts["default"]
        with torch.no_grad():
            base = module.base_layer(x)
            alone = []
            for e in range(E):
                A, B = experts.lora_A[e], experts.lora_B[:, e] * experts.scaling
                if isinstance(module, MoELoraConv2d):
                    low = module._convolve(x, A)
                    alone.append(F.conv2d(low, B[..., None, None]).movedim(1, -1))
                else:
                    alone.append(x @ A.T @ B.T)
        delta = output - base
        if isinstance(module, MoELoraConv2d):
            delta = delta.movedim(1, -1)
        basis = torch.stack(alone, -1).double()
        found[path] = torch.linalg.lstsq(basis, delta.double().unsqueeze(-1)).solution[..., 0]
    return found


def same(found, expected):
    torch.testing.assert_close(
        found, expected.double().expand_as(found), rtol=1e-3, atol=1e-3, check_dtype=False
    )


FLUX_STREAMS = {
    "x_embedder": "image",
    "context_embedder": "text",
    "transformer_blocks.0.attn.to_q": "image",
    "transformer_blocks.0.attn.to_out.0": "image",
    "transformer_blocks.0.attn.add_q_proj": "text",
    "transformer_blocks.0.attn.to_add_out": "text",
    "transformer_blocks.0.ff.net.2": "image",
    "transformer_blocks.0.ff_context.net.2": "text",
    "transformer_blocks.0.norm1.linear": "sample",
    "transformer_blocks.0.norm1_context.linear": "sample",
    "single_transformer_blocks.0.attn.to_q": "joint",
    "single_transformer_blocks.0.proj_mlp": "joint",
    "single_transformer_blocks.0.proj_out": "joint",
    "single_transformer_blocks.0.norm.linear": "sample",
    "norm_out.linear": "sample",
    "proj_out": "image",
}
"""Token streams of the layers of FLUX, read off its forward pass."""


def expected_in_flux(kind, weights, text, references=0):
    mean = weights.mean(1, keepdim=True)
    image = torch.cat([weights, mean.expand(-1, references, -1)], 1)
    return {
        "image": image,
        "text": mean,
        "sample": mean[:, 0],
        "joint": torch.cat([mean.expand(-1, text, -1), image], 1),
    }[kind]


@pytest.mark.parametrize("text", [5, 24], ids=["fewer text tokens", "as many text tokens"])
def test_every_layer_of_flux_uses_the_rows_of_its_tokens(make_flux, make_flux_inputs, text):
    model = adapt(make_flux(64), list(FLUX_STREAMS))
    call, weights = make_flux_inputs(in_channels=64, text=text), weights_for(2, 24)
    found = used_weights(model, call, weights)
    assert found.keys() == FLUX_STREAMS.keys()
    for path, kind in FLUX_STREAMS.items():
        same(found[path], expected_in_flux(kind, weights, text))


def with_references(call, count=7, rows=7):
    references = torch.zeros(count, 3)
    references[:, 0] = 1
    references[:, 1] = torch.arange(count)
    hidden = torch.cat([call["hidden_states"], torch.randn(2, count, 64)], 1)
    return {
        **call,
        "hidden_states": hidden,
        "img_ids": torch.cat([call["img_ids"], references]),
    }


@pytest.mark.parametrize("joint_only", [False, True])
def test_reference_tokens_take_the_mean(make_flux, make_flux_inputs, joint_only):
    streams = {p: k for p, k in FLUX_STREAMS.items() if not joint_only or k == "joint"}
    model = adapt(make_flux(64), list(streams))
    call = with_references(make_flux_inputs(in_channels=64))
    weights = weights_for(2, 24)
    for path, found in used_weights(model, call, weights).items():
        same(found, expected_in_flux(streams[path], weights, 5, references=7))
    whole = weights_for(2, 31)
    for path, found in used_weights(model, call, whole).items():
        same(found, expected_in_flux(streams[path], whole, 5))
    for tokens in (23, 25, 30, 32):
        with (
            moe_lora.route(model, weights_for(2, tokens)),
            pytest.raises(ValueError, match=f"24 image tokens .* 31 tokens, .* {tokens} tokens"),
        ):
            model(**call)


def level_means(plane):
    """Average `(rows, columns, E)` over the pixels that upsampling gives back to each cell."""
    rows, columns = plane.shape[:2]
    small = (-(-rows // 2), -(-columns // 2))
    cells = torch.arange(float(small[0] * small[1])).view(1, 1, *small)
    owner = F.interpolate(cells, size=(rows, columns), mode="nearest").view(rows, columns)
    means = [plane[owner == cell].mean(0) for cell in range(small[0] * small[1])]
    return torch.stack(means).view(*small, -1)


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.mark.parametrize("size", [(8, 12), (7, 10)], ids=["even", "odd"])
def test_every_layer_of_a_unet_uses_the_weights_at_its_resolution(unet, size):
    import copy

    targets = r"conv_in|conv_out|.*\.(to_q|to_k|to_out\.0|proj_in|conv1|conv|net\.2|time_emb_proj)"
    model = adapt(copy.deepcopy(unet), targets)
    rows, columns = size
    call = {
        "sample": torch.randn(2, 4, rows, columns),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, rows * columns // 4, 8),
    }
    weights = weights_for(2, rows * columns)
    found = used_weights(model, call, weights)
    plane = weights.unflatten(1, size)
    small = (-(-rows // 2), -(-columns // 2))
    seen = {"text": 0, "sample": 0, size: 0, small: 0}
    for path, used in found.items():
        if path.endswith("attn2.to_k"):
            same(used, weights.mean(1, keepdim=True))
            seen["text"] += 1
        elif used.ndim == 2:
            same(used, weights.mean(1))
            seen["sample"] += 1
        else:
            positions = used.shape[1:-1]
            level = size if positions.numel() == rows * columns else small
            means = plane if level == size else torch.stack([level_means(one) for one in plane])
            same(used, means.reshape(used.shape))
            seen[level] += 1
    assert min(seen.values()) > 3, seen
    given = torch.stack([level_means(one) for one in plane])
    by_level = given.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :rows, :columns]
    coarse, fine = (
        used_weights(model, call, weights.reshape(2, -1, E)) for weights in (given, by_level)
    )
    for path, used in coarse.items():
        same(used, fine[path])
    for bad in (rows * columns + 1, 13):
        with (
            moe_lora.route(model, weights_for(2, bad)),
            pytest.raises(ValueError, match="tokens of the layer's"),
        ):
            model(**call)


def test_a_unet_that_rounds_its_levels_down_takes_sizes_that_divide_only():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        downsample_padding=0,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    adapt(model, ["to_q"])
    for size, fits in (((5, 8), False), ((6, 9), False), ((6, 8), True)):
        call = {
            "sample": torch.randn(1, 4, *size),
            "timestep": 3,
            "encoder_hidden_states": torch.randn(1, 2, 8),
        }
        model(**call)  # which the model itself takes
        with moe_lora.route(model, weights_for(1, size[0] * size[1])):
            if fits:
                model(**call)
                continue
            with pytest.raises(ValueError, match=r"divisible by 2 .* got \d x \d"):
                model(**call)


@pytest.mark.parametrize("size", [(8, 12), (9, 12), (8, 13), (9, 13)])
def test_every_layer_of_sd3_uses_the_weights_of_its_patches(size):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    streams = {
        "pos_embed.proj": "image",
        "context_embedder": "text",
        "transformer_blocks.0.attn.to_q": "image",
        "transformer_blocks.0.attn2.to_k": "image",
        "transformer_blocks.0.attn.add_k_proj": "text",
        "transformer_blocks.0.ff.net.2": "image",
        "transformer_blocks.0.ff_context.net.2": "text",
        "transformer_blocks.0.norm1.linear": "sample",
        "proj_out": "image",
    }
    adapt(model, list(streams))
    call = {
        "hidden_states": torch.randn(2, 4, *size),
        "timestep": torch.tensor([900.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 24, 16),  # as many as the patches
        "pooled_projections": torch.randn(2, 8),
    }
    by_pixel = weights_for(2, size[0] * size[1])
    # Pixels beyond the last whole patch are dropped, by the model and by this pooling.
    planes = by_pixel.unflatten(1, size).permute(0, 3, 1, 2)
    by_patch = F.avg_pool2d(planes, 2).flatten(2).transpose(1, 2)
    for weights, patches in ((by_pixel, by_patch), (by_patch, by_patch)):
        for path, found in used_weights(model, call, weights).items():
            expected = expected_in_flux(streams[path], patches, 24)
            same(found, expected.reshape(found.shape) if found.ndim == 4 else expected)


def test_weights_of_a_picture_serve_every_frame_of_a_video():
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
        guidance_embeds=False,
    )
    targets = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"]
    adapt(model, targets)
    call = {
        "hidden_states": torch.randn(2, 4, 3, 4, 8),
        "timestep": torch.tensor([900.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "encoder_attention_mask": torch.ones(2, 5),
        "pooled_projections": torch.randn(2, 8),
    }
    by_pixel = weights_for(2, 32)
    planes = by_pixel.unflatten(1, (4, 8)).permute(0, 3, 1, 2)
    picture = F.avg_pool2d(planes, 2).flatten(2).transpose(1, 2)
    video = torch.cat([picture] * 3, 1)
    text = by_pixel.mean(1, keepdim=True).expand(-1, 5, -1)
    for weights in (by_pixel, picture, video):
        found = used_weights(model, call, weights)
        image = found["transformer_blocks.0.attn.to_q"]
        same(image, video)
        joint = found["single_transformer_blocks.0.attn.to_q"]
        same(joint, torch.cat([video, text], 1))
    model.delete_adapters("default")
    adapt(model, targets[1:])
    with moe_lora.route(model, weights_for(2, 25)), pytest.raises(ValueError, match="24 image"):
        model(**call)
