"""Upload the result of a run to the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from options.train_options import TrainOptions

if TYPE_CHECKING:
    from training_run.parts import Run

UPLOADED = ("README.md", "*.png", "adapter_*", "experts/*", "transformer/*")
"""What is uploaded of a checkpoint; the state of the optimizer is not."""


def open_repository(options: TrainOptions, accelerator: Accelerator) -> str | None:
    """Check the login, and create the repository of the run unless it exists.

    Called before anything is loaded, so that a run does not end without the right to upload.

    Returns:
        The full name of the repository; None without `push_to_hub`, and but for the main process.

    Raises:
        PermissionError: without a valid token, or without the right to write.
        ConnectionError: when the Hub cannot be reached.
    """
    if not (options.push_to_hub and accelerator.is_main_process):
        return None
    name = options.hub_model_id or Path(options.output_dir).resolve().name
    api = HfApi()
    try:
        api.whoami()
        created = api.create_repo(name, private=options.hub_private or None, exist_ok=True)
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            "Expected a token of the Hugging Face Hub with `push_to_hub`, but found none. Run "
            "`hf auth login`, or set HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        raise PermissionError(
            f"Expected a login to the Hugging Face Hub with the right to write to `hub_model_id` "
            f"{name}, but got: {error}"
        ) from error
    except Exception as error:  # the network library depends on the version of huggingface_hub
        raise ConnectionError(
            f"Expected access to the Hugging Face Hub with `push_to_hub`, but got: {error}"
        ) from error
    return str(created.repo_id)


def upload_result(run: Run, folder: Path) -> None:
    """Upload the best checkpoint, or else the last one, at the end of a run that has a repository.

    Model, model card and contact sheet are uploaded. A run that was stopped uploads nothing.

    Args:
        run: at its end.
        folder: the last checkpoint.

    Raises:
        Exception: whatever the upload raises, after the log names the command that repeats it.
    """
    repository, reporter = run.card.repository, run.reporter
    if repository is None or run.progress.step < reporter.total_steps:
        return
    best = run.validator.best if run.validator is not None else None
    if best is not None and best.step is not None:
        folder = best.folder
    try:
        found = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(UPLOADED),
            commit_message=f"Upload {folder.name}",
        )
    except Exception:  # of any library on the way; it is raised again
        included = " ".join(f'--include "{pattern}"' for pattern in UPLOADED)
        command = f"hf upload {repository} {folder} . {included}"
        reporter.say(f"The upload failed. Repeat it: {command}", logging.ERROR)
        raise
    reporter.say(f"Uploaded {folder}: {found.commit_url}")
