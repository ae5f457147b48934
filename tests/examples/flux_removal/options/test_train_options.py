from __future__ import annotations

from pathlib import Path

import pytest

from options import train_options as options
from options.parsing import parse_options
from options.train_options import TrainOptions

DATA = ["--train_data_dir", "data"]
EXAMPLES = Path(options.__file__).parents[2]
HELD = ["--validation_data_dir", "held_out"]
CONFIGS = [
    *sorted((EXAMPLES / "flux_removal" / "configs").glob("*.yaml")),
    EXAMPLES / "demo" / "demo.yaml",
]


def test_the_documented_defaults() -> None:
    found = parse_options(DATA)
    assert (found.use_lora, found.num_experts) == (True, 3)
    assert (found.lora_r, found.lora_alpha, found.lora_dropout) == (256, 256, 0.0)
    assert (found.routing_temperature, found.routing_strategy) == (1.0, "soft")
    assert (found.task_hint, found.top_k) == (None, None)
    assert (found.base_loss_weight, found.boundary_loss_weight) == (1.0, 0.3)
    assert (found.consistency_loss_weight, found.detail_loss_weight) == (0.5, 0.2)
    assert (found.enable_boundary_loss, found.enable_mask_info) == (False, False)
    assert (found.batch_size, found.learning_rate) == (2, 1e-4)
    assert found.checkpointing_steps == 500
    assert found.report_to == "tensorboard"


@pytest.mark.parametrize(
    ("flags", "on"),
    [
        (["--enable_mask_info"], True),
        (["--enable_mask_info", "True"], True),
        (["--enable_mask_info=false"], False),
        (["--enable_mask_info", "no"], False),
        ([], False),
    ],
)
def test_switches_read_false_as_false(flags: list[str], on: bool) -> None:
    assert parse_options([*DATA, *flags]).enable_mask_info is on


def test_a_switch_that_is_on_by_default_can_be_switched_off() -> None:
    assert parse_options([*DATA, "--use_lora", "False"]).use_lora is False
    assert parse_options([*DATA, "--no_use_lora"]).use_lora is False


@pytest.mark.parametrize(
    "flags",
    [
        ["--enable_mask_inf"],
        ["--lora_rank", "4"],
        ["stray"],
        ["--routing_strategy", "softest"],
        ["--weighting_scheme", "uniformly"],
        ["--mixed_precision", "bf17"],
        ["--enable_mask_info", "perhaps"],
        ["--lora_r", "many"],
    ],
)
def test_unknown_options_and_values_end_the_program(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options([*DATA, *flags])
    assert end.value.code == 2


def test_yaml_files_come_first_and_flags_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yml"
    first.write_text(
        "lora_r: 8\nlora_alpha: 16\ntarget_modules: [to_q, to_k]\nuse_lora: false\ntop_k: null\n"
    )
    second.write_text("lora_alpha: 4\nrouter_kwargs: {hidden_dim: 8}\n")
    found = parse_options([str(first), str(second), *DATA, "--lora_r", "2"])
    assert (found.lora_r, found.lora_alpha, found.use_lora) == (2, 4.0, False)
    assert found.target_modules == ["to_q", "to_k"]
    assert found.router_kwargs == '{"hidden_dim": 8}'


@pytest.mark.parametrize("text", ["lora_rank: 8", "lora_r: many", "enable_mask_info: perhaps"])
def test_yaml_files_are_checked_as_flags_are(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse_options([str(file), *DATA])


def test_a_yaml_file_that_is_no_mapping_raises(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("- lora_r\n")
    with pytest.raises(ValueError, match="option: value"):
        parse_options([str(file), *DATA])


@pytest.mark.parametrize("name", ["boundary", "consistency", "detail"])
def test_specialized_losses_need_mask_info(name: str) -> None:
    with pytest.raises(ValueError, match="--enable_mask_info"):
        parse_options([*DATA, f"--enable_{name}_loss"])
    assert parse_options([*DATA, f"--enable_{name}_loss", "--enable_mask_info"]).routed


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--detail_loss_weight", "0.5", "--enable_detail_loss", "no"], "--enable_detail_loss"),
        (["--no_enable_base_loss"], "at least one loss"),
        (["--uniform_steps", "5"], "uniform_steps"),
        (["--task_hint", "removal_focus"], "task_hint"),
        (["--load_balancing_weight", "0.1"], "load_balancing_weight"),
        (["--router_z_weight", "0.1"], "router_z_weight"),
        (["--router_learning_rate", "0.1"], "router_learning_rate"),
        (["--entropy_floor_weight", "0.1"], "`entropy_floor_weight`"),
        (["--expert_dropout", "0.1"], "`expert_dropout`"),
        (["--orthogonality_weight", "1", "--num_experts", "1"], "`orthogonality_weight`"),
        (["--orthogonality_weight", "1", "--adapter", "lora"], "`orthogonality_weight`"),
        (["--report_to", "paper"], "`report_to` to be one of aim, all, "),
        (["--hub_model_id", "me/it"], "--push_to_hub together with `hub_model_id`"),
        (["--hub_private"], "--push_to_hub together with `hub_private`"),
        (["--push_to_hub", "--hub_model_id", "a/b/c"], "`hub_model_id` to be NAME or ACCOUNT/NAME"),
        (["--validation_steps", "5"], "`validation_share` together with `validation_steps`"),
        (["--validation_metric", "loss"], "`validation_share` together with `validation_metric`"),
        (["--validation_share", "1"], r"`validation_share` to be in \[0, 1\), but got 1.0"),
        ([*HELD, "--validation_share", "0.1"], "one of `validation_data_dir` and"),
        ([*HELD, "--validation_steps", "0"], "`validation_steps` to be >= 1, but got 0"),
        ([*HELD, "--validation_samples", "0"], "`validation_samples` to be >= 1, but got 0"),
        ([*HELD, "--validation_denoising_steps", "0"], "`validation_denoising_steps` to be >= 1"),
        ([*HELD, "--validation_metric", "psnr"], "`validation_metric` to be one of loss, "),
        (
            ["--validation_share", "0.1", "--train_data_dir", "shards:d", "--max_train_steps", "1"],
            "`validation_data_dir` in place of `validation_share`",
        ),
        (["--entropy_floor", "0.3"], "`entropy_floor_weight` together"),
        (["--specialized_warmup_steps", "5"], "`specialized_warmup_steps`"),
        (["--router_phase", "alone"], "`router_phase_steps` together"),
        (["--router_phase_steps", "5"], "`router_phase_steps` together"),
        (
            ["--router_phase_steps", "5", "--router_phase", "alone"],
            "routed run with `router_phase`",
        ),
        (["--final_temperature", "0.5"], "`temperature_steps` together"),
        (["--temperature_steps", "5"], "`temperature_steps` together"),
        (["--temperature_course", "linear"], "`final_temperature` together"),
        (
            ["--final_temperature", "0.5", "--temperature_steps", "5"],
            "routed run with `final_temperature`",
        ),
        (["--router_kwargs", "[1]"], "JSON object"),
        (["--adapter", "lora", "--num_experts", "4"], "`num_experts` with `adapter` lora"),
        (["--adapter", "lora", "--router", "uniform"], "`router` with `adapter` lora"),
        (["--adapter", "lora", "--routing", "always"], "`routing` with `adapter` lora"),
        (["--adapter", "lora", "--no_use_lora"], "`use_lora` with `adapter` lora"),
        (["--routing", "always", "--num_experts", "1"], "`routing` always"),
        (["--routing", "never", "--no_use_lora"], "`routing` never"),
        (["--expert_signals"], "`expert_signals`"),
        (["--lr_warmup_steps", "5"], "constant_with_warmup"),
        (["--batch_size", "0"], "`batch_size` to be >= 1"),
        (["--logging_steps", "0"], "`logging_steps` to be >= 1"),
        (["--effect_band", "8"], "--enable_consistency_loss together with `effect_band`"),
        (["--window_margin", "0"], "detail loss with `window_margin`"),
        (["--specialized_every", "2"], "detail loss with `specialized_every`"),
        (["--mask_augmentation", "1.5"], r"`mask_augmentation` to be in \[0, 1\], but got 1.5"),
        (["--redux_scale", "0.5"], "--flux_redux_id together with `redux_scale`"),
        (["--redux_image", "cutout"], "--flux_redux_id together with `redux_image`"),
        (["--cache_dir", "cache"], "--cache_latents together with `cache_dir`"),
        (["--mask_augmentation", "0.5", "--cache_latents"], "no `cache_latents`"),
    ],
)
def test_options_that_could_not_be_honored_raise(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_options([*DATA, *flags])


@pytest.mark.parametrize(
    ("flags", "highest"),
    [
        (["--entropy_floor", "1.0"], "1.00"),
        (["--entropy_floor", "0.7", "--routing_strategy", "topk", "--top_k", "2"], "0.63"),
        (["--entropy_floor", "0.1", "--routing_strategy", "hard"], "0.00"),
    ],
)
def test_a_floor_that_weights_cannot_reach_raises(flags: list[str], highest: str) -> None:
    routed = ["--routing", "always", "--entropy_floor_weight", "1"]
    with pytest.raises(ValueError, match=rf"`entropy_floor` to be in \(0, {highest}\)"):
        parse_options([*DATA, *routed, *flags])


@pytest.mark.parametrize(
    ("flags", "without", "with_losses"),
    [
        ([], False, True),
        (["--routing", "always"], True, True),
        (["--routing", "never"], False, False),
        (["--adapter", "lora"], False, False),
        (["--num_experts", "1"], False, False),
    ],
)
def test_who_asks_the_router(flags: list[str], without: bool, with_losses: bool) -> None:
    assert parse_options([*DATA, *flags]).routed is without
    losses = ["--enable_detail_loss", "--enable_mask_info"]
    assert parse_options([*DATA, *flags, *losses]).routed is with_losses


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["to_q"], ["to_q"]),
        (["attn.to_q", "to_k"], ["attn.to_q", "to_k"]),
        (["all-linear"], "all-linear"),
        ([r".*\.to_[qk]"], r".*\.to_[qk]"),
    ],
)
def test_targets_are_names_a_rule_or_all(names: list[str], expected: list[str] | str) -> None:
    assert parse_options([*DATA, "--target_modules", *names]).targets == expected


@pytest.mark.parametrize(
    ("line", "enabled"),
    [
        ("--boundary_loss_weight=0.8 --detail_loss_weight=0.5", {"boundary", "detail"}),
        ("--consistency_loss_weight=0.8 --boundary_loss_weight=0.3", {"boundary", "consistency"}),
        ("--boundary_loss_weight 0.3 --enable_boundary_loss no --detail_loss_weight 1", {"detail"}),
        ("--enable_base_loss --base_loss_weight=1.0", set()),
    ],
)
def test_the_weight_of_a_loss_enables_it(line: str, enabled: set[str]) -> None:
    found = parse_options([*DATA, *line.split()])
    losses = ("boundary", "consistency", "detail")
    assert {name for name in losses if getattr(found, f"enable_{name}_loss")} == enabled
    assert found.enable_mask_info is bool(enabled)
    assert found.enable_base_loss


def test_a_weight_in_a_file_enables_its_loss(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("detail_loss_weight: 0.5\n")
    assert parse_options([str(file), *DATA]).routed


def test_logs_go_into_the_folder_of_the_run() -> None:
    assert parse_options([*DATA, "--output_dir", "mine"]).logging_dir == "mine/logs"
    assert parse_options([*DATA, "--logging_dir", "./logs"]).logging_dir == "./logs"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_valid(config: Path) -> None:
    assert isinstance(parse_options([str(config), *DATA]), TrainOptions)


def test_there_are_configs() -> None:
    names = {path.stem for path in CONFIGS}
    assert names == {"baseline", "demo", "kinds", "progressive", "routed"}


def test_every_option_has_a_help_text() -> None:
    for name, field in TrainOptions.__dataclass_fields__.items():
        assert field.metadata.get("help"), name
