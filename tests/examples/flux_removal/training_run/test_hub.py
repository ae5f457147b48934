from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

import train
from options.parsing import parse_options

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Record the calls of the Hub; an upload also records the files that it takes."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self: HfApi, repo_id: str, **given: Any) -> SimpleNamespace:
        calls.append(("create_repo", {"repo_id": repo_id, **given}))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self: HfApi, **given: Any) -> SimpleNamespace:
        folder = Path(given["folder_path"])
        files = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
        kept = list(filter_repo_objects(files, allow_patterns=given["allow_patterns"]))
        calls.append(("upload_folder", {**given, "files": sorted(kept)}))
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def run(flags: list[str]) -> Path:
    return train.train(parse_options(flags))


def test_the_last_checkpoint_is_uploaded_without_the_state_of_the_optimizer(
    hub: list[tuple[str, dict[str, Any]]], arguments: Arguments, tmp_path: Path
) -> None:
    folder = run(arguments(push_to_hub=True, hub_model_id="me/remover"))
    (_, created), (_, uploaded) = hub
    assert created == {"repo_id": "me/remover", "private": None, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/remover", folder)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(
        uploaded["files"]
    )
    assert any(fnmatch.fnmatch(name, "experts/*/adapter_model*") for name in uploaded["files"])
    assert not any("training_state" in name for name in uploaded["files"])
    assert "me/remover" in (folder / "README.md").read_text()
    assert "https://hub/commit" in (tmp_path / "logs" / "training.log").read_text()


def test_the_best_checkpoint_goes_first_and_privately(
    hub: list[tuple[str, dict[str, Any]]], arguments: Arguments, triplets: Path, tmp_path: Path
) -> None:
    checks = {"validation_data_dir": triplets, "validation_denoising_steps": 1}
    run(arguments(**checks, push_to_hub=True, hub_private=True))
    (_, created), (_, uploaded) = hub
    assert created == {"repo_id": "out", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/out"
    assert uploaded["folder_path"] == tmp_path / "out" / "checkpoint-best"
    assert {"contact_sheet.png", "README.md"} <= set(uploaded["files"])
    assert "validation.json" not in uploaded["files"]


def test_a_run_that_does_not_ask_for_it_uploads_nothing(
    hub: list[tuple[str, dict[str, Any]]], arguments: Arguments
) -> None:
    run(arguments())
    assert hub == []


def test_a_stopped_run_uploads_nothing(
    hub: list[tuple[str, dict[str, Any]]], arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.Interruption, "agreed", lambda *_: True)
    run(arguments(push_to_hub=True))
    assert [name for name, _ in hub] == ["create_repo"]


def test_a_missing_token_raises_before_anything_is_loaded(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def whoami(self: HfApi) -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    monkeypatch.setattr(train, "open_data", lambda *_: pytest.fail("data were read"))
    with pytest.raises(PermissionError, match="`hf auth login`"):
        run(arguments(push_to_hub=True))


def test_a_hub_out_of_reach_raises_before_anything_is_loaded(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whoami(self: HfApi) -> None:
        raise OSError("name or service not known")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    monkeypatch.setattr(train, "open_data", lambda *_: pytest.fail("data were read"))
    with pytest.raises(ConnectionError, match="name or service not known"):
        run(arguments(push_to_hub=True))


def test_a_failed_upload_names_the_command_that_repeats_it(
    hub: list[tuple[str, dict[str, Any]]],
    arguments: Arguments,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def upload_folder(self: HfApi, **given: Any) -> None:
        raise OSError("connection lost")

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    with pytest.raises(OSError, match="connection lost"):
        run(arguments(push_to_hub=True))
    log = (tmp_path / "logs" / "training.log").read_text()
    assert f"hf upload me/out {tmp_path / 'out' / 'checkpoint-2'} ." in log
