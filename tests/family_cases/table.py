"""The cases together, and the table that docs/guides/model_families.md makes of them.

`python -m family_cases.table`, run in `tests/`, writes the table into the page.
"""

from __future__ import annotations

from pathlib import Path

from family_cases import flux, images, unets, videos
from family_cases.case import Case

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "model_families.md"
START, END = "<!-- table: start -->\n", "<!-- table: end -->"

CASES = [*flux.CASES, *images.CASES, *unets.CASES, *videos.CASES]

NOT_TRIED = {
    "AnyFlowFARTransformer3DModel",
    "AudioLDM2UNet2DConditionModel",
    "BriaFibo2Transformer2DModel",
    "Cosmos3OmniTransformer",
    "DreamLiteTransformer2DModel",
    "DreamLiteUNetModel",
    "Kandinsky3UNet",
    "Kandinsky6SRTransformer3DModel",
    "RFD4ProteinaTransformer",
    "SanaWMLTX2RefinerTransformer3DModel",
    "SanaWMTransformer3DModel",
    "TransformerTemporalModel",
    "UNet1DModel",
    "UVit2DModel",
    "WanAnimate2Transformer3DModel",
    "WanAnimateTransformer3DModel",
}
"""Classes of diffusers of which there is no tiny model here."""

CHECKPOINTING = {"yes": "yes", "none": "the class has none", "broken": "fails in diffusers"}
HEAD = (
    "Class",
    "Adapted layers",
    "Routed step",
    "Batch = samples",
    "Save, load",
    "Checkpointing",
    "Weights per token",
)


def row(case: Case) -> tuple[str, ...]:
    """Return what the page says of a case; the tests of the case hold it to that."""
    targets = "default" if case.targets is None else ", ".join(f"`{t}`" for t in case.targets)
    return (
        f"`{case.cls}`" + (f", {case.variant}" if case.variant else ""),
        targets,
        "yes",
        "yes",
        "yes",
        CHECKPOINTING[case.checkpointing],
        "yes" if case.tokens else "no claim",
    )


def render() -> str:
    """Return the table as Markdown, with the list of classes that were not tried."""
    lines = [HEAD, tuple("---" for _ in HEAD), *(row(case) for case in CASES)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    missing = ", ".join(f"`{name}`" for name in sorted(NOT_TRIED))
    return f"{rows}\n\nNot tried: {missing}.\n"


def write(page: Path = PAGE) -> None:
    """Put the table into the page, between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}{render()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write()
