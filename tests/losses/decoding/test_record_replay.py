"""Decoding in windows, beside decoding everything."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor
from skimage import data
from tiny_models import two_block_vae
from torch import Tensor, nn

from moe_lora.losses import LatentDecoder, boundary_loss, consistency_loss, detail_loss
from moe_lora.losses.decoding.windows import Window

TRAINED = Path(__file__).parents[3] / "examples" / "tiny_flux_fill" / "model" / "vae"
WINDOW = Window(1, 2, 5, 6)
WINDOWS = [WINDOW, Window(0, 0, 4, 3), Window(5, 6, 10, 8), Window(4, 4, 5, 5)]


def taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(2, 1),
        latent_channels=4,
        scaling_factor=0.36,
    )


def latents(batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 4, 8, 10, generator=torch.Generator().manual_seed(0)).to(dtype)


def held(decode: object, z: Tensor) -> int:
    """Count what a decoding saves for the backward pass, every storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = decode(z.clone().requires_grad_())
    del images
    return sum(sizes.values())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "vae",
    [two_block_vae(), two_block_vae(mid_block_add_attention=False), taesd()],
    ids=["kl", "plain", "tiny"],
)
def test_values_are_those_of_the_whole_image(vae: nn.Module, window: Window) -> None:
    decoder = LatentDecoder(vae, dtype=torch.float64)
    z = latents(dtype=torch.float64)
    for context in (0, 1, 3):
        images = decoder.in_windows(z.requires_grad_(), [window], context=context)
        torch.testing.assert_close(images, decoder(z), rtol=0, atol=1e-6)
        (gradient,) = torch.autograd.grad(images.square().sum(), z)
        around = window.enlarged(context, (8, 10))
        assert bool((around.of(gradient) != 0).all())
        around.of(gradient).zero_()
        assert bool((gradient == 0).all())


def test_only_pixels_of_the_window_give_gradients() -> None:
    z = latents().requires_grad_()
    images = LatentDecoder(two_block_vae()).in_windows(z, [WINDOW], context=2)
    outside = torch.ones_like(images)
    WINDOW.times(2).of(outside).zero_()
    (gradient,) = torch.autograd.grad((images * outside).sum(), z, retain_graph=True)
    assert bool((gradient == 0).all())
    (gradient,) = torch.autograd.grad((images * (1 - outside)).sum(), z)
    assert bool((WINDOW.enlarged(2, (8, 10)).of(gradient) != 0).all())


def test_the_surroundings_count() -> None:
    """The window alone is another picture, so that the values above are no accident."""
    z = latents()
    for vae in (two_block_vae(), taesd()):
        decoder = LatentDecoder(vae)
        whole = decoder(z)
        alone = decoder(WINDOW.of(z))
        scale = whole.shape[2] // 8
        assert (alone - WINDOW.times(scale).of(whole)).abs().max() > 0.01


def test_each_sample_has_its_window() -> None:
    decoder = LatentDecoder(two_block_vae())
    z = latents(3)
    places = [WINDOW, Window(0, 0, 0, 0), Window(0, 0, 10, 8)]
    together = z.clone().requires_grad_()
    images = decoder.in_windows(together, places)
    images.square().sum().backward()
    for index, place in enumerate(places):
        alone = z[index : index + 1].clone().requires_grad_()
        image = decoder.in_windows(alone, [place])
        image.square().sum().backward()
        torch.testing.assert_close(images[index : index + 1], image)
        torch.testing.assert_close(together.grad[index : index + 1], alone.grad)
    assert bool((together.grad[1] == 0).all())
    whole = z[2:].clone().requires_grad_()
    decoder(whole).square().sum().backward()
    torch.testing.assert_close(together.grad[2:], whole.grad)


def test_gradcheck_of_what_has_no_outside_paths() -> None:
    """One layer of each kind, where all that is dropped is dropped by the window's own sums."""
    torch.manual_seed(0)
    vae = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1)).double()
    vae.config, vae.decode = SimpleNamespace(scaling_factor=1.0), vae.forward
    decoder = LatentDecoder(vae, dtype=torch.float64)
    z = latents(dtype=torch.float64)

    def picture(inside: Tensor) -> Tensor:
        filled = z.clone()
        WINDOW.of(filled).copy_(inside)
        return WINDOW.of(decoder.in_windows(filled, [WINDOW], context=0))

    assert torch.autograd.gradcheck(picture, WINDOW.of(z).clone().requires_grad_())


class Attending(nn.Module):
    """A decoder of attention over all positions between convolutions that see one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.to_qkv, self.to_out = nn.Conv2d(4, 12, 1), nn.Conv2d(4, 3, 1)

    def decode(self, z: Tensor) -> Tensor:
        query, key, value = self.to_qkv(3 * z).flatten(2).transpose(1, 2).chunk(3, dim=2)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(found.transpose(1, 2).unflatten(2, z.shape[2:]))


def test_attention_gives_gradients_to_keys_and_values_of_the_window() -> None:
    torch.manual_seed(0)
    decoder = LatentDecoder(Attending(), dtype=torch.float64)
    z, found = latents(dtype=torch.float64).requires_grad_(), []
    for images in (decoder(z), decoder.in_windows(z, [WINDOW], context=0)):
        (gradient,) = torch.autograd.grad(WINDOW.of(images).square().sum(), z)
        found.append(WINDOW.of(gradient))
    torch.testing.assert_close(found[1], found[0])


def trained_vae() -> tuple[AutoencoderKL, Tensor, Tensor]:
    """A trained VAE with an attention in the middle, latents of a photograph, and the photograph.

    In a random decoder statistics are most of the gradient, so that it says little of real ones.
    """
    trained = AutoencoderKL.from_pretrained(TRAINED)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config({**trained.config, "mid_block_add_attention": True})
    vae.load_state_dict(trained.state_dict(), strict=False)
    attention = vae.decoder.mid_block.attentions[0]
    with torch.no_grad():
        attention.to_out[0].weight.mul_(8)
    picture = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None] / 255
    picture = F.interpolate(picture[..., :384, :384], (128, 128), mode="area")
    config = trained.config
    with torch.no_grad():
        mean = trained.encode(2 * picture - 1).latent_dist.mean
    z = (mean - config.shift_factor) * config.scaling_factor
    return vae, z + 0.2 * torch.randn_like(z), picture


def test_the_gradient_is_near_that_of_the_whole_image() -> None:
    vae, z, picture = trained_vae()
    decoder = LatentDecoder(vae)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 32:96, 32:96] = 1
    window = Window(2, 2, 14, 14)  # two latents around the mask
    weight = vae.decoder.mid_block.attentions[0].to_out[0].weight
    with torch.no_grad():
        kept, images = weight.clone(), decoder(z)
        weight.zero_()
        assert (decoder(z) - images).abs().max() > 0.1
        weight.copy_(kept)
    for loss in (boundary_loss, detail_loss, consistency_loss):
        whole, part = z.clone().requires_grad_(), z.clone().requires_grad_()
        still = images.clone()
        if loss is consistency_loss:
            # Half of it lies outside the window, from where no gradient comes by definition.
            window.times(8).of(still).copy_(window.times(8).of(decoder(whole)))
        else:
            still = decoder(whole)
        loss(still, picture, mask).backward()
        windowed = decoder.in_windows(part, [window])
        loss(windowed, picture, mask).backward()
        assert (windowed - images).abs().max() < 1e-5
        expected, found = (window.of(t.grad).flatten() for t in (whole, part))
        assert F.cosine_similarity(expected, found, dim=0) > 0.995
        assert 0.97 < found.norm() / expected.norm() < 1.03


def test_less_is_held_than_the_share_of_the_window() -> None:
    decoder = LatentDecoder(two_block_vae(mid_block_add_attention=False))
    z = torch.randn(1, 4, 32, 32)
    window = Window(4, 4, 28, 28)
    whole, part = held(decoder, z), held(lambda z: decoder.in_windows(z, [window]), z)
    assert part < 0.75 * 24**2 / 32**2 * whole


@pytest.mark.parametrize("vae", [two_block_vae(), taesd()], ids=["kl", "tiny"])
def test_checkpointing_changes_no_gradient_and_holds_less(vae: nn.Module) -> None:
    z, found = latents(2), []
    places = [WINDOW, Window(0, 0, 4, 3)]
    for checkpoint in (False, True):
        decoder = LatentDecoder(vae, checkpoint=checkpoint)
        given = z.clone().requires_grad_()
        images = decoder.in_windows(given, places)
        images.square().sum().backward()
        found.append((images.detach(), given.grad))
    torch.testing.assert_close(found[0], found[1])
    decoders = (LatentDecoder(vae, checkpoint=on) for on in (False, True))
    plain, checkpointed = (
        held(lambda z, decoder=decoder: decoder.in_windows(z, places), z) for decoder in decoders
    )
    assert checkpointed < 0.2 * plain


@pytest.mark.parametrize("vae", [two_block_vae(), taesd()], ids=["kl", "tiny"])
def test_a_bfloat16_vae_decodes_windows_in_float32(vae: nn.Module) -> None:
    narrow = copy.deepcopy(vae).bfloat16()
    wide = copy.deepcopy(narrow).float()
    found = []
    for model in (narrow, wide):
        z = latents().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = LatentDecoder(model).in_windows(z, [WINDOW])
        assert images.dtype == torch.float32
        images.square().sum().backward()
        found.append((images, z.grad))
    torch.testing.assert_close(found[0], found[1])
    assert all(parameter.dtype == torch.bfloat16 for parameter in narrow.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("vae", [two_block_vae(), taesd()], ids=["kl", "tiny"])
def test_windows_in_the_vaes_own_precision(vae: nn.Module, autocast: bool) -> None:
    own = copy.deepcopy(vae) if autocast else copy.deepcopy(vae).bfloat16()
    z = latents().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        images = LatentDecoder(own, dtype=None).in_windows(z, [WINDOW])
    images.float().square().sum().backward()
    wide = latents().requires_grad_()
    LatentDecoder(own).in_windows(wide, [WINDOW]).square().sum().backward()
    cosine = F.cosine_similarity(z.grad.flatten(), wide.grad.flatten(), dim=0)
    assert cosine > 0.98


def test_without_gradient_all_is_decoded_once() -> None:
    vae = two_block_vae()
    calls: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(1))
    decoder, z = LatentDecoder(vae), latents()
    with torch.no_grad():
        images = decoder.in_windows(z.requires_grad_(), [WINDOW])
    assert calls == [1]
    assert torch.equal(images, decoder(z))


def test_an_empty_window_is_zero_with_a_graph() -> None:
    z = latents().requires_grad_()
    images = LatentDecoder(two_block_vae()).in_windows(z, [(0, 0, 0, 0)])
    images.sum().backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


class Strange(nn.Module):
    """A decoder with a layer of another kind between two convolutions."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), between, nn.Conv2d(8, 3, 1))

    def decode(self, z: Tensor) -> Tensor:
        return self.layers(z)


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, stride=2), "stride"),
        (nn.Conv2d(8, 8, 3), "padding"),
        (nn.Conv2d(8, 8, 2, padding="same"), "kernel"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding|feature map"),
        (nn.Upsample(size=(13, 17)), "a feature map of 13x17 for latents of 8x10"),
        (nn.InstanceNorm2d(8), "layers of an unsupported kind"),
        (nn.AvgPool2d(3, 1, 1), "layers of an unsupported kind"),
        (nn.ConvTranspose2d(8, 8, 3, padding=1), "layers of an unsupported kind"),
    ],
)
def test_unsupported_layers_are_refused(between: nn.Module, message: str) -> None:
    torch.manual_seed(0)
    decoder = LatentDecoder(Strange(between))
    with pytest.raises(ValueError, match=message):
        decoder.in_windows(latents().requires_grad_(), [WINDOW])


def test_attention_without_the_torch_function_is_refused() -> None:
    vae = two_block_vae()
    attention = vae.decoder.mid_block.attentions[0]
    attention.set_processor(AttnProcessor())
    with torch.no_grad():
        attention.to_out[0].weight.mul_(100)
    with pytest.raises(ValueError, match="layers of an unsupported kind"):
        LatentDecoder(vae).in_windows(latents().requires_grad_(), [WINDOW])


@pytest.mark.parametrize("more_for_the_window", [False, True])
def test_different_layers_for_a_window_are_refused(
    more_for_the_window: bool,
) -> None:
    vae = Strange(nn.Identity())
    vae.decode = lambda z: (
        vae.layers(z) + (0 * vae.layers(z) if (z.shape[2] < 8) is more_for_the_window else 0)
    )
    with pytest.raises(ValueError, match="different layers for a window than for all latents"):
        LatentDecoder(vae).in_windows(latents().requires_grad_(), [WINDOW])


def test_tiling_and_the_vaes_own_checkpointing_are_refused() -> None:
    vae = two_block_vae()
    vae.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="to be disabled for windows"):
        LatentDecoder(vae).in_windows(latents().requires_grad_(), [WINDOW])
    vae.disable_gradient_checkpointing()
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 8
    with pytest.raises(ValueError, match="Decode without windows"):
        LatentDecoder(vae).in_windows(latents().requires_grad_(), [WINDOW])


def test_arguments_out_of_range_raise() -> None:
    decoder = LatentDecoder(two_block_vae())
    with pytest.raises(ValueError, match="Expected `context` to be an integer >= 0"):
        decoder.in_windows(latents(), [WINDOW], context=-1)
    with pytest.raises(ValueError, match="within 10 columns and 8 rows"):
        decoder.in_windows(latents(), [(0, 0, 8, 10)])


def test_packed_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(B, C, h, w\), but got \(1, 4, 16\)"):
        LatentDecoder(two_block_vae()).in_windows(torch.zeros(1, 4, 16), [WINDOW])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_windows_on_cuda(dtype: torch.dtype, checkpoint: bool) -> None:
    vae, z, _ = trained_vae()
    window = Window(2, 2, 14, 14)
    found = []
    for device in ("cpu", "cuda"):
        decoder = LatentDecoder(
            copy.deepcopy(vae).to(device, dtype if device == "cuda" else torch.float32),
            dtype=None,
            checkpoint=checkpoint,
        )
        given = z.to(device).requires_grad_()
        images = decoder.in_windows(given, [window])
        images.float().square().mean().backward()
        found.append(given.grad.cpu().flatten())
    assert F.cosine_similarity(*found, dim=0) > 0.98
