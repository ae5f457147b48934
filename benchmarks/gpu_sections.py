"""What `gpu.py` runs: commands, each in a process of its own, and what they need."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from flux_variants import SIZES, build

ROOT = Path(__file__).parents[1]
GIB = 2**30

WORKING_SPACE = 12 * GIB
"""Left free beside the base model: variants' adapters, optimizer states, activations."""


@dataclass(frozen=True)
class Section:
    """Describe one part of the report.

    Args:
        name: of the part, and of its files.
        title: its heading.
        command: run in the repository's root; writes its figures to `figures`, if that is named.
        minutes: after which it is stopped.
        figures: the JSON file that the command writes.
    """

    name: str
    title: str
    command: tuple[str, ...]
    minutes: float
    figures: Path | None = None


def parameter_count(name: str) -> int:
    """Count the weights of a size of `flux_variants`, without memory for them."""
    model: FluxTransformer2DModel = build(SIZES[name], "meta", torch.bfloat16)
    return sum(parameter.numel() for parameter in model.parameters())


def largest_size(free: int) -> str:
    """Return the largest of the Flux-shaped sizes whose bfloat16 weights leave working space.

    Args:
        free: bytes on the device.
    """
    sizes = ("flux", "flux-half", "flux-quarter")
    fitting = (name for name in sizes if 2 * parameter_count(name) + WORKING_SPACE <= free)
    return next(fitting, "middle")


def sections(output: Path, device: str, *, small: bool) -> list[Section]:
    """List the parts in the order of their worth.

    Args:
        output: where figures go.
        device: cuda or cpu.
        small: whether all is to be tiny, to test the commands themselves.
    """
    size = "tiny" if small else largest_size(torch.cuda.mem_get_info(torch.device(device))[0])
    return [
        tests(),
        *layers(output, device, small=small),
        *whole_model(output, device, size, small=small),
        base_precisions(output, device, size, small=small),
        compiled_model(output, device, small=small),
        pixel_losses(output, device, small=small),
        bundled_model(output, small=small),
    ]


def benchmark(
    output: Path, name: str, title: str, script: str, *options: str, minutes: float
) -> Section:
    """Return the section of a script of this folder."""
    figures = output / f"{name}.json"
    command = (sys.executable, f"benchmarks/{script}", *options, "--json", str(figures))
    return Section(name, title, command, minutes, figures)


def tests() -> Section:
    """Return the section of the tests that need CUDA; on other machines they skip themselves."""
    command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests")
    return Section("tests", "Tests on CUDA", command, 4)


def layers(output: Path, device: str, *, small: bool) -> list[Section]:
    """Return the sections of one layer at the width and the token counts of FLUX.1."""
    options = ["--device", device, "--dtype", "bf16", "--batch", "1"]
    width, rank, rounds = ("64", "16", "2") if small else ("3072", "192", "31")
    options += ["--width", width, "--rank", rank, "--rounds", rounds]
    made = []
    for tokens in ("16",) if small else ("1024", "4608"):
        for experts in ("bf16", "fp32"):
            name = f"layer-{tokens}-{experts}"
            title = f"One layer, {width} wide, {tokens} tokens, bf16, experts in {experts}"
            flags = [*options, "--tokens", tokens, "--expert-dtype", experts]
            made.append(benchmark(output, name, title, "layer.py", *flags, minutes=2))
    return made


def whole_model(output: Path, device: str, size: str, *, small: bool) -> list[Section]:
    """Return the sections of a training step and of a denoising step."""
    options = ["--device", device, "--dtype", "bf16", "--size", size]
    options += ["--rounds", "1", "--warmup", "1"] if small else ["--rounds", "5", "--warmup", "2"]
    # A merged variant would copy the base model.
    options += ["--variants", "bare", "PEFT LoRA", "ours uniform", "ours soft", "ours top-1"]
    training = ["--modes", "checkpointing", "--steps", "training"]
    denoising = ["--modes", "plain", "--steps", "denoising"]
    title = f"A {{}} step of a whole model ({size})"
    return [
        benchmark(output, name, title.format(name), "model.py", *options, *steps, minutes=4)
        for name, steps in (("training", training), ("denoising", denoising))
    ]


def base_precisions(output: Path, device: str, size: str, *, small: bool) -> Section:
    """Return the section of quantized base models and of the plan of memory."""
    options = ["--device", device, "--size", size, "--rounds", "1" if small else "3"]
    available = ["bf16"]
    available += ["int8"] if importlib.util.find_spec("torchao") else []
    available += ["nf4"] if importlib.util.find_spec("bitsandbytes") else []
    options += ["--precisions", *available]
    title = f"Base models in {', '.join(available)}, and the planned memory ({size})"
    return benchmark(output, "precisions", title, "base_precisions.py", *options, minutes=5)


def compiled_model(output: Path, device: str, *, small: bool) -> Section:
    """Return the section of `torch.compile`, block by block."""
    options = ["--device", device, "--dtype", "bf16", "--rounds", "1" if small else "9"]
    if small:
        options += ["--size", "tiny", "--modes", "compiled", "--steps", "denoising"]
        options += ["--warmup", "1", "--variants", "bare", "ours soft"]
    else:
        options += ["--size", "middle", "--modes", "compiled", "compiled checkpointing"]
        options += ["--variants", "bare", "PEFT LoRA", "ours uniform", "ours soft", "ours top-1"]
    return benchmark(output, "compiled", "Compiled blocks", "model.py", *options, minutes=5)


def pixel_losses(output: Path, device: str, *, small: bool) -> Section:
    """Return the section of pixel losses through an autoencoder of FLUX's shape."""
    options = ["--device", device, "--tables", "windows"]
    if small:
        options += ["--vae_width", "4", "--pixel_side", "128", "--pixel_rounds", "1"]
        options += ["--margins", "1"]
    else:
        options += ["--vae_width", "128", "--pixel_side", "1024", "--pixel_rounds", "5"]
        options += ["--dtype", "bf16"]
    title = "Pixel losses through an autoencoder of FLUX's shape"
    return benchmark(output, "pixels", title, "masks_and_losses.py", *options, minutes=3)


def bundled_model(output: Path, *, small: bool) -> Section:
    """Return the section of the demonstration, with more steps than a CPU has time for."""
    folder = output / "bundled"
    options = ["--quick"] if small else ["--config", "benchmarks/gpu_training.yaml"]
    command = (sys.executable, "examples/demo/demo.py", "--output_dir", str(folder), *options)
    title = "Longer training of the bundled model"
    return Section("bundled", title, command, 6, folder / "metrics.json")
