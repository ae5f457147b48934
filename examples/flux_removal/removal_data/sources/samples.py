"""A sample: the files of one removal triplet, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["missing", "ambiguous", "unreadable", "size", "mask", "pair"]


@dataclass(frozen=True)
class Sample:
    """The files of one sample.

    Attributes:
        name: unique in its data set.
        files: by part: `src`, `mask`, `result` and, where there is one, `ref`.
        caption: the prompt; None for that of the run.
        kind: of removal, such as "shadow"; None where it is not told.
        repeats: times per epoch.
        weight: multiplies `repeats`; with fractions a sample is in some epochs only.
    """

    name: str
    files: dict[str, Path]
    caption: str | None = None
    kind: str | None = None
    repeats: int = 1
    weight: float = 1.0

    @property
    def share(self) -> float:
        """Return how many times per epoch the sample is dealt on average."""
        return self.repeats * self.weight


PARTS = ("src", "mask", "result", "ref")


@dataclass(frozen=True)
class Finding:
    """What is wrong with a sample.

    Attributes:
        sample: its name.
        part: `src`, `mask`, `result` or `ref`.
        kind: the class of the finding.
        text: a sentence.
        error: whether the sample cannot be used; a warning otherwise.
    """

    sample: str
    part: str
    kind: Kind
    text: str
    error: bool = True


def raise_first(findings: list[Finding]) -> None:
    """Raise the first error, if there is any.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for any other error.
    """
    for finding in findings:
        if finding.error:
            raise (FileNotFoundError if finding.kind == "missing" else ValueError)(finding.text)
