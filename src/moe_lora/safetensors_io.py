"""Reading and atomic writing of safetensors and JSON files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where a folder cannot be locked
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

TEMPORARY = ".saving-moe_lora-"
_THREADS = threading.RLock()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Open a temporary folder that replaces `folder` when the context ends without an error.

    Args:
        folder: the target folder, whose previous files are removed; missing parents are created.

    Yields:
        The temporary folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        with _folder_lock(folder.parent):
            if folder.exists():
                old = temporary.with_name(temporary.name + ".old")
                folder.rename(old)
                temporary.rename(folder)
                shutil.rmtree(old)
            else:
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def updating(folder: Path, last: str | None = None) -> Iterator[Path]:
    """Open a temporary folder whose files move to `folder` when the context ends without an error.

    Each file replaces the file of the same name; other files in the folder stay. The folder is
    locked against other threads and, if the file system has locks, other processes. Temporary
    folders of killed programs are removed.

    Args:
        folder: the target folder; created when missing.
        last: the name of a file that belongs to all others. When it changes, the previous file is
            removed before any other file is replaced, and the new one is moved last: a program that
            is killed in between leaves no such file, rather than one that does not match.

    Yields:
        The temporary folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _folder_lock(folder) as alone:
        if alone:
            _remove_stale_folders(folder)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        try:
            yield temporary
            names = {file.name for file in temporary.iterdir()}
            if last in names and _same_content(temporary / last, folder / last):
                names.remove(last)
            elif last in names:
                (folder / last).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: (name == last, name)):
                os.replace(temporary / name, folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file under a temporary name and rename it when it is complete.

    Args:
        path: the file; missing parents are created.
        tensors: the tensors by name; moved to the CPU and made contiguous.
        metadata: additional text by key in the header.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with updating(path.parent) as temporary:
        save_file(whole, temporary / path.name, metadata={"format": "pt", **(metadata or {})})


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
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


class TensorHeader(NamedTuple):
    """Shape and dtype of a tensor in a file.

    Attributes:
        shape: the tensor's shape.
        dtype: the dtype in safetensors' notation, such as "BF16".
    """

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Read the names, shapes and dtypes of a safetensors file, and its metadata.

    Args:
        path: the file.

    Returns:
        Shape and dtype by the tensor's name, and the metadata.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is corrupt, truncated or of another format.
    """
    with _open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        headers = {
            name: TensorHeader(tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        }
        return headers, file.metadata() or {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file at {str(path)!r}, but there is none.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Expected JSON in {str(path)!r}, but it is truncated or corrupt ({error}). Save it "
            "again, or use an earlier copy."
        ) from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"Expected a JSON object in {str(path)!r}, but got a {type(entries).__name__}. Save it "
            "again, or use an earlier copy."
        )
    return entries


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor of 8-bit floats in float32, and any other unchanged.

    torch neither compares nor adds 8-bit floats.

    Args:
        tensor: any tensor.

    Example:
        >>> widened(torch.ones(2).to(torch.float8_e4m3fn)).dtype
        torch.float32
    """
    eight_bit = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.to(torch.float32) if eight_bit else tensor


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a safetensors file at {str(path)!r}, but there is none.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"Expected a whole safetensors file at {str(path)!r}, but it is truncated, corrupt or "
            f"of another format ({error}). Save it again, or use an earlier copy."
        ) from error


@contextmanager
def _folder_lock(folder: Path) -> Iterator[bool]:
    """Lock a folder against other writers; yield whether other processes are locked out, too."""
    with _THREADS:
        handle = _lock(folder)
        try:
            yield handle is not None
        finally:
            if handle is not None:
                os.close(handle)


def _lock(folder: Path) -> int | None:
    """Lock a folder against other processes; return `None` if the system has no such locks.

    The lock ends with the process, also when it is killed.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to but not listed
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a network file system without locks
        os.close(handle)
        return None
    return handle


def _remove_stale_folders(folder: Path) -> None:
    """Remove the temporary folders of killed programs; the folder must be locked."""
    for left in folder.glob(f"{TEMPORARY}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def _same_content(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
