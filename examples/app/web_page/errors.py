"""Errors as messages for the visitor who caused them; the server goes on."""

from __future__ import annotations

import functools
import re
import tempfile
import traceback
from collections.abc import Callable
from typing import TypeVar

import gradio as gr
import torch

Returned = TypeVar("Returned")

SERVER_PATH = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)+")
"""Folders in front of a file's name."""


def without_paths(text: str) -> str:
    """Return a message without the folders of the server.

    Example:
        >>> without_paths("Expected /tmp/a/b/photo.png to be an image.")
        'Expected photo.png to be an image.'
    """
    return SERVER_PATH.sub("", text.replace(tempfile.gettempdir() + "/", "/"))


def message_for(error: Exception) -> str:
    """Return what a visitor is told about an error."""
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
        return "The image is too large for the memory of the server. Load a smaller one."
    if isinstance(error, ValueError | OSError):
        return without_paths(str(error))
    return f"The request failed with {type(error).__name__}. The log of the server says more."


def told(handler: Callable[..., Returned]) -> Callable[..., Returned]:
    """Turn what goes wrong in a handler into a message on the page of its visitor."""

    @functools.wraps(handler)
    def wrapper(*args: object, **kwargs: object) -> Returned:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:  # one visitor's request must not end those of others
            if not isinstance(error, ValueError | OSError):
                traceback.print_exc()
            raise gr.Error(message_for(error), print_exception=False) from error

    return wrapper
