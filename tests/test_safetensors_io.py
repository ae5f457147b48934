from __future__ import annotations

import pytest
import torch

from moe_lora.safetensors_io import (
    read_header,
    read_json,
    read_tensors,
    replacing,
    write_tensors,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(1, dtype=torch.bfloat16)}


def test_what_was_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "file.safetensors"
    write_tensors(path, TENSORS, {"answer": "42"})
    tensors, metadata = read_tensors(path)
    assert metadata == {"format": "pt", "answer": "42"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.dtype == TENSORS[name].dtype
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


def test_a_failing_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(before[:40])
        raise OSError("disk full")

    monkeypatch.setattr("moe_lora.safetensors_io.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"c": torch.ones(1)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    for read in (read_tensors, read_header):
        with pytest.raises(ValueError, match=r"whole safetensors file at .*file\.safetensors"):
            read(path)


@pytest.mark.parametrize("read", [read_tensors, read_header, read_json])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        read(tmp_path / "none.safetensors")


def test_a_header_tells_shapes_and_dtypes(tmp_path):
    write_tensors(tmp_path / "file.safetensors", TENSORS, {"answer": "42"})
    headers, metadata = read_header(tmp_path / "file.safetensors")
    assert headers == {"a": ((3, 2), "F32"), "b": ((1,), "BF16")}
    assert metadata["answer"] == "42"


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"Expected (a )?JSON.* in .*a\.json"):
        read_json(tmp_path / "a.json")


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    with replacing(folder) as temporary:
        (temporary / "first").touch()
    with pytest.raises(FileExistsError):
        _half_write(folder)
    assert [p.name for p in folder.iterdir()] == ["first"]
    with replacing(folder) as temporary:
        (temporary / "third").touch()
    assert [p.name for p in folder.iterdir()] == ["third"]
    assert list(tmp_path.iterdir()) == [folder]


def _half_write(folder):
    with replacing(folder) as temporary:
        (temporary / "second").mkdir()
        (temporary / "second").mkdir()
