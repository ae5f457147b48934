"""What one call of a model says: arguments, latents, image tokens, mask, sample order, timestep.

`ModelCall.read(model, args, kwargs)` reads a call once. A router's inputs are made of it
(`router_inputs`), and weights are fitted to it (`fit`, `place_tokens`).
"""

from __future__ import annotations

from moe_lora.routing.model_call.call import ModelCall
from moe_lora.routing.model_call.mask_memory import MaskMemory

__all__ = ["MaskMemory", "ModelCall"]
