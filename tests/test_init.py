from __future__ import annotations

import subprocess
import sys

import moe_lora


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_importing_registers_the_method_and_never_imports_diffusers():
    code = (
        "import sys, moe_lora, peft.mapping as m;"
        "print('MOE_LORA' in m.PEFT_TYPE_TO_TUNER_MAPPING, 'diffusers' in sys.modules)"
    )
    assert run(code) == "True False"


def test_the_public_names_exist():
    for name in moe_lora.__all__:
        assert hasattr(moe_lora, name), name
    assert moe_lora.__version__ == "0.1.0"
