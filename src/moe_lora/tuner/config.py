"""The configuration of a mixture of LoRA experts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from moe_lora.routing.routers.gating import check_gate
from moe_lora.tuner.state_dict.stored import WEIGHTS_NAME, StoredWeights
from moe_lora.tuner.validation.config_fields import check_fields, is_integer
from moe_lora.tuner.validation.names import check_expert_names

FORMAT_VERSION = 1
"""The version of written checkpoints, and the highest version that can be read."""

DEFAULT_EXPERT_NAMES = ("removal_expert", "background_expert", "completion_expert")

# Fields without effect on the function that the weights compute: their origin, and training.
_EDITABLE_FIELDS = frozenset(
    (
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "expert_dropout",
        "init_lora_weights",
        "routing_mode",
        "base_in_channels",
        "format_version",
    )
)


class MoELoraType(str):
    """String with the interface of PEFT's closed `PeftType` enumeration.

    A string key works in all of PEFT's mappings; PEFT also reads `.value` in a few functions.
    """

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    __repr__ = __str__


PEFT_TYPE = MoELoraType("MOE_LORA")


@dataclass
class MoELoraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts.

    Without `router`, the routing weights are 1/E unless `moe_lora.route` or
    `moe_lora.attach_router` sets others.

    Raises:
        ValueError: if the value of a field is invalid, `num_experts` contradicts `expert_names`, or
            `top_k` contradicts `routing_strategy`.

    Example:
        >>> config = MoELoraConfig(target_modules=["to_q"], num_experts=2)
        >>> config.expert_names
        ('expert_0', 'expert_1')
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert; >= 1."})
    lora_alpha: float = field(
        default=8, metadata={"help": "The experts' output is scaled by lora_alpha / r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of the experts, in [0, 1)."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": 'Linear layers to adapt: name endings, a regex, or "all-linear".'},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to exclude: name endings or a regex."}
    )
    num_experts: int | None = field(
        default=None,
        metadata={"help": "Number of experts E; the number of expert_names by default, or 3."},
    )
    expert_names: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "Names of the experts in order; for three experts removal_expert, "
            "background_expert and completion_expert by default, else expert_0, expert_1, ..."
        },
    )
    router: str | None = field(
        default=None,
        metadata={"help": "Name of a registered router; without a router, weights are 1/E."},
    )
    router_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Arguments of the router's constructor."}
    )
    routing_strategy: Literal["soft", "hard", "topk"] = field(
        default="soft", metadata={"help": "From logits to weights: soft, hard or topk."}
    )
    routing_temperature: float = field(
        default=1.0, metadata={"help": "Divisor of the router's logits; > 0."}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Nonzero weights per row with topk, in [1, num_experts]."}
    )
    routing_mode: Literal["routed", "uniform"] = field(
        default="routed",
        metadata={"help": "Mode of a new or loaded model; set_routing_mode updates it."},
    )
    expert_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Probability of dropping each expert from a sample in training, never all "
            "experts at once; in [0, 1)."
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Scale by lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."},
    )
    init_lora_weights: bool | Literal["kaiming", "gaussian"] = field(
        default=True,
        metadata={
            "help": "lora_A: Kaiming uniform (True, kaiming) or Gaussian with a standard deviation "
            "of 1/r (gaussian); lora_B: zero, so that the adapted model equals the base model. "
            "False initializes lora_B at random, for tests."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of individual layers: name or regex to r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "lora_alpha of individual layers: name or regex to lora_alpha."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save as a whole."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; all blocks by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the block list that layers_to_transform indexes."}
    )

    base_in_channels: int | None = field(
        default=None,
        metadata={"help": "Input channels of the base model; set and checked by the injection."},
    )
    format_version: int = field(
        default=FORMAT_VERSION,
        metadata={"help": "Version of the checkpoint format; set by the library."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.stored: StoredWeights | None = None
        if is_integer(self.format_version, FORMAT_VERSION + 1):
            raise ValueError(
                f"Expected `format_version` to be at most {FORMAT_VERSION}, but got "
                f"{self.format_version!r}: the checkpoint was written by a newer moe_lora. Upgrade "
                "with `pip install -U moe-lora`."
            )
        check_fields({field.name: getattr(self, field.name) for field in fields(self)})
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "Expected `target_modules` to be a list when `layers_to_transform` is given, but "
                f"got {self.target_modules!r}."
            )
        self._resolve_experts()
        check_gate(self.routing_strategy, self.routing_temperature, self.top_k, len(self.experts))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read a config from a folder or the Hub.

        The config keeps the shapes of the weights in the same folder, so that its injection into an
        incompatible model fails before the model changes.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository on the Hub.
            subfolder: the folder inside it.
            kwargs: arguments of `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: for a config with invalid values or of a newer version, or for weights that
                are truncated or corrupt.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path, subfolder or "", WEIGHTS_NAME)
        if isinstance(config, MoELoraConfig) and weights.is_file():
            config.stored = StoredWeights.read(weights, config.weight_fields())
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, sets as sorted lists: equal configs write equal files."""
        fields: dict[str, Any] = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}

    @property
    def experts(self) -> tuple[str, ...]:
        """Return the expert names; never `None`, unlike the field `expert_names`."""
        assert self.expert_names is not None
        return self.expert_names

    def weight_fields(self) -> dict[str, Any]:
        """Return the fields that determine the function of a checkpoint's weights, by name.

        The other fields, such as `inference_mode`, may be edited in a checkpoint's file.
        """
        return {
            name: value for name, value in self.to_dict().items() if name not in _EDITABLE_FIELDS
        }

    def rank_of(self, path: str) -> int:
        """Return the rank of the experts in a layer.

        Args:
            path: the layer's path in the base model.
        """
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), path), self.r)

    def alpha_of(self, path: str) -> float:
        """Return the `lora_alpha` of the experts in a layer.

        Args:
            path: the layer's path in the base model.
        """
        return self.alpha_pattern.get(
            get_pattern_key(list(self.alpha_pattern), path), self.lora_alpha
        )

    def _resolve_experts(self) -> None:
        if self.expert_names is not None:
            names = tuple(self.expert_names)
        elif self.num_experts in (None, len(DEFAULT_EXPERT_NAMES)):
            names = DEFAULT_EXPERT_NAMES
        else:
            names = tuple(f"expert_{i}" for i in range(self.num_experts or 0))
        check_expert_names(names)
        if self.num_experts is not None and self.num_experts != len(names):
            raise ValueError(
                f"Expected `num_experts` to be the number of `expert_names` ({len(names)}), but "
                f"got {self.num_experts}."
            )
        self.expert_names, self.num_experts = names, len(names)
