"""Compare ways to serve several kinds of removal with one model.

The kinds (objects with a shadow, lamps with their light, objects with a reflection; with `--kinds`
also text and stains) need different changes outside the mask. Plain LoRAs are trained for each kind
apart, merged, and composed as experts; adapters are trained for all kinds together; and adapters
for one kind learn the next.

python benchmarks/removal_kinds.py --seeds 1 2 3 --others PHOTOGRAPHS --router_photographs MORE
python benchmarks/removal_kinds.py --report               writes OUT/report.md and OUT/kinds.json

Every finished row of a seed is kept, so that the whole can be stopped and started again; seeds can
be run by processes of their own. `docs/reference/kinds_benchmark.md` describes the rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "flux_removal"))

from kinds_report import write_report
from kinds_scenes import Scenes, kept
from kinds_training import Judge, accuracy, fit, fit_router, weights_by_kind

import moe_lora
import train
from moe_lora import MoELoraConfig
from moe_lora.routing import SurroundingsRouter
from moe_lora.routing.routers.gating import RoutingStrategy

MASK_KINDS = ("blob", "stroke", "box")
"""In the order of `kind_scenes.py`."""

DEFAULTS = train.parse_options(["--train_data_dir", "unused"])
TARGETS = list(DEFAULTS.target_modules)
MERGES = (
    *("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd"),
    *("dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"),
)
LARGE_WEIGHT = 0.6
"""Of each merged LoRA, beside one divided by their number."""
SEEDS = {"train": 11, "test": 12, "others": 13, "router": 14}
SUPERVISION = 0.1
SPECIALISTS = ("composed, learned, many photographs", "joint, learned")
"""Rows whose experts are also left out one at a time."""


class Bench:
    """Train and measure the rows of a seed.

    Args:
        args: the command line.
        seed: of training; scenes are the same for all seeds.
    """

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.kinds: tuple[str, ...] = MASK_KINDS if args.by_mask else tuple(args.kinds)
        self.folder = args.out / f"seed-{seed}"
        self.judge = Judge(args.flux_fill_id, steps=args.denoising_steps)

    def scenes(self, name: str, count: int, *flags: str) -> Scenes:
        """Return scenes of the kinds by their name, drawn once for all seeds."""
        path = self.args.out / "scenes" / f"{name}.safetensors"
        drawn = ["shadow", "--label", "mask_kind"] if self.args.by_mask else self.kinds
        given = ["--count", str(count), "--kinds", *drawn, "--seed", str(SEEDS[name]), *flags]
        return kept(path, self.judge.pipe.vae, given)

    @cached_property
    def train(self) -> Scenes:
        """Return the scenes to train on."""
        return self.scenes("train", self.args.train_scenes, "--split", "train")

    @cached_property
    def router_scenes(self) -> dict[str, Scenes]:
        """Return the scenes that routers learn from, by name."""
        args, found = self.args, {"": self.train, ", 60 scenes": self.train.first(60)}
        if args.router_photographs:
            folder = str(args.router_photographs)
            found[", many photographs"] = self.scenes(
                "router", args.router_scenes, "--photographs", folder
            )
        return found

    @cached_property
    def tests(self) -> dict[str, Scenes]:
        """Return the scenes to measure on, by name."""
        args, found = self.args, {"test": self.scenes("test", self.args.scenes, "--split", "test")}
        if args.others:
            folder = str(args.others)
            found["others"] = self.scenes("others", args.other_scenes, "--photographs", folder)
        return found

    def plain(
        self,
        r: int,
        *,
        name: str,
        scenes: Scenes,
        parts: int = 1,
        told: bool = False,
        start: str | None = None,
    ) -> PeftModel:
        """Return PEFT's LoRA of rank `r`, trained once and then read from its folder.

        Args:
            r: the rank.
            name: of its folder.
            scenes: to train on.
            parts: the number of steps, in those of one kind.
            told: whether the prompt tells the kind.
            start: the folder of a LoRA to go on from.
        """
        folder = self.folder / "loras" / name
        if not folder.exists():
            torch.manual_seed(self.seed)
            base = self.judge.transformer()
            config = LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS)
            before = self.folder / "loras" / str(start)
            model = (
                get_peft_model(base, config)
                if start is None
                else PeftModel.from_pretrained(base, before, is_trainable=True)
            )
            self.fit(model, scenes, parts, told=told)
            model.save_pretrained(folder)
        return PeftModel.from_pretrained(self.judge.transformer(), folder).eval()

    def fit(self, model: nn.Module, scenes: Scenes, parts: int, **settings: Any) -> None:
        fit(
            model.train(),
            scenes,
            steps=parts * self.args.steps,
            seed=self.seed,
            learning_rate=self.args.learning_rate,
            **settings,
        )
        model.eval()

    def single(self, kind: str) -> PeftModel:
        """Return the LoRA that was trained for one kind."""
        return self.plain(
            self.args.r, name=kind, scenes=self.train.of_kinds([self.kinds.index(kind)])
        )

    def composed(self, count: int | None = None, router: str = "uniform") -> nn.Module:
        """Return a mixture of the LoRAs of the first kinds, or of all."""
        for kind in self.kinds[:count]:
            self.single(kind)
        files = {kind: str(self.folder / "loras" / kind) for kind in self.kinds[:count]}
        torch.manual_seed(self.seed)
        model = self.judge.transformer()
        moe_lora.from_loras(files, model, router=router)
        return model.eval()

    def learned(
        self, scenes: Scenes, count: int | None = None, strategy: RoutingStrategy = "soft"
    ) -> nn.Module:
        """Return a mixture of the LoRAs of the first kinds, or of all, with a learned router."""
        model = self.composed(count, "surroundings")
        known = scenes.of_kinds(list(range(count or len(self.kinds))))
        router = router_of(model)
        fit_router(router, known, steps=self.args.router_steps, seed=self.seed)
        router.configure(self.kinds[:count], strategy=strategy)
        return model

    def joint(self, *, router: str, hinted: bool, supervision: float = 0.0) -> nn.Module:
        """Return a mixture that is trained on all kinds together."""
        torch.manual_seed(self.seed)
        config = MoELoraConfig(
            r=self.args.r,
            lora_alpha=self.args.r,
            target_modules=TARGETS,
            expert_names=self.kinds,
            router=router,
        )
        model = get_peft_model(self.judge.transformer(), config)
        names = self.kinds if hinted else ()
        self.fit(model, self.train, len(self.kinds), names=names, supervision=supervision)
        return model

    def record(
        self,
        name: str,
        build: Callable[[], nn.Module],
        *,
        on: Sequence[str] = ("test", "others"),
        kinds: int | None = None,
        **settings: Any,
    ) -> None:
        """Build and measure a row, unless that is done or not asked for.

        Args:
            name: of the row.
            build: returns the adapted transformer.
            on: the scenes to measure on.
            kinds: how many of the kinds the router knows.
            settings: of `Judge.measure`.
        """
        path = self.folder / "rows" / f"{name}.json"
        if path.exists() or not re.search(self.args.rows, name):
            return
        start = time.monotonic()
        model = build()
        entry: dict[str, Any] = {"row": name, "seed": self.seed, "psnr": {}}
        for label, scenes in self.tests.items():
            if label in on:
                entry["psnr"][label] = self.judge.measure(model, scenes, self.kinds, **settings)
                if any(isinstance(module, SurroundingsRouter) for module in model.modules()):
                    known = scenes.of_kinds(list(range(kinds or len(self.kinds))))
                    right = accuracy(router_of(model), known)
                    entry.setdefault("accuracy", {})[label] = round(right, 4)
        if name in SPECIALISTS:
            found = self.judge.specialization(model, self.tests["test"], self.kinds)
            entry["specialization"] = found.as_dict()
            entry["weights"] = weights_by_kind(router_of(model), self.tests["test"], self.kinds)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
        effect = {label: means["mean"]["effect"] for label, means in entry["psnr"].items()}
        print(
            f"seed {self.seed}  {name}: effect {effect}, {time.monotonic() - start:.0f} s",
            flush=True,
        )

    def run(self) -> None:
        """Build and measure all rows."""
        r, every = self.args.r, len(self.kinds)
        self.record("base", self.judge.transformer)
        for kind in self.kinds:
            self.record(f"LoRA for {kind}", partial(self.single, kind), on=("test",))
        self.record("composed, hinted", self.composed, names=self.kinds)
        for name, scenes in self.router_scenes.items():
            self.record(f"composed, learned{name}", partial(self.learned, scenes))
            self.record(
                f"composed, learned, top-1{name}", partial(self.learned, scenes, strategy="hard")
            )
        self.merges()
        self.record(
            "plain", lambda: self.plain(r * every, name="plain", scenes=self.train, parts=every)
        )
        self.record(
            "plain, kind in the prompt",
            lambda: self.plain(r * every, name="told", scenes=self.train, parts=every, told=True),
            told=True,
        )
        self.record(
            "joint, hinted", lambda: self.joint(router="uniform", hinted=True), names=self.kinds
        )
        self.record(
            "joint, learned",
            lambda: self.joint(router="surroundings", hinted=True, supervision=SUPERVISION),
        )
        self.record(
            "plain, rank of one expert",
            lambda: self.plain(r, name="plain_small", scenes=self.train, parts=every),
        )
        self.growth()

    def merged(self, how: str, weight: float) -> PeftModel:
        """Return one of PEFT's merges of the LoRAs of all kinds."""
        model = self.single(self.kinds[0])
        for other in self.kinds[1:]:
            self.single(other)
            model.load_adapter(self.folder / "loras" / other, other)
        torch.manual_seed(self.seed)
        sparse = {} if how in ("linear", "cat", "svd") else {"density": 0.5}
        names = ["default", *self.kinds[1:]]
        model.add_weighted_adapter(names, [weight] * len(names), "merged", how, **sparse)
        model.set_adapter("merged")
        return model

    def merges(self) -> None:
        """Measure PEFT's merges on the test scenes, and the best of them on the others, too."""
        weights = (1 / len(self.kinds), LARGE_WEIGHT)
        every = [(how, weight) for how in MERGES for weight in weights]
        found = []
        for how, weight in every:
            name = f"merge {how}, {weight:.2f}"
            self.record(name, partial(self.merged, how, weight), on=("test",))
            row = self.folder / "rows" / f"{name}.json"
            if row.exists():
                entry = json.loads(row.read_text(encoding="utf-8"))
                found.append(entry["psnr"]["test"]["mean"]["effect"])
        if len(found) < len(every):
            return
        self.record("best merge", partial(self.merged, *every[found.index(max(found))]))

    def growth(self) -> None:
        """Let an adapter for shadows learn the other kinds, one after the other."""
        r = self.args.r
        self.single(self.kinds[0])
        for replay in (False, True):
            before = self.kinds[0]
            for count in (2, 3):
                name = f"plain, {count} kinds one by one" + (", replay" if replay else "")
                known = list(range(count)) if replay else [count - 1]
                scenes = self.train.of_kinds(known)
                grown = partial(self.plain, r, name=name, scenes=scenes, start=before)
                self.record(name, grown)
                before = name
        scenes = list(self.router_scenes.values())[-1]
        # There are no experts for the other kinds yet.
        names = (self.kinds[0], *[self.kinds[1]] * (len(self.kinds) - 1))
        self.record("composed, hinted, 2 kinds", lambda: self.composed(2), names=names)
        self.record("composed, learned, 2 kinds", lambda: self.learned(scenes, 2), kinds=2)


def router_of(model: nn.Module) -> SurroundingsRouter:
    return next(m for m in model.modules() if isinstance(m, SurroundingsRouter))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kinds", nargs="+", default=["shadow", "glow", "reflection"])
    add("--by_mask", action="store_true", help="shadows; the kinds are those of the masks")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--rows", default="", help="a regular expression: only rows whose names it finds")
    add("--steps", type=int, default=300, help="of training for one kind")
    add("--r", type=int, default=16, help="rank of an expert; the plain LoRA has it for each kind")
    add("--learning_rate", type=float, default=5e-3)
    add("--train_scenes", type=int, default=480)
    add("--scenes", type=int, default=72, help="test scenes")
    add("--others", type=Path, help="a folder of photographs to measure on, too")
    add("--other_scenes", type=int, default=186, help="scenes on the photographs of --others")
    add("--router_photographs", type=Path, help="a folder of photographs to teach a router with")
    add("--router_scenes", type=int, default=3000, help="scenes on these photographs")
    add("--router_steps", type=int, default=900)
    add("--denoising_steps", type=int, default=4)
    add(
        "--flux_fill_id",
        type=Path,
        default=Path(DEFAULTS.flux_fill_id),
        help="folder of the base model",
    )
    add("--out", type=Path, default=Path("outputs") / "kinds")
    add("--threads", type=int, help="of torch")
    add("--report", action="store_true", help="train nothing; write the report of what is done")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    args = build_parser().parse_args(arguments)
    if args.report:
        print(write_report(args.out))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    diffusers_logging.disable_progress_bar()
    for seed in args.seeds:
        Bench(args, seed).run()
    print(f"Now: python benchmarks/removal_kinds.py --report --out {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
