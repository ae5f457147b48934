from __future__ import annotations

import pytest
import torch

pytest.importorskip("gradio")

import gradio as gr

from web_page.errors import message_for, told, without_paths


def raising(error: Exception) -> object:
    @told
    def handler() -> None:
        raise error

    with pytest.raises(gr.Error) as caught:
        handler()
    return caught.value.message


def test_what_a_visitor_can_mend_is_said_without_folders() -> None:
    error = ValueError("Expected /tmp/app_1/uploads/ab/photo.png to be an image, but it is none.")
    assert raising(error) == "Expected photo.png to be an image, but it is none."
    assert without_paths("a mask of 1/2 or 3/4 of it") == "a mask of 1/2 or 3/4 of it"


def test_faults_of_the_app_are_named_but_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = raising(RuntimeError("secret of /etc"))
    assert text == "The request failed with RuntimeError. The log of the server says more."
    assert "secret of /etc" in capsys.readouterr().err


def test_a_full_memory_is_explained() -> None:
    assert "too large for the memory" in message_for(torch.OutOfMemoryError("CUDA"))
    text = "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
    assert "too large for the memory" in message_for(RuntimeError(text))


def test_messages_of_gradio_pass() -> None:
    assert raising(gr.Error("as it is")) == "as it is"
