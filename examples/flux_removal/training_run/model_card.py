"""The model card of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flux_fill.models import HUB_ID
from options.train_options import TrainOptions
from options.yaml_files import given_options

CARD, SHEET = "README.md", "contact_sheet.png"

PRIVATE = ("output_dir", "logging_dir", "cache_dir", "resume_from_checkpoint", "plan")
"""Options that say where and how a run was started, which the card does not list."""

DEV_MODEL = re.compile(r"black-forest-labs/FLUX\.1-[\w-]+-dev")

TEXT = """# {title}

{kind} for `{base}`, trained with [moe_lora](https://github.com/moe-lora/moe-lora) to remove
objects from images. This is step {step} of {steps}.

## Use

```python
{load}
```

```python
{call}
```

The example `flux_removal` of moe_lora pads images of any size and keeps the source outside of the
mask: `python remove.py --image photo.png --mask mask.png --checkpoint {title}`.

## Training data

{data}

## Validation

{validation}

## Options

{options}
"""

CALL = """from diffusers.utils import load_image

image, mask = load_image("photo.png"), load_image("mask.png")  # white = remove
{prompt}
result = pipe(
    image=image,
    mask_image=mask,
    height=image.height,
    width=image.width,
    {given},
).images[0]"""


@dataclass(frozen=True)
class Validated:
    """Hold the results of a validation.

    Attributes:
        step: optimizer steps done.
        values: loss and metrics.
        sheet: the contact sheet.
        scenes: number of scenes.
    """

    step: int
    values: dict[str, float]
    sheet: Path
    scenes: int


class ModelCardWriter:
    """Write `README.md`, in the place of that of PEFT, and the last contact sheet beside it.

    Args:
        options: of the run.
        data: a sentence about the training data.
        total_steps: optimizer steps of the run.
        repository: where the checkpoint will be uploaded.
    """

    def __init__(
        self, options: TrainOptions, data: str, total_steps: int, repository: str | None = None
    ) -> None:
        self.options, self.data, self.total_steps = options, data, total_steps
        self.repository = repository
        self.validated: Validated | None = None

    def __call__(self, folder: Path, step: int) -> None:
        """Write the card of a checkpoint.

        Args:
            folder: with the model.
            step: optimizer steps done.
        """
        title = (self.repository or Path(self.options.output_dir).name).rpartition("/")[2]
        load, call = self.code()
        text = TEXT.format(
            title=title,
            kind=describe_model(self.options),
            base=self.base,
            step=step,
            steps=self.total_steps,
            load=load,
            call=call,
            data=self.data,
            validation=self.validation(),
            options=changed_options(self.options),
        )
        content = f"---\n{self.metadata(title).to_yaml()}\n---\n\n{text}"
        ModelCard(content).save(folder / CARD)
        if self.validated is not None:
            shutil.copyfile(self.validated.sheet, folder / SHEET)

    @property
    def base(self) -> str:
        """Return the hub id of the base model, or the name of its folder."""
        return hub_id(self.options.flux_fill_id) or Path(self.options.flux_fill_id).name

    def metadata(self, title: str) -> ModelCardData:
        """Return what the Hub reads."""
        options, base = self.options, hub_id(self.options.flux_fill_id)
        data = hub_id(options.train_data_dir.removeprefix("datasets:"))
        listed = options.train_data_dir.startswith("datasets:")
        tags = ["object-removal", "inpainting", "flux"]
        tags += ["lora"] if options.use_lora else []
        tags += ["moe-lora", "mixture-of-experts"] if options.mixed else []
        return ModelCardData(
            base_model=base,
            library_name="peft" if options.use_lora else "diffusers",
            pipeline_tag="image-to-image",
            tags=tags,
            datasets=[data] if listed and data else None,
            model_name=title,
            eval_results=self.evaluations() or None,
            **license_of(base, options.model_license),
        )

    def evaluations(self) -> list[EvalResult]:
        """Return the metrics of the last validation as the Hub reads them."""
        if self.validated is None:
            return []
        return [
            EvalResult(
                task_type="image-to-image",
                task_name="object removal",
                dataset_type="removal-triplets",
                dataset_name="held-out triplets",
                metric_type=name.partition("/")[0],
                metric_name=name,
                metric_value=round(value, 4),
            )
            for name, value in self.validated.values.items()
        ]

    def validation(self) -> str:
        """Return the section on the last validation."""
        found, options = self.validated, self.options
        if found is None:
            return "None."
        lines = [
            f"At step {found.step}, on {found.scenes} held-out scenes, with "
            f"{options.validation_denoising_steps} denoising steps; the source is kept outside of "
            "the mask. The loss is the flow-matching loss.",
            "",
            "| metric | mean |",
            "|---|---|",
            *(f"| {name} | {value:.4f} |" for name, value in found.values.items()),
            "",
            f"![removals]({SHEET})",
        ]
        return "\n".join(lines)

    def code(self) -> tuple[str, str]:
        """Return Python code that loads the checkpoint, and code that removes an object."""
        options = self.options
        folder = 'folder = "."  # of this file'
        imports = ["import torch", "from diffusers import FluxFillPipeline"]
        if self.repository:
            imports.append("from huggingface_hub import snapshot_download")
            folder = f'folder = snapshot_download("{self.repository}")'
        load = f'pipe = FluxFillPipeline.from_pretrained("{self.base}", dtype=torch.bfloat16)'
        if options.mixed:
            imports += ["", "import moe_lora"]
            steps = [folder, load, "moe_lora.load_adapter(pipe.transformer, folder)"]
        elif options.use_lora:
            imports.append("from peft import PeftModel")
            steps = [folder, load, "PeftModel.from_pretrained(pipe.transformer, folder)"]
        else:
            imports[1] = "from diffusers import FluxFillPipeline, FluxTransformer2DModel"
            read = 'FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")'
            steps = [folder, load, f"pipe.transformer = {read}.to(torch.bfloat16)"]
        device = 'pipe.to("cuda" if torch.cuda.is_available() else "cpu")'
        prompt, given = f"prompt = {options.prompt or ''!r}", "prompt=prompt"
        if options.flux_redux_id:
            redux = hub_id(options.flux_redux_id) or Path(options.flux_redux_id).name
            prompt = (
                "from diffusers import FluxPriorReduxPipeline\n\n"
                f'redux = FluxPriorReduxPipeline.from_pretrained("{redux}").to(pipe.device)\n'
                'prompt = redux(load_image("reference.png"))'
            )
            given = "**prompt"
        call = CALL.format(prompt=prompt, given=given)
        return "\n".join([*imports, "", *steps, device]), call


def hub_id(name: str) -> str | None:
    """Return a hub id, and None for a folder."""
    return name if HUB_ID.match(name) and not Path(name).exists() else None


def license_of(base: str | None, given: str | None) -> dict[str, Any]:
    """Return the license fields of the metadata.

    Args:
        base: hub id of the base model.
        given: `--model_license`.
    """
    if given is not None:
        return {"license": given}
    if base is not None and DEV_MODEL.fullmatch(base):
        return {
            "license": "other",
            "license_name": "flux-1-dev-non-commercial-license",
            "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE.md",
        }
    return {"license": "unknown"}


def describe_model(options: TrainOptions) -> str:
    """Return what was trained."""
    if not options.use_lora:
        return "Transformer"
    if not options.mixed:
        return f"LoRA of rank {options.lora_r}"
    router = f"with the router `{options.router}`" if options.routed else "with uniform weights"
    return f"Mixture of {options.num_experts} LoRA experts of rank {options.lora_r} {router}"


def changed_options(options: TrainOptions) -> str:
    """Return a table of the options that differ from their defaults.

    Folders are listed by their names.
    """
    rows, values = [], given_options(options)
    for field in dataclasses.fields(TrainOptions):
        value = values[field.name]
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        if field.name in PRIVATE or value == default:
            continue
        if isinstance(value, str) and Path(value).exists():
            value = Path(value).name
        shown = value if isinstance(value, str) else json.dumps(value)
        rows.append(f"| `{field.name}` | {_escaped(shown)} |")
    return "\n".join(["| option | value |", "|---|---|", *rows])


def _escaped(text: str) -> str:
    return re.sub(r"([|*_<>\\`])", r"\\\1", text).replace("\n", " ")
