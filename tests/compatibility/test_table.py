"""Every switch, in every order in which the mixture and two plain LoRAs came into the model."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import diffusers
import peft.functional
import pytest
from compatibility.page import PAGE, written_into
from compatibility.situations import SITUATIONS
from compatibility.stage import ORDERS, Stage
from compatibility.table import CASES
from peft.tuners.tuners_utils import BaseTuner
from tiny_models import flux_inputs, tiny_flux


@pytest.fixture(scope="module", params=ORDERS, ids="-".join)
def stage(request) -> Stage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Stage(tiny_flux, flux_inputs(), request.param)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.library} {case.switch}")
def test_switch(stage, case):
    case.show(stage)


def test_switches_are_listed_once():
    names = [(case.library, case.switch) for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case.note for case in CASES if case.works != "yes")


def test_every_public_switch_of_peft_is_listed():
    shown = " ".join(case.switch for case in CASES if case.library == "PEFT")
    no_switch = {"forward", "get_model_config", "inject_adapter"}
    public = {name for name in vars(BaseTuner) if not name.startswith("_")} - no_switch
    switches = {name for name in public if callable(getattr(BaseTuner, name))}
    assert {name for name in {*switches, *peft.functional.__all__} if name not in shown} == set()


@pytest.mark.parametrize(
    ("mixin", "prefix"),
    [
        (diffusers.loaders.PeftAdapterMixin, "model."),
        (diffusers.loaders.lora_base.LoraBaseMixin, "pipe."),
    ],
)
def test_every_public_switch_of_diffusers_is_listed(mixin, prefix):
    shown = " ".join(case.switch for case in CASES if case.switch.startswith(prefix))
    other = {
        "num_fused_loras",
        "fused_loras",
        "pack_weights",
        "write_lora_layers",
        "lora_state_dict",
    }
    public = {n for n in vars(mixin) if not n.startswith("_")} - other
    assert {name for name in public if callable(getattr(mixin, name)) and name not in shown} <= {
        "enable_lora_hotswap" if prefix == "model." else "",
    }


TESTS = Path(__file__).parents[1]


def test_the_page_holds_what_the_tables_say():
    page = PAGE.read_text(encoding="utf-8")
    assert written_into(page) == page, "run `python -m compatibility.page` in tests/"


@pytest.mark.parametrize(
    "test", sorted({s.test for group in SITUATIONS.values() for s in group}), ids=str
)
def test_what_a_situation_names_is_a_test(test):
    file, _, name = test.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert name.startswith("test_")
    assert name in functions


def test_situations_that_do_not_simply_work_say_why():
    situations = [situation for group in SITUATIONS.values() for situation in group]
    assert len({situation.what for situation in situations}) == len(situations)
    assert all(situation.note for situation in situations if situation.works != "yes")
