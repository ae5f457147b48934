"""Whole files or none: atomic writes, and reading that says in one sentence what is wrong."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `folder` when the context ends well.

    Args:
        folder: where the files shall be; its parents are created when missing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            old = temporary.with_name(temporary.name + ".old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file under a temporary name and rename it when it is whole.

    Args:
        path: the file; its parents are created when missing.
        tensors: by name; moved to the CPU and made contiguous.
        metadata: text by key, beside `format`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"format": "pt", **(metadata or {})})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Args:
        path: the file.

    Returns:
        Tensors by name, on the CPU, and the metadata.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is corrupt, truncated or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a safetensors file at {str(path)!r}, but there is none.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"Expected a whole safetensors file at {str(path)!r}, but it is truncated, corrupt or "
            f"of another format ({error}). Save it again, or take an earlier copy."
        ) from error
