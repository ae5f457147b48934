"""The subcommand `example`: copy an example out of the installed package."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

EXAMPLES = ("flux_removal",)
"""The examples in the wheel; pyproject.toml puts their folders there."""

_NOT_COPIED = shutil.ignore_patterns("__pycache__", "outputs", "logs", "data")


def example(options: argparse.Namespace) -> None:
    """Copy an example into a folder."""
    folder = Path(options.directory)
    files = copy_example(options.name, folder, overwrite=options.overwrite)
    if options.json:
        print(json.dumps({"path": str(folder), "files": [str(file) for file in files]}, indent=2))
    else:
        print(f"{folder}: {len(files)} files of the example {options.name}, see README.md")


class ListExamples(argparse.Action):
    """Print the examples and end the process, whatever the other arguments are."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        for name in EXAMPLES:
            title = (example_folder(name) / "README.md").read_text(encoding="utf-8").splitlines()[0]
            print(f"{name}: {title.removeprefix('# ')}")
        parser.exit()


def copy_example(name: str, directory: Path, *, overwrite: bool = False) -> list[Path]:
    """Copy an example into a folder.

    Args:
        name: one of `EXAMPLES`.
        directory: a new or an empty folder.
        overwrite: also copy into a folder with files, where the example's files replace their
            namesakes; all others stay.

    Returns:
        The copied files.

    Raises:
        FileNotFoundError: when the installed package lacks the example.
        ValueError: when the folder is a file, or has files and `overwrite` is off.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"Expected a folder to copy to, but got the file {str(directory)!r}.")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise ValueError(
            f"Expected a new or an empty folder to copy to, but {str(directory)!r} has files. "
            "Choose another folder, or pass --overwrite to replace the example's files in it."
        )
    source = example_folder(name)
    copied: list[Path] = []

    def copy(file: str, target: str) -> str:
        copied.append(Path(target))
        return shutil.copy(file, target)

    shutil.copytree(source, directory, ignore=_NOT_COPIED, copy_function=copy, dirs_exist_ok=True)
    return sorted(copied)


def example_folder(name: str) -> Path:
    """Return the folder of an example: in the installed package, or in the checkout.

    Args:
        name: one of `EXAMPLES`.

    Raises:
        FileNotFoundError: when there is none.
    """
    package = Path(__file__).parents[1]
    checkout = package.parents[1]
    folders = [package / "examples" / name]
    if (checkout / "pyproject.toml").is_file():
        folders.append(checkout / "examples" / name)
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"Expected the example {name!r} in {str(folders[0])!r}, but there is none. Install "
        "moe-lora again."
    )
