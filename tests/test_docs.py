"""The documentation is true: its code runs, its commands run, its links lead somewhere.

The blocks of a page run in order, the Python ones in one namespace, and so do the hidden lines in
comments `<!-- docs-test ... -->` that set up or check what the page talks about. Commands run as
they are printed (`doc_pages.shell`); those that download models, train for hours or need several
devices are parsed. Weights of a random tiny model stand in for those of FLUX.1 Fill.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxFillPipeline, FluxTransformer2DModel
from doc_pages.blocks import PAGES, ROOT, Block, blocks_of, commands_in, name_of
from doc_pages.shell import Shell
from doc_pages.stand_ins import HUB_ID, training_batches, write_images
from tiny_models import TEXT_PARTS, tiny_flux_fill
from torch import Tensor

import moe_lora

EXAMPLE = Path("examples") / "flux_removal"


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny_flux_fill")
    tiny_flux_fill().save_pretrained(folder)
    return folder


@pytest.fixture
def _offline(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (FluxFillPipeline, FluxTransformer2DModel, AutoencoderKL):
        load = cls.from_pretrained

        def from_pretrained(name: Any, *args: Any, load: Any = load, **kwargs: Any) -> Any:
            if name != HUB_ID:
                return load(name, *args, **kwargs)
            if load.__self__ is FluxFillPipeline:
                kwargs |= dict.fromkeys(TEXT_PARTS)
            return load(tiny_pipeline, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Return a shell in a fresh copy of the repository, which holds a user's images, too."""
    monkeypatch.chdir(tmp_path)  # and back, whatever a page does
    shell = Shell(tmp_path / "moe-lora")
    write_images(shell.folder)
    write_images(shell.folder / EXAMPLE)
    return shell


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_runs(page: Path, shell: Shell) -> None:
    blocks = blocks_of(page)
    if any("import torchao" in b.text or "from torchao" in b.text for b in blocks):
        pytest.importorskip("torchao")
    if page.parent.parent.name == "examples":
        shell.run(f"cd {page.parent.relative_to(ROOT)}")
    namespace = {"__name__": name_of(page), "training_batches": training_batches}
    for block in blocks:
        os.chdir(shell.folder)
        if block.language == "shell":
            for command in commands_in(block.text):
                shell.run(command)
            continue
        # Errors show the line of the page.
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, str(page), "exec"), namespace)


def test_blocks_are_found_with_their_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n\n<!-- docs-test\nb = 2\n-->\n\n```text\nc\n```\n\n"
        "```bash\ncd d  # e\n# f\ng \\\n  h\n```\n"
    )
    assert blocks_of(page) == [
        Block("python", 4, "a = 1\n"),
        Block("python", 8, "b = 2\n"),
        Block("shell", 16, "cd d  # e\n# f\ng \\\n  h\n"),
    ]
    assert commands_in(blocks_of(page)[2].text) == ["cd d  # e", "g    h"]


def test_a_command_runs_in_the_folder_that_the_last_one_left(shell: Shell) -> None:
    shell.run("cd examples/flux_removal")
    shell.run("python ../demo/make_data.py --output_dir data")
    assert len(list((shell.folder / "data" / "train" / "src").iterdir())) == 4
    assert shell.folder.name == "flux_removal"
    assert shell.parsed == []


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("bash examples/flux_removal/train_moe.sh nowhere", FileNotFoundError),
        ("bash examples/flux_removal/train_moe.sh --no_such_flag 1", SystemExit),
        ("python examples/flux_removal/remove.py --image photo.png", SystemExit),
        ("python nowhere.py", FileNotFoundError),
        ("python benchmarks/removal.py --no_such_flag", SystemExit),
        ("accelerate launch --no_such_flag examples/flux_removal/train.py", SystemExit),
        ("moe-lora inspect nowhere", AssertionError),
        ("moe-lora plan FLUX.1-Fill-dev --no_such_flag", SystemExit),
        ("pip install 'moe-lora[nothing]'", AssertionError),
        ("pip install moe_lora", AssertionError),
        ("tensorboard --logdir nowhere", AssertionError),
        ("make nothing", subprocess.CalledProcessError),
        ("grep nothing Makefile | cat", subprocess.CalledProcessError),
        ("cd nowhere", subprocess.CalledProcessError),
    ],
)
def test_a_command_that_fails_is_noticed(shell: Shell, command: str, error: type) -> None:
    with pytest.raises(error):
        shell.run(command)


def test_commands_for_many_devices_or_the_hub_are_parsed(shell: Shell) -> None:
    shell.run("cd examples/flux_removal")
    shell.run("accelerate launch --num_processes 2 train.py --train_data_dir data --seed 1")
    shell.run(f"FLUX_FILL_ID={HUB_ID} bash train_moe.sh data")
    assert shell.parsed[0] == ["train.py", "--train_data_dir", "data", "--seed", "1"]
    assert HUB_ID in shell.parsed[1]
    with pytest.raises(SystemExit):
        shell.run(f"python train.py --flux_fill_id {HUB_ID} --train_data_dir data --no_such_flag")


LINK = re.compile(r"\[[^\]]*\]\(([^)#:\s]*)(?:#([\w-]+))?\)")
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
EVERY_PAGE = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"_build", "outputs", "node_modules"} & {*path.parts}
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MyST make them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


def dead_links(page: Path) -> list[str]:
    """Return the links to files or headings that do not exist."""
    found = []
    for path, anchor in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        target = page.parent / path if path else page
        missing = not target.exists()
        if missing or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(f"{path}#{anchor}")
    return found


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Some `code`, and more\n\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n[a](other.md#some-code-and-more) [b](#title) [c](other.md#no-heading) [d](no.md)"
        " ![e](no.png) [f](https://example.org/x#y)\n"
    )
    assert dead_links(page) == ["other.md#no-heading", "no.md#", "no.png#"]


def test_random_batches_carry_their_mask() -> None:
    batch = training_batches()[0]
    tokens = torch.cat([batch["latents"], batch["masked_latents"], batch["packed_mask"]], dim=-1)
    found: Tensor = moe_lora.masks.from_flux_fill(tokens, 32, 48)
    assert torch.equal(found.float(), batch["mask"])
