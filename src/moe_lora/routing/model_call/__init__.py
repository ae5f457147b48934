"""One call of a model: arguments, latents, image tokens, mask, sample order, timestep.

`ModelCall.read(model, args, kwargs)` reads a call once. `ModelCall.router_inputs` returns the
inputs of a router; `routing.weights.fitting` fits routing weights to the call.
"""

from __future__ import annotations

from moe_lora.routing.model_call.call import ModelCall
from moe_lora.routing.model_call.mask_cache import MaskCache

__all__ = ["MaskCache", "ModelCall"]
