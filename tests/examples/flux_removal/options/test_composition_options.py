from __future__ import annotations

from pathlib import Path

import pytest

from options.parsing import parse_options
from options.train_options import TrainOptions


def parse(folder: Path, *words: str, names: tuple[str, ...] = ("shadow", "glow")) -> TrainOptions:
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    pairs = [f"{name}={folder / name}" for name in names]
    return parse_options(["--train_data_dir", "data", "--compose", *pairs, *words])


def test_files_decide_the_experts_and_the_run_is_routed(tmp_path: Path) -> None:
    found = parse(tmp_path)
    assert found.lora_files == {name: str(tmp_path / name) for name in ("shadow", "glow")}
    assert (found.num_experts, found.router, found.routed) == (2, "mask_aware", True)
    assert not found.train_experts


def test_kinds_name_the_experts_of_the_files(tmp_path: Path) -> None:
    found = parse(tmp_path, "--kind_experts", "shadow", "lamp=glow")
    assert found.expert_names == ["shadow", "glow"]
    with pytest.raises(ValueError, match=r"\['shadow', 'glow'\], but got \['text'\]"):
        parse(tmp_path, "--kind_experts", "text")
    with pytest.raises(ValueError, match="those of `compose`"):
        parse(tmp_path, "--expert_names", "glow", "shadow")


def test_the_three_jobs_keep_their_router(tmp_path: Path) -> None:
    names = ("removal_expert", "background_expert", "completion_expert")
    assert parse(tmp_path, names=names).router == "three_expert_removal"


def test_another_router_can_be_named(tmp_path: Path) -> None:
    assert parse(tmp_path, "--router", "token_removal", names=("a", "b", "c")).router == (
        "token_removal"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_r", "4"], "`lora_r`"),
        (["--target_modules", "to_q"], "`target_modules`"),
        (["--num_experts", "4"], "`num_experts`"),
        (["--adapter", "lora"], "a mixture"),
        (["--use_lora", "false"], "a mixture"),
        (["--plan"], "`plan`"),
        (["--train_experts", "text"], r"out of \['shadow', 'glow'\]"),
        (["--routing", "never"], "`routing` never"),
        (["--uniform_steps", "5"], "`uniform_steps`"),
        (["--orthogonality_weight", "0.1"], "`orthogonality_weight`"),
        (["--router_phase", "alone", "--router_phase_steps", "5"], "`router_phase_steps`"),
    ],
)
def test_options_that_cannot_be_honored(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *words)


@pytest.mark.parametrize("words", [["--uniform_steps", "5"], ["--routing", "never"]])
def test_trained_experts_allow_more(tmp_path: Path, words: list[str]) -> None:
    assert parse(tmp_path, "--train_experts", "glow", *words).train_experts == ["glow"]


@pytest.mark.parametrize(
    ("pairs", "error"),
    [
        (["shadow"], ValueError),
        (["=here", "glow=here"], ValueError),
        (["glow=here", "glow=there"], ValueError),
        (["glow=here"], ValueError),
        (["glow=here", "shadow=nowhere"], FileNotFoundError),
    ],
)
def test_malformed_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[str], error: type[Exception]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(error, match="Expected"):
        parse_options(["--train_data_dir", "data", "--compose", *pairs])


def test_experts_to_train_need_files() -> None:
    with pytest.raises(ValueError, match="--compose"):
        parse_options(["--train_data_dir", "data", "--train_experts", "glow"])
