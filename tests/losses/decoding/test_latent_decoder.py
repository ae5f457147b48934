from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny
from tiny_models import two_block_vae
from torch import Tensor, nn

from moe_lora.losses import LatentDecoder, RemovalLoss


def latents(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shift_factor", [0.12, None])
def test_images_are_those_of_the_vae_in_zero_to_one(shift_factor: float | None) -> None:
    vae = two_block_vae(shift_factor=shift_factor)
    z = latents(2, 4, 4, 6)
    with torch.no_grad():
        expected = (vae.decode(z / 0.36 + (shift_factor or 0.0)).sample + 1) / 2
    images = LatentDecoder(vae)(z)
    assert images.shape == (2, 3, 8, 12)
    torch.testing.assert_close(images, expected)


def test_gradient_reaches_the_latents_and_not_the_frozen_vae() -> None:
    vae = two_block_vae().train()
    z = latents(2, 4, 4, 6).requires_grad_()
    LatentDecoder(vae)(z).square().mean().backward()
    assert bool((z.grad != 0).any(dim=(1, 2, 3)).all())
    assert not vae.training
    assert all(not p.requires_grad and p.grad is None for p in vae.parameters())


def test_gradcheck() -> None:
    decoder = LatentDecoder(two_block_vae(), dtype=torch.float64)
    z = latents(1, 4, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(decoder, z)


def test_overshoot_keeps_its_gradient() -> None:
    vae = nn.Module()
    vae.config = SimpleNamespace(scaling_factor=1.0)
    vae.decode = lambda z: z
    z = torch.full((1, 3, 2, 2), 5.0, requires_grad=True)
    images = LatentDecoder(vae)(z)
    images.sum().backward()
    assert torch.equal(images, torch.full_like(images, 3.0))
    assert torch.equal(z.grad, torch.full_like(z, 0.5))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: SimpleNamespace(sample=x)])
def test_every_kind_of_decode_output_is_read(wrap: object) -> None:
    vae = nn.Module()
    vae.config = SimpleNamespace(scaling_factor=2.0, shift_factor=1.0)
    vae.decode = lambda z: wrap(z)
    assert LatentDecoder(vae)(torch.full((1, 3, 1, 1), 4.0)).unique().tolist() == [2.0]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_bfloat16_vae_decodes_in_float32_and_stays_as_it_is(checkpoint: bool) -> None:
    vae = two_block_vae().bfloat16()
    wide = LatentDecoder(copy.deepcopy(vae).float())
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    z, z_wide = (latents(2, 4, 4, 6).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = LatentDecoder(vae, checkpoint=checkpoint)(z)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, wide(z_wide))
    images.square().sum().backward()
    wide(z_wide).square().sum().backward()
    torch.testing.assert_close(z.grad, z_wide.grad)
    for name, tensor in vae.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


def test_without_a_dtype_the_vae_decodes_in_its_own() -> None:
    images = LatentDecoder(two_block_vae().bfloat16(), dtype=None)(latents(1, 4, 4, 4))
    assert images.dtype == torch.bfloat16
    assert bool(images.isfinite().all())


def gradient(decoder: LatentDecoder, z: Tensor) -> tuple[Tensor, Tensor, int]:
    z = z.clone().requires_grad_()
    held = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal held
        held += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        images = decoder(z)
    images.square().sum().backward()
    return images, z.grad, held


def test_checkpointing_changes_memory_and_nothing_else() -> None:
    vae = two_block_vae()
    z = latents(3, 4, 4, 6)
    images, grad, held = gradient(LatentDecoder(vae), z)
    images_again, grad_again, held_again = gradient(LatentDecoder(vae, checkpoint=True), z)
    torch.testing.assert_close(images_again, images)
    torch.testing.assert_close(grad_again, grad)
    assert held_again < 0.1 * held


def test_checkpointing_computes_one_sample_at_a_time() -> None:
    vae = two_block_vae()
    sizes: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    LatentDecoder(vae, checkpoint=True)(latents(3, 4, 4, 4).requires_grad_()).sum().backward()
    assert sizes == [1] * 6


def test_the_vaes_own_checkpointing_works_where_nothing_is_converted() -> None:
    vae = two_block_vae()
    z = latents(2, 4, 4, 6)
    _, grad, _ = gradient(LatentDecoder(vae), z)
    vae.enable_gradient_checkpointing()
    _, grad_own, _ = gradient(LatentDecoder(vae), z)
    torch.testing.assert_close(grad_own, grad)
    _, grad_both, _ = gradient(LatentDecoder(vae, checkpoint=True), z)
    torch.testing.assert_close(grad_both, grad)


def test_the_vaes_own_checkpointing_with_conversion_is_refused() -> None:
    vae = two_block_vae().bfloat16()
    vae.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing of the VAE to be disabled"):
        LatentDecoder(vae)(latents(1, 4, 4, 4))


def test_the_vae_is_in_nobodys_state() -> None:
    loss = RemovalLoss(decoder=LatentDecoder(two_block_vae()))
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(2, 1),
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_autoencoder_tiny_decodes_as_by_itself(dtype: torch.dtype) -> None:
    vae = tiny_autoencoder().to(dtype)
    z = latents(2, 4, 4, 6).requires_grad_()
    images = LatentDecoder(vae)(z)
    with torch.no_grad():
        expected = (copy.deepcopy(vae).float().decode(z / 0.5 + 0.1).sample + 1) / 2
    torch.testing.assert_close(images, expected)
    images.square().mean().backward()
    assert bool((z.grad != 0).any(dim=(1, 2, 3)).all())
    assert all(not p.requires_grad and p.dtype == dtype for p in vae.parameters())


def test_gradcheck_of_an_autoencoder_tiny() -> None:
    decoder = LatentDecoder(tiny_autoencoder(), dtype=torch.float64)
    z = latents(1, 4, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(decoder, z)


@pytest.mark.parametrize("own", [False, True])
def test_checkpointing_an_autoencoder_tiny_changes_no_gradient(own: bool) -> None:
    vae = tiny_autoencoder()
    z = latents(3, 4, 4, 6)
    images, grad, held = gradient(LatentDecoder(vae), z)
    if own:
        vae.enable_gradient_checkpointing()
    images_again, grad_again, held_again = gradient(LatentDecoder(vae, checkpoint=not own), z)
    torch.testing.assert_close(images_again, images)
    torch.testing.assert_close(grad_again, grad)
    assert held_again < 0.1 * held


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SimpleNamespace(), "scaling_factor"),
        (SimpleNamespace(scaling_factor=None), "scaling_factor"),
        (SimpleNamespace(scaling_factor=1.0, latents_mean=[0.0]), "latents_mean"),
    ],
)
def test_a_vae_with_another_normalization_is_refused(config: SimpleNamespace, message: str) -> None:
    vae = nn.Module()
    vae.config = config
    with pytest.raises(ValueError, match=message):
        LatentDecoder(vae)


def test_packed_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(B, C, h, w\), but got \(1, 4, 16\)"):
        LatentDecoder(two_block_vae())(torch.zeros(1, 4, 16))
