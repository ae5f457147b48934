"""State dicts in which a base layer's weight is found by its name in the base model, too."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

_AROUND = re.compile(r"(\.base_layer)+\.")


class AdaptedStateDict(OrderedDict[str, Tensor]):
    """Find `x.weight` where only `x.base_layer.base_layer.weight` is, as it is below two tuners.

    diffusers' loader of LoRAs for FLUX looks a layer's weight up by its name in the base model,
    and knows of one `base_layer` at most. Keys and pickles are those of the plain dict.
    """

    def __missing__(self, key: str) -> Tensor:
        names = vars(self).get("base_names")
        if names is None:
            names = {_AROUND.sub(".", name): name for name in self}
            self.base_names = names
        if key not in names:
            raise KeyError(key)
        return self[names[key]]

    def __reduce__(self) -> tuple[Any, ...]:
        metadata = {"_metadata": vars(self)["_metadata"]} if "_metadata" in vars(self) else None
        return OrderedDict, (), metadata, None, iter(self.items())


def find_by_base_name(
    module: nn.Module, state_dict: OrderedDict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> AdaptedStateDict | None:
    """Make a model's state dict an `AdaptedStateDict` (a state-dict hook of adapted models)."""
    if prefix:
        return None
    found = AdaptedStateDict(state_dict)
    vars(found).update(vars(state_dict))
    return found
