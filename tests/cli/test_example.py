"""`moe-lora example`, from the checkout and from a wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from moe_lora.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "flux_removal"


def tracked(folder: Path) -> set[str]:
    """Return the files of a folder, without what running it leaves behind."""
    left = ("__pycache__", "outputs", "logs", "data")
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and not set(left).intersection(file.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))


def test_the_wheel_is_the_package_the_example_and_the_metadata(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {f"moe_lora/{name}" for name in tracked(ROOT / "src" / "moe_lora")}
    example = {f"moe_lora/examples/flux_removal/{name}" for name in tracked(EXAMPLE)}
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == package | example
    assert {name.split("/", 1)[1] for name in metadata} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }
    assert {"moe_lora/py.typed", "moe_lora/export/formats/kohya.py"} <= names
    assert "moe_lora/examples/flux_removal/configs/routed.yaml" in names
    assert "moe_lora/examples/flux_removal/train_moe.sh" in names


def test_the_copy_out_of_a_wheel_runs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import sys; from moe_lora.cli import main; sys.exit(main())"
    words = ["example", "flux_removal", str(tmp_path / "mine")]

    def run(*command, folder):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "see README.md" in run("-c", code, *words, folder=tmp_path)
    assert tracked(tmp_path / "mine") == tracked(EXAMPLE)
    assert "--routing_strategy" in run("train.py", "--help", folder=tmp_path / "mine")


def test_the_copy_of_a_checkout_is_the_example(tmp_path, capsys):
    assert main(["example", "flux_removal", str(tmp_path / "mine"), "--json"]) == 0
    copied = json.loads(capsys.readouterr().out)
    assert {Path(file).relative_to(tmp_path / "mine").as_posix() for file in copied["files"]} == (
        tracked(EXAMPLE)
    )
    for name in tracked(EXAMPLE):
        assert (tmp_path / "mine" / name).read_bytes() == (EXAMPLE / name).read_bytes()
    assert os.access(tmp_path / "mine" / "train_moe.sh", os.X_OK) == os.access(
        EXAMPLE / "train_moe.sh", os.X_OK
    )


def test_a_folder_with_files_is_left_alone_without_overwrite(tmp_path, capsys):
    (tmp_path / "train.py").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    words = ["example", "flux_removal", str(tmp_path)]
    assert main(words) == 1
    assert "pass --overwrite to replace" in capsys.readouterr().err
    assert tracked(tmp_path) == {"train.py", "notes.txt"}
    assert (tmp_path / "train.py").read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0
    assert (tmp_path / "train.py").read_bytes() == (EXAMPLE / "train.py").read_bytes()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder_to_copy_to(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["example", "flux_removal", str(tmp_path / "file"), "--overwrite"]) == 1
    assert "Expected a folder to copy to" in capsys.readouterr().err


def test_the_list_has_every_example_with_its_title(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["example", "--list"])
    assert ended.value.code == 0
    title = (EXAMPLE / "README.md").read_text().splitlines()[0].removeprefix("# ")
    assert capsys.readouterr().out == f"flux_removal: {title}\n"
