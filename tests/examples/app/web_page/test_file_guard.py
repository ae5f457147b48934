from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("starlette")

from web_page.file_guard import FileGuard


@pytest.fixture
def guard(tmp_path: Path) -> FileGuard:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.png").write_text("inside")
    (tmp_path / "secret.txt").write_text("outside")
    (tmp_path / "open" / "link").symlink_to(tmp_path / "secret.txt")

    async def served(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return FileGuard(served, tmp_path / "open")


def test_files_of_the_folder_are_served(guard: FileGuard, tmp_path: Path) -> None:
    assert guard.allows(f"{tmp_path}/open/a.png")
    assert guard.allows(quote(f"{tmp_path}/open/a.png"))


def test_files_elsewhere_are_not(guard: FileGuard, tmp_path: Path) -> None:
    inside = f"{tmp_path}/open"
    for name in (
        "/etc/passwd",
        f"{tmp_path}/secret.txt",
        f"{inside}/../secret.txt",
        quote(f"{inside}/../secret.txt", safe=""),
        quote(quote(f"{inside}/../secret.txt", safe=""), safe=""),
        f"{inside}/link",
        f"{inside}/a.png\0/../../secret.txt",
        f"{tmp_path}/opened/a.png",
        "secret.txt",
        "../secret.txt",
        "http://127.0.0.1/",
        "https://example.com/a.png",
        "",
    ):
        assert not guard.allows(name), name


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gradio_api/file=/etc/passwd", 403),
        ("/gradio_api/file//etc/passwd", 403),
        ("/file=/etc/passwd", 403),
        ("/gradio_api/queue/join", 200),
        ("/", 200),
    ],
)
def test_only_the_file_route_is_guarded(guard: FileGuard, path: str, status: int) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(guard({"type": "http", "path": path, "method": "GET"}, receive, send))
    assert sent[0]["status"] == status
