"""The documentation is true: its code runs, its commands parse, its tables agree with the code.

Every python block of a page is run, in order and in one namespace, and so are the hidden lines in
comments `<!-- docs-test ... -->` that set up or check what the page talks about. Weights of random
tiny models stand in for those that a page would download; all else is what the page says.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from torch import Tensor

import check_data
import evaluate
import moe_lora
import remove
from options.parsing import parse_options
from options.train_options import LossOptions, MixtureOptions, ModelOptions, RunOptions

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "flux_removal"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
API_PAGES = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
HUB_ID = "black-forest-labs/FLUX.1-Fill-dev"

CODE = re.compile(r"^(?:```python|<!-- docs-test)\n(.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(page: Path) -> str:
    """Return the code of a page, every line at its own line number."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for match in CODE.finditer(text):
        start = text.count("\n", 0, match.start(1))
        code = match[1].splitlines()
        lines[start : start + len(code)] = code
    return "\n".join(lines)


def commands_of(page: Path) -> list[list[str]]:
    """Return the words of every command in a page's bash blocks."""
    blocks = COMMANDS.findall(page.read_text(encoding="utf-8"))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
    )
    transformer = FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    folder = tmp_path_factory.mktemp("tiny_flux_fill")
    FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        **dict.fromkeys(TEXT_PARTS),
    ).save_pretrained(folder)
    return folder


def training_batches(
    count: int = 1, dtype: torch.dtype = torch.bfloat16, size: tuple[int, int] = (32, 48)
) -> list[dict[str, Any]]:
    """Return what a Flux Fill loop has at hand, at random: two samples of 32x48 pixels."""
    (height, width), batches = size, []
    rows, columns = height // 16, width // 16
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    for _ in range(count):
        mask = torch.zeros(2, 1, height, width)
        mask[0, :, 4:20, 8:40] = 1
        mask[1, :, 8:12, 8:12] = 1
        cells = mask.view(2, rows, 2, 8, columns, 2, 8).permute(0, 1, 4, 3, 6, 2, 5)
        batch: dict[str, Any] = {
            "latents": torch.randn(2, rows * columns, 64, dtype=dtype),
            "masked_latents": torch.randn(2, rows * columns, 64, dtype=dtype),
            "packed_mask": cells.reshape(2, rows * columns, 256).to(dtype),
            "mask": mask,
            "src": torch.rand(2, 3, height, width),
            "result": torch.rand(2, 3, height, width),
            "conditioning": {
                "encoder_hidden_states": torch.randn(2, 3, 16, dtype=dtype),
                "pooled_projections": torch.randn(2, 16, dtype=dtype),
                "img_ids": ids.view(-1, 3),
                "txt_ids": torch.zeros(3, 3),
            },
        }
        batches.append(batch)
    return batches


def pictures() -> tuple[Image.Image, Image.Image]:
    """Return a picture and a mask, 48x32 pixels."""
    mask = Image.new("L", (48, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    return Image.new("RGB", (48, 32), (90, 120, 30)), mask


@pytest.fixture
def _at_hand(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for cls in (FluxFillPipeline, FluxTransformer2DModel, AutoencoderKL):
        load = cls.from_pretrained

        def from_pretrained(name: Any, *args: Any, load: Any = load, **kwargs: Any) -> Any:
            if name != HUB_ID:
                return load(name, *args, **kwargs)
            if load.__self__ is FluxFillPipeline:
                kwargs |= dict.fromkeys(TEXT_PARTS)
            return load(tiny_pipeline, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)


@pytest.mark.usefixtures("_at_hand")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page_runs(page: Path) -> None:
    if "torchao" in code_of(page):
        pytest.importorskip("torchao")
    namespace = {
        "__name__": name_of(page),
        "training_batches": training_batches,
        "pictures": pictures,
    }
    exec(compile(code_of(page), str(page), "exec"), namespace)


def test_code_keeps_its_line_numbers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n\n<!-- docs-test\nb = 2\n-->\n\n```text\nc\n```\n"
    )
    assert code_of(page).splitlines()[3] == "a = 1"
    assert code_of(page).splitlines()[7] == "b = 2"
    assert "c" not in code_of(page)


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def script_commands() -> Iterator[Any]:
    for page in PAGES:
        for words in commands_of(page):
            scripts = [word for word in words if word.endswith((".py", "train_moe.sh"))]
            if scripts:
                start = words.index(scripts[0])
                yield pytest.param(
                    scripts[0], words[start + 1 :], id=f"{page.stem}: {' '.join(words)}"
                )


def given_to_accelerate(command: list[str], folder: Path) -> list[str]:
    """Run a command as the page prints it, and return what it gives to `accelerate launch`."""
    recorder = folder / "accelerate"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/given\n')
    recorder.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(command, env=os.environ | {"PATH": path}, check=True)
    given = (folder / "given").read_text().splitlines()
    assert given[:2] == ["launch", "train.py"]
    return given[2:]


@pytest.mark.parametrize(("script", "arguments"), list(script_commands()))
def test_commands_are_understood(
    script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = (EXAMPLE / script).read_text(encoding="utf-8")
    monkeypatch.chdir(EXAMPLE)
    if script == "train_moe.sh":
        arguments = given_to_accelerate(["bash", script, *arguments], tmp_path)
    if script in ("train.py", "train_moe.sh"):
        options = parse_options(arguments)
        assert isinstance(options.train_data_dir, str)
    elif script == "remove.py":
        remove.build_parser().parse_args(arguments)
    elif script == "check_data.py":
        check_data.parse(arguments)
    elif script == "evaluate.py":
        evaluate.parse(arguments)
    else:
        assert {flag for flag in flags_in(arguments) if f'"{flag}"' not in source} == set()


TABLE_ROW = re.compile(r"^\| `--(\w+)` \| (.*?) \|", re.MULTILINE)


def told(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "none"
    return f"`{value}`"


def test_the_table_of_flags_is_that_of_the_options() -> None:
    page = ROOT / "docs" / "tutorials" / "remove_objects_from_photographs.md"
    listed = dict(TABLE_ROW.findall(page.read_text(encoding="utf-8")))
    expected = {}
    for group in (ModelOptions, MixtureOptions, LossOptions, RunOptions):
        for field in dataclasses.fields(group):
            expected[field.name] = told(field.default)
    expected["flux_fill_id"] = "the bundled model"
    expected["train_data_dir"] = "required"
    expected["target_modules"] = "attention and feed-forward"
    assert listed == expected


def public_names(module: ModuleType) -> list[str]:
    names = [name for name in getattr(module, "__all__", ()) if not name.startswith("_")]
    return [name for name in names if callable(getattr(module, name)) and documented(module, name)]


def documented(module: ModuleType, name: str) -> bool:
    value = getattr(module, name)
    return inspect.isclass(value) or inspect.isfunction(value)


@pytest.mark.parametrize("module", ["routing", "losses", "masks"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in API_PAGES)
    listed = set(re.findall(r"auto(?:class|function):: (?:[\w.]+\.)?(\w+)", text))
    whole = re.findall(r"automodule:: (\S+)\n   :members:", text)
    for found in whole:
        listed |= set(public_names(getattr(moe_lora, found.rpartition(".")[2])))
    assert set(public_names(getattr(moe_lora, module))) - listed == set()
    assert set(public_names(moe_lora)) - listed == set()


LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)#:]+)(?:#[\w-]+)?\)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_random_batches_carry_their_mask() -> None:
    batch = training_batches()[0]
    tokens = torch.cat([batch["latents"], batch["masked_latents"], batch["packed_mask"]], dim=-1)
    found: Tensor = moe_lora.masks.from_flux_fill(tokens, 32, 48)
    assert torch.equal(found.float(), batch["mask"])
