"""End a run at the next good moment when it is told to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Note SIGINT (Ctrl-C) and SIGTERM (kill) instead of dying of them; the second one kills.

    Outside of the main thread, where signals cannot be caught, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def agreed(self, accelerator: Accelerator) -> bool:
        """Tell whether any process was told to stop, so that all stop after the same step."""
        told = torch.tensor(float(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(told, reduction="sum").item())

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
