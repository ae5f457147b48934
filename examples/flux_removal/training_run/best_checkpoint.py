"""Keep the checkpoint with the best validation."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from options.validation_options import HIGHER_IS_BETTER
from training_run.checkpoints import BEST, save_model
from training_run.model_card import ModelCardWriter

if TYPE_CHECKING:
    from training_run.parts import Parts

RECORD = "validation.json"


class BestCheckpoint:
    """Keep `checkpoint-best`: model and model card, without the state of the optimizer.

    The folder is beside the checkpoints `checkpoint-N` and no limit deletes it. A run that resumes
    goes on with its value, unless the validation changed.

    Args:
        output_dir: of the run.
        metric: one of `HIGHER_IS_BETTER`.
        settings: everything else that a value depends on, as JSON has it.
        card: writes the model card.
    """

    def __init__(
        self, output_dir: Path, metric: str, settings: dict[str, Any], card: ModelCardWriter
    ) -> None:
        self.folder, self.metric, self.card = output_dir / BEST, metric, card
        self.settings = settings
        self.step: int | None = None
        self.value: float | None = None
        self.note: str | None = None
        self._read()

    def _read(self) -> None:
        """Read what an earlier part of the run kept."""
        replaced = self._temporary("old")
        if replaced.is_dir() and not self.folder.is_dir():  # killed between two renames
            os.replace(replaced, self.folder)
        if not (self.folder / RECORD).is_file():
            return
        record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        if record["settings"] == self.settings and self.metric in record["values"]:
            self.step, self.value = record["step"], record["values"][self.metric]
        else:
            self.note = (
                f"The validation differs from that of {self.folder}, which the next one replaces."
            )

    def update(self, parts: Parts, step: int, values: dict[str, float]) -> bool:
        """Save the model if it is the best so far; called by every process.

        Args:
            parts: the models of the run.
            step: optimizer steps done.
            values: of the validation, the same in all processes.

        Returns:
            Whether it is.

        Raises:
            ValueError: when the scenes have no value of the metric.
        """
        if self.metric not in values:
            raise ValueError(
                f"Expected a scene with a value of `validation_metric` {self.metric}, but got "
                f"{', '.join(values)} only."
            )
        value = values[self.metric]
        gain = 0.0 if self.value is None else value - self.value
        if self.value is not None and not (gain > 0 if HIGHER_IS_BETTER[self.metric] else gain < 0):
            return False
        self.step, self.value = step, value
        accelerator, temporary = parts.accelerator, self._temporary("part")
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        save_model(accelerator, accelerator.unwrap_model(parts.model), temporary)
        if accelerator.is_main_process:
            record = {"step": step, "values": values, "settings": self.settings}
            text = json.dumps(record, indent=1) + "\n"
            (temporary / RECORD).write_text(text, encoding="utf-8")
            self.card(temporary, step)
            self._replace(temporary)
        accelerator.wait_for_everyone()
        return True

    def _replace(self, temporary: Path) -> None:
        replaced = self._temporary("old")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.folder.is_dir():
            os.replace(self.folder, replaced)
        os.replace(temporary, self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _temporary(self, ending: str) -> Path:
        return self.folder.with_name(f".{BEST}.{ending}")

    def describe(self) -> str:
        """Return a line for the log."""
        return f"Best checkpoint: step {self.step}, {self.metric} {self.value:.4f}, {self.folder}."
