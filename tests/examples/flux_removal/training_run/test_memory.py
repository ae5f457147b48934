"""Whole runs with a quantized, offloaded or compiled transformer."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPriorReduxPipeline, FluxTransformer2DModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from safetensors.torch import load_file
from tiny_models import tiny_flux, tiny_flux_fill
from torch import Tensor, nn

import train
from flux_fill import base_precision
from flux_fill.base_precision import PACKAGES
from options.parsing import parse_options
from training_run import parts

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]


def run(flags: list[str]) -> Path:
    return train.train(parse_options(flags))


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def error(found: Path, expected: Path) -> float:
    """Return the relative difference of the gradients of two runs, as AdamW averages them."""
    a, b = tensors(found), tensors(expected)
    assert a.keys() == b.keys()
    names = [name for name in b if "/exp_avg/" in name]
    assert names
    first, second = (torch.cat([run[name].flatten() for name in names]) for run in (a, b))
    return float((first - second).norm() / second.norm())


@pytest.fixture
def nf4_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers quantize with bitsandbytes on a CPU, which it does on GPUs only."""
    quantizer = BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    monkeypatch.setattr(base_precision, "gpu_is_available", lambda: True)


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[FluxTransformer2DModel]:
    """Collect the transformers that runs build upon."""
    found: list[FluxTransformer2DModel] = []
    real = train.build_model

    def build(pipe: Any, *args: Any) -> nn.Module:
        found.append(pipe.transformer)
        return real(pipe, *args)

    monkeypatch.setattr(train, "build_model", build)
    return found


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile as far as kernels, whose generation takes minutes."""
    real = FluxTransformer2DModel.compile_repeated_blocks
    quick = functools.partialmethod(real, backend="aot_eager")
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", quick)


STORED = {
    "bf16": lambda weight: weight.dtype == torch.bfloat16,
    "fp8": lambda weight: weight.qdata.dtype == torch.float8_e4m3fn,
    "int8": lambda weight: weight.qdata.dtype == torch.int8,
    "nf4": lambda weight: weight.dtype == torch.uint8 and weight.quant_state.quant_type == "nf4",
}


@pytest.mark.usefixtures("nf4_on_cpu")
@pytest.mark.parametrize("adapter", ["moe_lora", "lora"])
@pytest.mark.parametrize(
    ("precision", "mixed_precision", "offload", "limit"),
    [
        ("bf16", "no", False, 0.05),
        ("bf16", "fp16", True, 0.05),
        ("fp8", "no", False, 0.3),
        ("fp8", "bf16", True, 0.3),
        ("int8", "fp16", False, 0.1),
        ("int8", "bf16", False, 0.1),
        ("nf4", "no", False, 0.6),
        ("nf4", "bf16", False, 0.6),
    ],
)
def test_a_run_on_a_quantized_base_trains_what_any_run_trains(
    precision: str,
    mixed_precision: str,
    offload: bool,
    limit: float,
    adapter: str,
    arguments: Arguments,
    all_losses: dict[str, Any],
    bases: list[FluxTransformer2DModel],
    tmp_path: Path,
) -> None:
    pytest.importorskip(PACKAGES.get(precision, "torch"))
    changed = {"adapter": adapter, "mixed_precision": mixed_precision, "max_train_steps": 1}
    changed |= all_losses | {"gradient_checkpointing": True}
    plain = run(arguments(**changed, output_dir=tmp_path / "plain"))
    found = run(arguments(**changed, base_precision=precision, offload=offload))
    weight = bases[-1].single_transformer_blocks[0].attn.to_q.base_layer.weight
    assert STORED[precision](weight)
    assert isinstance(weight, nn.Parameter) != offload
    assert 0 < error(found, plain) < limit


@pytest.mark.usefixtures("nf4_on_cpu", "aot_eager")
@pytest.mark.parametrize(
    "memory",
    [
        {"base_precision": "int8"},
        {"base_precision": "nf4", "mixed_precision": "bf16"},
        {"base_precision": "fp8", "offload": True},
        {"compile": True},
    ],
    ids=["int8", "nf4", "fp8 away", "compiled"],
)
def test_such_runs_are_resumed(
    memory: dict[str, Any], arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip(PACKAGES.get(memory.get("base_precision"), "torch"))
    steps = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_checkpointing": True}
    changed = all_losses | memory | steps
    whole = run(arguments(**changed, output_dir=tmp_path / "whole"))
    resumed = run(arguments(**changed, resume_from_checkpoint=whole.with_name("checkpoint-2")))
    expected = tensors(whole)
    for name, value in tensors(resumed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ["moe_lora", "lora"])
def test_offloading_changes_no_result(
    adapter: str,
    checkpointing: bool,
    arguments: Arguments,
    all_losses: dict[str, Any],
    tmp_path: Path,
) -> None:
    changed = all_losses | {"adapter": adapter, "gradient_checkpointing": checkpointing}
    plain = run(arguments(**changed, output_dir=tmp_path / "plain"))
    assert error(run(arguments(**changed, offload=True)), plain) < 1e-4


@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize(("adapter", "checkpointing"), [("moe_lora", True), ("lora", False)])
def test_compiled_blocks_train_the_same_under_the_same_names(
    adapter: str,
    checkpointing: bool,
    arguments: Arguments,
    all_losses: dict[str, Any],
    bases: list[FluxTransformer2DModel],
    tmp_path: Path,
) -> None:
    changed = all_losses | {"adapter": adapter, "gradient_checkpointing": checkpointing}
    plain = run(arguments(**changed, output_dir=tmp_path / "plain"))
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    compiled = run(arguments(**changed, compile=True))
    assert counted["stats"]["unique_graphs"] >= 2
    assert bases[-1].transformer_blocks[0]._compiled_call_impl is not None
    assert error(compiled, plain) < 1e-3


class TestOrder:
    """The transformer is loaded when nothing is left of what encodes prompts."""

    @pytest.fixture
    def events(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        events: list[str] = []
        real = parts.load_transformer

        def load(*args: Any, **kwargs: Any) -> None:
            events.append("transformer")
            real(*args, **kwargs)

        monkeypatch.setattr(parts, "load_transformer", load)
        return events

    def test_text_encoders_are_freed_before(
        self, arguments: Arguments, events: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoders: list[weakref.ref[nn.Module]] = []
        real_load, real_transformer = train.load_pipeline, FluxTransformer2DModel.from_pretrained

        def load(*args: Any, **kwargs: Any) -> Any:
            pipe = real_load(*args, **kwargs)
            assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}
            parts = {name: nn.Linear(1, 1) for name in ("text_encoder", "text_encoder_2")}
            pipe.register_modules(**parts)
            encoders.extend(weakref.ref(part) for part in parts.values())
            monkeypatch.setattr(type(pipe), "encode_prompt", encode)
            return pipe

        def encode(pipe: Any, text: str, **kwargs: Any) -> tuple[Tensor, ...]:
            assert pipe.text_encoder is encoders[0]()
            events.append("text")
            return torch.ones(1, 5, 8), torch.ones(1, 8), torch.zeros(5, 3)

        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            gc.collect()
            assert [encoder() for encoder in encoders] == [None, None]
            events.append("weights")
            return real_transformer(*args, **kwargs)

        monkeypatch.setattr(train, "load_pipeline", load)
        monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", from_pretrained)
        run(arguments(max_train_steps=1))
        assert events == ["text", "transformer", "weights"]

    @pytest.mark.parametrize("cached", [True, False])
    def test_redux_encodes_before_and_leaves_when_embeddings_are_cached(
        self,
        cached: bool,
        arguments: Arguments,
        redux: Path,
        tmp_path: Path,
        events: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        wide = tiny_flux(joint_attention_dim=4096, pooled_projection_dim=768)
        tiny_flux_fill(transformer=wide).save_pretrained(tmp_path / "wide")
        real_call, real_to = FluxPriorReduxPipeline.__call__, FluxPriorReduxPipeline.to

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            events.append("redux")
            return real_call(self, *args, **kwargs)

        def to(self: Any, place: Any) -> Any:
            events.append(f"redux to {place}")
            # The device and the CPU are one here.
            return real_to(self, place)

        monkeypatch.setattr(FluxPriorReduxPipeline, "__call__", call)
        monkeypatch.setattr(FluxPriorReduxPipeline, "to", to)
        changed = {"flux_fill_id": tmp_path / "wide", "flux_redux_id": redux, "batch_size": 1}
        run(arguments(**changed, cache_latents=cached, max_train_steps=1))
        if cached:
            assert events.count("redux") == 5
            assert events[-2:] == ["redux to cpu", "transformer"]
        else:
            assert events == ["redux to cpu", "transformer", "redux to cpu", "redux"]
