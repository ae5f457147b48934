"""Commands, run in bash as a page prints them.

Python programs take long to start. In bash they only record their arguments; they run in this
process once the command line is done, in the order in which bash called them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState

from doc_pages.blocks import ROOT
from moe_lora.cli import main as moe_lora_command
from moe_lora.cli.main import parser as moe_lora_parser

RECORD = """#!/bin/sh
note=$(mktemp -p "{notes}" "$(ls {notes} | wc -l).XXXXXX")
printf '%s\\n' "{program}" "$PWD" "$@" > "$note"
"""
DRY_MAKE = """#!/bin/sh
exec {make} --dry-run "$@"
"""

HUB = "black-forest-labs/"
LONG = ("benchmarks", "integrations")
"""Folders of scripts that train for hours or download models, and have tests of their own."""

MOST_SAMPLES = {"train_count": 4, "test_count": 4}
STEPS = 1


class Shell:
    """Runs commands in a copy of what a user has checked out.

    Args:
        root: a new folder for the copy, where it starts.
    """

    def __init__(self, root: Path) -> None:
        without = shutil.ignore_patterns("model", "__pycache__", "outputs", "data", "logs")
        for folder in ("examples", "benchmarks"):
            shutil.copytree(ROOT / folder, root / folder, ignore=without)
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, root)
        self.root = self.folder = root.resolve()
        self.parsed: list[list[str]] = []
        """Commands that were parsed, not run."""
        self._bin, self._notes = root / ".bin", root / ".notes"
        self._bin.mkdir()
        for program in ("python", "accelerate", "moe-lora", "pip", "tensorboard"):
            self._install(program, RECORD.format(notes=self._notes, program=program))
        self._install("make", DRY_MAKE.format(make=shutil.which("make")))

    def _install(self, program: str, text: str) -> None:
        path = self._bin / program
        path.write_text(text)
        path.chmod(0o755)

    def run(self, command: str) -> None:
        """Run a command line; `cd` acts on the next one.

        Raises:
            CalledProcessError, SystemExit, AssertionError and others: when the command fails.
        """
        shutil.rmtree(self._notes, ignore_errors=True)
        self._notes.mkdir()
        place = self._bin / "folder"
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f'{command}\npwd > "{place}"'],
            cwd=self.folder,
            env=os.environ | {"PATH": f"{self._bin}:{os.environ['PATH']}"},
            check=True,
        )
        self.folder = Path(place.read_text().strip())
        notes = sorted(self._notes.iterdir(), key=lambda note: int(note.name.partition(".")[0]))
        for note in notes:
            program, folder, *words = note.read_text().splitlines()
            os.chdir(folder)
            self._call(program, words)

    def _call(self, program: str, words: list[str]) -> None:
        if program == "python":
            self._run_script(Path(words[0]), words[1:])
        elif program == "accelerate":
            assert words[0] == "launch"
            args = launch_command_parser().parse_args(words[1:])
            alone = (args.num_processes or 1) == 1
            self._run_script(Path(args.training_script), args.training_script_args, alone=alone)
        elif program == "moe-lora" and words[0] == "plan":
            # It takes a minute at the size of FLUX.1 Fill, and has tests of its own.
            moe_lora_parser().parse_args(words)
            self.parsed.append([program, *words])
        elif program == "moe-lora":
            assert moe_lora_command(words) == 0
        elif program == "tensorboard":
            assert words[0] == "--logdir"
            assert list(Path(words[1]).rglob("events.*"))
        else:
            check_pip(words)

    def _run_script(self, script: Path, words: list[str], *, alone: bool = True) -> None:
        # Modules beside the script come last, so that those of the repository are not shadowed.
        searched, known = list(sys.path), set(sys.modules)
        sys.path.append(str(script.resolve().parent))
        try:
            namespace = runpy.run_path(str(script), run_name="__page__")
        finally:
            sys.path[:] = searched
            self._forget_modules(set(sys.modules) - known)
        long = any(part in LONG for part in script.resolve().parts)
        if long or not alone or any(word.startswith(HUB) for word in words):
            parse(namespace, words)
            self.parsed.append([str(script), *words])
            return
        shorten(namespace)
        assert namespace["main"](words) in (None, 0)
        AcceleratorState._reset_state(reset_partial_state=True)

    def _forget_modules(self, names: set[str]) -> None:
        """Forget modules of the copy, which the scripts of later pages would find."""
        for name in names:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and self.root in Path(file).resolve().parents:
                del sys.modules[name]


def parse(namespace: dict[str, Any], words: list[str]) -> None:
    """Parse the arguments of a script, without running it."""
    for name in ("parse_options", "parse", "parse_args"):
        if name in namespace:
            # A plan asks neither for a GPU nor for packages of base precisions and optimizers.
            needy = name == "parse_options" and {"--base_precision", "bnb.AdamW8bit"} & {*words}
            namespace[name]([*words, *(["--plan"] if needy else [])])
            return
    namespace["build_parser"]().parse_args(words)


def check_pip(words: list[str]) -> None:
    """Check what `pip install` is asked for: extras of this package, and files that exist."""
    assert words[0] == "install"
    known = set(importlib.metadata.metadata("moe-lora").get_all("Provides-Extra") or ())
    for word in words[1:]:
        if found := re.fullmatch(r"(?:moe-lora|\.)(?:\[([\w,]+)\])?", word):
            assert set((found[1] or "").split(",")) - {""} <= known
        elif not word.startswith("-"):
            assert Path(word).is_file(), f"{word} is no part of this package"


def shorten(namespace: dict[str, Any]) -> None:
    """Let a script write fewer samples, and start training shortly before the last step.

    The names of checkpoints, the phases at that step and the log are those of the whole run.
    """
    if "make_data" in namespace:
        replace(namespace, "make_data", few_samples)
    if "Progress" in namespace:
        begin_late(namespace)


def replace(namespace: dict[str, Any], name: str, change: Callable[..., Any]) -> None:
    # `run_path` returns a copy of the globals that the script's functions see.
    seen = namespace["main"].__globals__
    seen[name] = change(seen[name])


def few_samples(make_data: Callable[..., None]) -> Callable[..., None]:
    def make(output: Path, **counts: int) -> None:
        make_data(output, **counts | MOST_SAMPLES)

    return make


def begin_late(namespace: dict[str, Any]) -> None:
    last = {"step": STEPS}

    def few_steps(parse_options: Callable[..., Any]) -> Callable[..., Any]:
        def parse(words: list[str]) -> Any:
            options = parse_options(words)
            options.max_train_steps = options.max_train_steps or STEPS
            last["step"] = options.max_train_steps
            return options

        return parse

    def late(progress: type) -> Callable[..., Any]:
        return lambda **fields: progress(step=last["step"] - STEPS, **fields)

    replace(namespace, "parse_options", few_steps)
    replace(namespace, "Progress", late)
