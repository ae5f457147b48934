"""Figures of routing weights and expert specialization, drawn with matplotlib.

Functions take tensors, arrays or lists and return a `matplotlib.figure.Figure` at least 800 pixels
wide. They do not use `pyplot`, so that there is no global state and no figure to close. Save a
figure with `figure.savefig("weights.png")`, or log it with `SummaryWriter.add_figure`. Each expert
has the same color in all figures. matplotlib is imported on the first call; install it with
`pip install 'moe-lora[plots]'`.
"""

from moe_lora.plots.expert_usage import usage_over_training
from moe_lora.plots.figures import expert_colors
from moe_lora.plots.kinds import weights_by_kind
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
    "weights_by_kind",
    "weights_over_sigma",
]
