from __future__ import annotations

import pytest
import torch

from moe_lora.export.formats.flux_names import (
    flux_name,
    flux_paths,
    fuse_flux,
    split_flux,
)
from moe_lora.export.lora_factors import Factors


def factors(out, rank, width=5):
    return Factors(torch.randn(rank, width), torch.randn(out, rank))


def test_names_and_paths_are_inverse(make_flux):
    adaptable = [name for name, m in make_flux().named_modules() if isinstance(m, torch.nn.Linear)]
    blocks = [path for path in adaptable if "blocks." in path]
    assert len(blocks) == 20
    for path in blocks:
        name, part, count = flux_name(path)
        assert flux_paths(name)[part] == path
        assert len(flux_paths(name)) == count
    assert all(flux_name(path) is None for path in adaptable if path not in blocks)


@pytest.mark.parametrize("name", ["double_blocks_0_img_attn_qqq", "down_blocks_0", "x_embedder"])
def test_foreign_names_stand_for_nothing(name):
    assert flux_paths(name) == ()


@pytest.mark.parametrize("present", [("q", "k", "v"), ("q", "v"), ("k",)])
@pytest.mark.parametrize("text", [False, True])
def test_fused_projections_are_block_diagonal(present, text):
    part = "attn.add_{}_proj" if text else "attn.to_{}"
    lora = {
        f"transformer_blocks.3.{part.format(x)}": factors(4, rank)
        for rank, x in enumerate(present, start=1)
    }
    fused, dropped = fuse_flux(lora)
    assert dropped == []
    name = f"double_blocks_3_{'txt' if text else 'img'}_attn_qkv"
    assert list(fused) == [name]
    delta = fused[name].delta()
    assert delta.shape == (12, 5)
    for i, x in enumerate("qkv"):
        path = f"transformer_blocks.3.{part.format(x)}"
        expected = lora[path].delta() if path in lora else torch.zeros(4, 5)
        torch.testing.assert_close(delta[4 * i : 4 * i + 4], expected)
    assert fused[name].rank == sum(f.rank for f in lora.values())


@pytest.mark.parametrize("present", [("attn.to_q", "proj_mlp"), ("proj_mlp",), ("attn.to_v",)])
def test_the_single_blocks_put_the_mlp_below(present):
    lora = {
        f"single_transformer_blocks.0.{x}": factors(16 if x == "proj_mlp" else 4, 2)
        for x in present
    }
    delta = fuse_flux(lora)[0]["single_blocks_0_linear1"].delta()
    assert delta.shape == (28, 5)
    for x, rows in {
        "attn.to_q": slice(0, 4),
        "attn.to_k": slice(4, 8),
        "attn.to_v": slice(8, 12),
        "proj_mlp": slice(12, 28),
    }.items():
        path = f"single_transformer_blocks.0.{x}"
        expected = lora[path].delta() if path in lora else torch.zeros_like(delta[rows])
        torch.testing.assert_close(delta[rows], expected)


def test_splitting_undoes_fusing():
    lora = {
        "single_transformer_blocks.0.attn.to_q": factors(4, 3),
        "single_transformer_blocks.0.attn.to_v": factors(4, 1),
        "single_transformer_blocks.0.proj_mlp": factors(16, 2),
        "single_transformer_blocks.0.norm.linear": factors(12, 2),
    }
    widths = {path: f.up.shape[0] for path, f in lora.items()}
    widths["single_transformer_blocks.0.attn.to_k"] = 4
    fused, _ = fuse_flux(lora)
    again = {}
    for name, held in fused.items():
        again |= split_flux(name, held, widths)
    assert again.keys() == lora.keys()
    for path, held in lora.items():
        assert torch.equal(again[path].down, held.down)
        assert torch.equal(again[path].up, held.up)


def test_a_dense_fused_lora_is_shared_by_its_parts():
    held = factors(12, 2)
    paths = flux_paths("double_blocks_0_img_attn_qkv")
    split = split_flux("double_blocks_0_img_attn_qkv", held, dict.fromkeys(paths, 4))
    torch.testing.assert_close(torch.cat([split[p].delta() for p in paths]), held.delta())
    with pytest.raises(ValueError, match="to have 15 outputs"):
        split_flux("double_blocks_0_img_attn_qkv", held, dict.fromkeys(paths, 5))


def test_the_last_modulation_swaps_shift_and_scale():
    held = Factors(torch.ones(1, 5), torch.arange(6.0)[:, None])
    split = split_flux("final_layer_adaLN_modulation_1", held, {})
    assert split["norm_out.linear"].up.flatten().tolist() == [3, 4, 5, 0, 1, 2]
