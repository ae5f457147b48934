"""A mixture of plain LoRA files, of which the router and some experts are trained."""

from __future__ import annotations

import json

from diffusers import FluxTransformer2DModel
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

import moe_lora
from options.train_options import TrainOptions


def compose_experts(transformer: FluxTransformer2DModel, options: TrainOptions) -> PeftModel:
    """Inject an expert for every LoRA of the options, and freeze those that are not trained."""
    moe_lora.from_loras(
        options.lora_files,
        transformer,
        autocast_adapter_dtype=True,
        lora_dropout=options.lora_dropout,
        router=options.router if options.routed else None,
        router_kwargs=json.loads(options.router_kwargs) if options.routed else {},
        routing_strategy=options.routing_strategy,
        routing_temperature=options.routing_temperature,
        top_k=options.top_k,
        expert_dropout=options.expert_dropout,
    )
    # Checkpoints are those of a PeftModel.
    config, tensors = transformer.peft_config["default"], get_peft_model_state_dict(transformer)
    transformer.unload_lora()
    model = get_peft_model(transformer, config)
    set_peft_model_state_dict(model, tensors)
    moe_lora.train_only(model, options.train_experts or [])
    return model
