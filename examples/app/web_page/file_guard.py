"""Refuse requests for files outside of the app's temporary folder."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FILE_ROUTE = re.compile(r"/file[=/](?P<name>.*)", re.DOTALL)


class FileGuard:
    """Let Gradio's file route serve files of one folder only.

    Gradio has rules of its own, which also fetch URLs and depend on what the app returned. This
    rule is before them, and simpler.

    Args:
        app: what is guarded.
        folder: whose files are served.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder = app, folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 for files elsewhere, and hand on all else."""
        if scope["type"] == "http":
            found = FILE_ROUTE.search(scope["path"])
            if found and not self.allows(found["name"]):
                await PlainTextResponse("Forbidden", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def allows(self, name: str) -> bool:
        """Return whether a name, as it stands in a URL, is that of a file in the folder."""
        names = {name}
        while (decoded := unquote(name)) != name:  # one more decoder behind us must not matter
            names.add(decoded)
            name = decoded
        return all("\0" not in n and self._inside(n) for n in names)

    def _inside(self, name: str) -> bool:
        path = Path(name)
        return path.is_absolute() and self.folder in path.resolve().parents
