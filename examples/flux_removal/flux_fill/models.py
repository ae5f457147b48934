"""Load a Flux Fill pipeline, put experts into it, and make its prompt embeddings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn

import moe_lora
from flux_fill.frozen_transformer import load_transformer
from options.mixture_options import MixtureOptions

DEFAULT_GUIDANCE = 30.0

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def check_source(name: str) -> None:
    """Raise unless a name is a folder with a pipeline, or could be a hub id.

    Raises:
        FileNotFoundError: for a folder that is missing or holds no pipeline.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"Expected a pipeline in {folder}, but it has no model_index.json."
            )
    elif not HUB_ID.match(name):
        raise FileNotFoundError(
            f"Expected a folder or a hub id such as black-forest-labs/FLUX.1-Fill-dev, but got "
            f"{name!r}, which is neither."
        )


def load_pipeline(
    flux_fill_id: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    transformer: bool = True,
) -> FluxFillPipeline:
    """Load the stock pipeline; transformer and VAE go to the device, frozen.

    Args:
        flux_fill_id: a folder or a hub id.
        dtype: of all weights.
        device: where to; text encoders stay on the CPU until they are needed.
        transformer: load it; otherwise the pipeline has one without weights, on the meta device,
            until `load_transformer`.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when the transformer is not that of Flux Fill.
    """
    check_source(flux_fill_id)
    config = FluxTransformer2DModel.load_config(flux_fill_id, subfolder="transformer")
    channels = config.get("in_channels")
    if channels != 384:
        raise ValueError(
            f"Expected the transformer of {flux_fill_id} to have 384 input channels, as Flux Fill "
            f"has, but got {channels}."
        )
    parts = FluxFillPipeline.load_config(flux_fill_id)
    absent = {name: None for name, (library, _) in named_parts(parts) if library is None}
    pipe: FluxFillPipeline = FluxFillPipeline.from_pretrained(
        flux_fill_id, dtype=dtype, **absent | {"transformer": None}
    )
    pipe.vae.requires_grad_(False).to(device)
    if transformer:
        load_transformer(pipe, flux_fill_id, dtype=dtype, device=device)
    else:
        with torch.device("meta"):
            pipe.register_modules(transformer=FluxTransformer2DModel.from_config(config))
    return pipe


def named_parts(config: dict[str, Any]) -> list[tuple[str, Sequence[str | None]]]:
    """Return the components of a model_index.json: names, and library and class of each."""
    return [(name, value) for name, value in config.items() if isinstance(value, list | tuple)]


def add_experts(
    transformer: FluxTransformer2DModel, options: MixtureOptions, *, routed: bool
) -> PeftModel:
    """Inject the experts and, for a routed run, the router.

    A run that never asks a router gets none, so that its checkpoint is used as it was trained: with
    uniform weights.
    """
    return get_peft_model(transformer, mixture_config(options, routed=routed))


def mixture_config(options: MixtureOptions, *, routed: bool) -> moe_lora.MoELoraConfig:
    """Return the configuration of the experts and, for a routed run, of the router."""
    return moe_lora.MoELoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        num_experts=options.num_experts,
        expert_names=tuple(options.expert_names) or None,
        target_modules=options.targets,
        router=options.router if routed else None,
        router_kwargs=json.loads(options.router_kwargs) if routed else {},
        routing_strategy=options.routing_strategy,
        routing_temperature=options.routing_temperature,
        top_k=options.top_k,
        expert_dropout=options.expert_dropout,
    )


def load_checkpoint(pipe: FluxFillPipeline, folder: Path) -> None:
    """Load a checkpoint of `train.py`, or a LoRA, into the pipeline's transformer, in place.

    Args:
        pipe: afterwards routes by itself, whatever calls it.
        folder: with an adapter, or with the whole transformer of a run without LoRA; or a LoRA file
            of a layout that diffusers loads.

    Raises:
        FileNotFoundError: when the folder is no checkpoint.
        ValueError: when the checkpoint has a whole transformer, and the pipeline's is quantized.
    """
    transformer = pipe.transformer
    if folder.is_file() and folder.suffix == ".safetensors":
        pipe.load_lora_weights(str(folder.parent), weight_name=folder.name)
        return
    if (folder / "adapter_config.json").is_file():
        PeftModel.from_pretrained(transformer, str(folder)).eval()
    elif (folder / "transformer" / "config.json").is_file():
        if getattr(transformer, "hf_quantizer", None) is not None:
            raise ValueError(
                f"Expected an adapter in {folder}, but got the whole transformer of a run without "
                "LoRA, which does not load into quantized weights. Leave out `base_precision`."
            )
        trained = FluxTransformer2DModel.from_pretrained(folder / "transformer")
        transformer.load_state_dict(trained.state_dict())
    else:
        found = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"Expected adapter_config.json or transformer/ in {folder}, but found {found}."
        )


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all routers in a model."""
    routers = [module for module in model.modules() if isinstance(module, moe_lora.Router)]
    return [parameter for router in routers for parameter in router.parameters()]


def guidance_for(
    transformer: FluxTransformer2DModel, guidance_scale: float | None, batch: int
) -> Tensor | None:
    """Return the guidance `(batch,)` that a model with guidance embeddings is called with.

    Raises:
        ValueError: for a scale that the model cannot read.
    """
    if not transformer.config.guidance_embeds:
        if guidance_scale is not None:
            raise ValueError(
                f"Expected no `guidance_scale`, but got {guidance_scale}: this transformer has no "
                "guidance embedding."
            )
        return None
    scale = DEFAULT_GUIDANCE if guidance_scale is None else guidance_scale
    return torch.full((batch,), scale, device=transformer.device, dtype=torch.float32)


def to_pil_images(images: Tensor) -> list[Image.Image]:
    """Turn images `(B, 3, H, W)` in [0, 1] into those of Pillow."""
    arrays = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def load_redux(redux_id: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the stock Redux pipeline."""
    from diffusers import FluxPriorReduxPipeline  # imports image processors that nothing else needs

    check_source(redux_id)
    return FluxPriorReduxPipeline.from_pretrained(redux_id, dtype=dtype).to(device)


class Conditioner:
    """Give the transformer's prompt embeddings: of Redux, of the text encoders, or zeros.

    A text is encoded once, and the encoders are dropped from the pipeline. The transformer's
    configuration is read, not its weights, which may be loaded afterwards.

    Args:
        pipe: the Fill pipeline.
        prompt: a text; "" where there are text encoders and none is given.
        redux_id: a folder or hub id; the reference images then are the prompt.
        redux_scale: multiplies the embeddings of Redux.
        captions: further texts, which samples have instead of the prompt; the embeddings of all are
            kept on the CPU.

    Raises:
        ValueError: for a prompt that nothing can read.
    """

    def __init__(
        self,
        pipe: FluxFillPipeline,
        *,
        prompt: str | None = None,
        redux_id: str | None = None,
        redux_scale: float = 1.0,
        captions: Sequence[str] = (),
    ) -> None:
        if prompt is not None and (redux_id is not None or pipe.text_encoder is None):
            reader = "Redux is the prompt" if redux_id else "the pipeline has no text encoders"
            raise ValueError(f"Expected no `prompt`, but got {prompt!r}: {reader}.")
        self.device, self.dtype = pipe.vae.device, pipe.vae.dtype
        self.texts: list[Tensor] = []
        self.redux_scale, self.resting = float(redux_scale), False
        self.redux = None if redux_id is None else load_redux(redux_id, self.dtype, self.device)
        if pipe.text_encoder is not None and redux_id is None:
            pipe.text_encoder.to(self.device)
            pipe.text_encoder_2.to(self.device)
            with torch.no_grad():
                texts = [
                    pipe.encode_prompt(text, prompt_2=None, device=self.device)[:2]
                    for text in (*captions, prompt or "")
                ]
            self.embeds, self.pooled = texts[-1]
            # The prompt comes last, where the index -1 finds it.
            self.texts = [torch.cat(parts).cpu() for parts in zip(*texts, strict=True)]
        else:
            config = pipe.transformer.config
            self.embeds = torch.zeros(1, 1, config.joint_attention_dim, device=self.device)
            self.pooled = torch.zeros(1, config.pooled_projection_dim, device=self.device)
        pipe.register_modules(
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
        )

    @property
    def by_sample(self) -> bool:
        """Return whether embeddings differ between samples, by reference or caption."""
        return self.redux is not None or (len(self.texts) > 0 and len(self.texts[0]) > 1)

    def weights(self) -> list[Tensor]:
        """Return tensors that change with whatever changes the embeddings of a sample."""
        if self.redux is None:
            # The prompt embeddings identify the encoders; captions have keys of their own.
            return [self.embeds, self.pooled] if self.by_sample else []
        parts = (self.redux.image_encoder, self.redux.image_embedder)
        values = [value for part in parts for value in part.state_dict().values()]
        return [torch.tensor(self.redux_scale), *values]

    def rest(self) -> None:
        """Keep Redux in CPU memory from now on, except while it encodes."""
        self.resting = True
        if self.redux is not None:
            self.redux.to("cpu")

    def of_batch(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the embeddings that a batch already has, or make them."""
        if "prompt_embeds" in batch:
            return batch["prompt_embeds"].to(self.dtype), batch["pooled_prompt_embeds"].to(
                self.dtype
            )
        return self(batch.get("ref", batch["src"]), batch.get("caption"))

    @torch.no_grad()
    def __call__(self, ref: Tensor, caption: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return prompt embeddings `(B, L, D)` and pooled ones `(B, P)`.

        Args:
            ref: `(B, 3, H, W)`, in [0, 1]; its content counts for Redux only.
            caption: `(B,)`, indices of captions, -1 for the prompt.
        """
        if self.texts and caption is not None:
            embeds, pooled = (texts[caption.cpu()].to(self.device) for texts in self.texts)
        elif self.redux is None:
            batch = ref.shape[0]
            embeds, pooled = self.embeds.expand(batch, -1, -1), self.pooled.expand(batch, -1)
        else:
            # Redux sums the embeddings of the images of one call, hence a call for each.
            scales = {
                "prompt_embeds_scale": self.redux_scale,
                "pooled_prompt_embeds_scale": self.redux_scale,
            }
            self.redux.to(self.device)
            images = to_pil_images(ref)
            found = [self.redux(image, **scales, return_dict=False) for image in images]
            embeds, pooled = (torch.cat(parts) for parts in zip(*found, strict=True))
            if self.resting:
                self.redux.to("cpu")
        return embeds.to(self.dtype), pooled.to(self.dtype)
