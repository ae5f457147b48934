"""The cases together, and the table that docs/reference/model_families.md makes of them.

`python -m family_cases.table`, run in `tests/`, writes the table into the page.
"""

from __future__ import annotations

from pathlib import Path

from family_cases import flux, images, unets, videos
from family_cases.case import Case

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "model_families.md"
START, END = "<!-- table: start -->\n", "<!-- table: end -->"

CASES = [*flux.CASES, *images.CASES, *unets.CASES, *videos.CASES]

TOKENS: dict[str, tuple[int, ...]] = {
    # Image tokens, and all packed tokens where references follow.
    "FluxTransformer2DModel": (8,),
    "FluxTransformer2DModel (Fill)": (8,),
    "FluxTransformer2DModel (Kontext)": (8, 12),
    "Flux2Transformer2DModel": (8,),
    "Flux2Transformer2DModel (with references)": (8, 16),
    "QwenImageTransformer2DModel": (8,),
    "QwenImageTransformer2DModel (Edit)": (8, 12),
    "QwenImageTransformer2DModel (Edit 2511)": (8, 12),
    "ChromaTransformer2DModel": (8,),
    "BriaTransformer2DModel": (8,),
    "BriaFiboTransformer2DModel": (8,),
    "LongCatImageTransformer2DModel": (8,),
    "OvisImageTransformer2DModel": (8,),
    "NucleusMoEImageTransformer2DModel": (8,),
    # Patches of two by two latent pixels, and the latent pixels themselves.
    "SD3Transformer2DModel": (8, 32),
    "SD3Transformer2DModel (3.5)": (8, 32),
    "AuraFlowTransformer2DModel": (8, 32),
    "PixArtTransformer2DModel": (8, 32),
    "SanaTransformer2DModel": (8, 32),
    "DiTTransformer2DModel": (16, 64),
    "HunyuanDiT2DModel": (8, 32),
    "LuminaNextDiT2DModel": (8, 32),
    "PRXTransformer2DModel": (8, 32),
    "Transformer2DModel": (8, 32),
    "HunyuanImageTransformer2DModel": (8, 32),
    # Latent pixels, and half their resolution.
    "UNet2DConditionModel (SD 1.5)": (128, 32),
    "UNet2DConditionModel (SD 1.5 inpainting)": (128, 32),
    "UNet2DConditionModel (SDXL)": (128, 32),
    "UNet2DConditionModel (SDXL inpainting)": (128, 32),
    "UNet2DModel": (128, 32),
    # The patches of a frame, its latent pixels, and the patches of all frames.
    "WanTransformer3DModel": (8, 32, 16),
    "WanVACETransformer3DModel": (8, 32, 16),
    "ChronoEditTransformer3DModel": (8, 32, 16),
    "SkyReelsV2Transformer3DModel": (8, 32, 16),
    "HunyuanVideoTransformer3DModel": (8, 32, 16),
    "HunyuanVideo15Transformer3DModel": (32, 64),
    "MotifVideoTransformer3DModel": (8, 32, 16),
    "AllegroTransformer3DModel": (8, 32, 16),
    "SanaVideoTransformer3DModel": (8, 32, 16),
    "CosmosTransformer3DModel": (8, 32, 16),
    "JoyImageEditTransformer3DModel": (8, 32, 16),
    "LTXVideoTransformer3DModel": (32, 64),
}
"""Numbers of token weights that hold, by the case's name."""

EVEN_SIZES = {
    "AllegroTransformer3DModel",
    "AuraFlowTransformer2DModel",
    "CosmosTransformer3DModel",
    "LuminaNextDiT2DModel",
    "PRXTransformer2DModel",
}
"""Classes that take no latents whose sides do not divide by the patch's."""

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

CHECKPOINTING = {"yes": "yes", "none": "not available", "broken": "fails in diffusers"}
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
        "yes" if case.name in TOKENS else "not tested",
    )


def render() -> str:
    """Return the table as Markdown, with the list of classes that were not tried."""
    lines = [HEAD, tuple("---" for _ in HEAD), *(row(case) for case in CASES)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    missing = ", ".join(f"`{name}`" for name in sorted(NOT_TRIED))
    return f"{rows}\n\nNot tested: {missing}.\n"


def write(page: Path = PAGE) -> None:
    """Write the table into the page, between its markers."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}{render()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write()
