"""Pictures of what router and experts do, as matplotlib figures.

Every function takes tensors, arrays or lists and returns a `matplotlib.figure.Figure` of 800 pixels
width or more that belongs to nobody: no `pyplot`, no global state, no window, nothing to close.
`figure.savefig("weights.png")` writes it, `SummaryWriter.add_figure` logs it, a notebook shows it.
An expert has the same color in all pictures. matplotlib is imported by the first call; the extra
`moe-lora[plots]` installs it.
"""

from moe_lora.plots.expert_usage import usage_over_training
from moe_lora.plots.figures import expert_colors
from moe_lora.plots.scatter import (
    weights_by_area,
    weights_by_edge_complexity,
    weights_over_sigma,
)
from moe_lora.plots.specialization import specialization_matrix
from moe_lora.plots.token_maps import token_weights

__all__ = [
    "expert_colors",
    "specialization_matrix",
    "token_weights",
    "usage_over_training",
    "weights_by_area",
    "weights_by_edge_complexity",
    "weights_over_sigma",
]
