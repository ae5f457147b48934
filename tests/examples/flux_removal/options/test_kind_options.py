from __future__ import annotations

from pathlib import Path

import pytest

import train
from options.kind_options import read_kind_experts
from options.parsing import parse_options

DATA = ["--train_data_dir", "data"]
ROUTED = [*DATA, "--routing", "always"]
CONFIG = Path(train.__file__).parent / "configs" / "kinds.yaml"


def test_names_of_experts_set_their_number() -> None:
    found = parse_options([*DATA, "--expert_names", "a", "b"])
    assert (found.expert_names, found.num_experts) == (["a", "b"], 2)
    assert parse_options([*DATA, "--num_experts", "2", "--expert_names", "a", "b"]).num_experts == 2


def test_kinds_name_experts() -> None:
    assert read_kind_experts(["a=x_expert", "b"]) == {"a": "x_expert", "b": "b"}


def test_the_config_has_an_expert_for_each_kind_of_the_demonstration() -> None:
    import kinds

    found = parse_options([str(CONFIG), *DATA])
    assert found.routed
    assert tuple(found.expert_names) == kinds.KINDS
    assert read_kind_experts(found.kind_experts) == {kind: kind for kind in kinds.KINDS}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--expert_names", "a", "b", "--num_experts", "4"],
            "number of `expert_names`, 2, but got 4",
        ),
        (["--expert_names", "a", "b", "--adapter", "lora"], "mixture with `expert_names`"),
        (["--kind_hint", "focus"], "`kind_experts` together with `kind_hint`"),
        (["--hint_dropout", "0.5"], "`kind_experts` together with `hint_dropout`"),
        (["--kind_experts", "a="], "KIND=EXPERT or KIND, but got 'a='"),
        (["--kind_experts", "=b"], "KIND=EXPERT or KIND, but got '=b'"),
        (["--kind_experts", "a=b", "a=c"], "one expert for the kind 'a', but got two"),
        (["--kind_experts", "a"], "routed run with `kind_experts`"),
    ],
)
def test_options_that_could_not_be_honored_raise(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_options([*DATA, *flags])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--kind_experts", "a"], r"name experts of \['removal_expert', .* but got \['a'\]"),
        (
            ["--kind_experts", "a=removal_expert", "--task_hint", "removal_focus"],
            "either `task_hint` or `kind_experts`",
        ),
        (
            ["--kind_experts", "a=removal_expert", "--hint_dropout", "1"],
            r"`hint_dropout` to be in \[0, 1\), but got 1.0",
        ),
        (
            [
                *("--kind_experts", "a=removal_expert", "--max_train_steps", "1"),
                *("--train_data_dir", "shards:x"),
            ],
            "no data in shards",
        ),
    ],
)
def test_routed_options_that_could_not_be_honored_raise(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_options([*ROUTED, *flags])
