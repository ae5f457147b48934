from __future__ import annotations

import pytest

from flux_fill import base_precision
from options.parsing import parse_options
from options.train_options import TrainOptions


def parse(*words: str) -> TrainOptions:
    return parse_options(["--train_data_dir", "data", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base_precision", "bf16", "--use_lora", "false"], "`use_lora` with `base_precision`"),
        (["--offload", "--use_lora", "false"], "`use_lora` with `offload`"),
        (["--offload", "--base_precision", "nf4"], "bf16, fp8 or int8 with `offload`, but got nf4"),
        (["--offload", "--compile"], "Expected no `compile` with `offload`"),
        (["--compile", "--base_precision", "bf16"], "with `compile`, but got bf16 .* no"),
        (["--compile", "--base_precision", "int8"], "with `compile`, but got int8"),
    ],
)
def test_what_cannot_be_honored_together_raises(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_nf4_without_a_gpu_raises_except_in_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_precision, "gpu_is_available", lambda: False)
    monkeypatch.setattr(base_precision, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="Expected a GPU with `base_precision` nf4"):
        parse("--base_precision", "nf4")
    assert parse("--base_precision", "nf4", "--plan").base_precision == "nf4"
    monkeypatch.setattr(base_precision, "gpu_is_available", lambda: True)
    assert parse("--base_precision", "nf4").base_precision == "nf4"


@pytest.mark.parametrize(
    ("precision", "package"), [("int8", "torchao"), ("fp8", "torchao"), ("nf4", "bitsandbytes")]
)
def test_a_missing_package_is_named(
    precision: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_precision, "gpu_is_available", lambda: True)
    monkeypatch.setattr(base_precision, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(ValueError, match=rf"package {package} .*moe-lora\[quantized\]"):
        parse("--base_precision", precision)
    assert parse("--base_precision", "bf16").base_precision == "bf16"
