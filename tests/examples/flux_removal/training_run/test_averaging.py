from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from flux_fill.models import load_checkpoint, load_pipeline
from options.parsing import parse_options
from training_run.averaging import WeightAverage, averaged
from training_run.optimizers import create_optimizer

Arguments = Callable[..., list[str]]
WEIGHTS = "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.frozen = nn.Linear(3, 4), nn.Linear(2, 2).requires_grad_(False)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_the_weighted_sum_of_all_weights(decay: float) -> None:
    model = Net()
    average = WeightAverage(model, decay)
    values = [model.layer.weight.detach().double().clone()]
    for _ in range(6):
        with torch.no_grad():
            model.layer.weight.add_(torch.randn(4, 3))
        values.append(model.layer.weight.detach().double().clone())
        average.update()
    used = [min(decay, (1 + n) / (10 + n)) for n in range(6)]
    # The weight of value k: 1 − d of its own update, and the decays of all later ones.
    factors = [1.0] + [1 - d for d in used]
    shares = [f * torch.tensor(used[k:]).double().prod() for k, f in enumerate(factors)]
    assert sum(shares).item() == pytest.approx(1)
    expected = sum(share * value for share, value in zip(shares, values, strict=True))
    torch.testing.assert_close(average.weights[0].double(), expected, atol=1e-6, rtol=1e-6)
    assert len(average.weights) == 2  # of the trained layer alone


def test_the_average_is_in_the_model_while_the_context_is_open() -> None:
    model = Net()
    average = WeightAverage(model, 0.5)
    start, frozen = model.layer.weight.detach().clone(), model.frozen.weight.clone()
    with torch.no_grad():
        model.layer.weight.add_(1)
    trained = model.layer.weight.detach().clone()
    with averaged(sgd(model), average):
        assert torch.equal(model.layer.weight, start)
    assert torch.equal(model.layer.weight, trained)
    assert torch.equal(model.frozen.weight, frozen)
    with pytest.raises(KeyError), averaged(sgd(model), average):
        raise KeyError
    assert torch.equal(model.layer.weight, trained)
    assert torch.equal(average.weights[0], start)


def test_without_an_average_nothing_happens() -> None:
    model = Net()
    version = model.layer.weight._version
    with averaged(sgd(model), None):
        pass
    assert model.layer.weight._version == version


def test_a_schedule_free_optimizer_shows_its_average_and_goes_on_exactly() -> None:
    pytest.importorskip("schedulefree")
    models = [nn.Linear(16, 64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        create_optimizer("AdamWScheduleFree", [{"params": list(m.parameters())}], {"lr": 0.1}, 0.0)
        for m in models
    ]
    for x in torch.randn(3, 2, 16):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    looked_at, alone = models
    trained = looked_at.weight.detach().clone()
    with averaged(optimizers[0], None):
        optimizers[1].eval()  # type: ignore[attr-defined]
        assert torch.equal(looked_at.weight, alone.weight)
        optimizers[1].train()  # type: ignore[attr-defined]
        assert not torch.equal(looked_at.weight, alone.weight)
    assert torch.equal(looked_at.weight, trained)
    optimizers[0].step()  # raises unless the optimizer is in its training mode


def run(flags: list[str]) -> Path:
    return train.train(parse_options(flags))


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def everything(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("whole_model", [False, True], ids=["adapter", "whole transformer"])
def test_a_resumed_run_with_an_average_equals_the_uninterrupted_one(
    whole_model: bool, arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    kind: dict[str, Any] = {"use_lora": False} if whole_model else all_losses
    given = kind | {"ema_decay": 0.6}
    whole = run(arguments(**given, max_train_steps=5, output_dir=tmp_path / "whole"))
    run(arguments(**given, max_train_steps=3))
    resumed = run(arguments(**given, max_train_steps=5, resume_from_checkpoint="latest"))
    assert differing(everything(resumed), everything(whole)) == []
    states = [(f / "training_state" / "state.json").read_text() for f in (resumed, whole)]
    assert states[0] == states[1]
    assert '"average": {"updates": 5}' in states[0]


@pytest.mark.slow
def test_a_checkpoint_has_the_average_and_the_trained_weights(
    arguments: Arguments,
    all_losses: dict[str, Any],
    random_flux_fill: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = run(arguments(**all_losses, max_train_steps=3, output_dir=tmp_path / "plain"))
    options = parse_options(arguments(**all_losses, max_train_steps=3, ema_decay=0.6))
    monkeypatch.setattr(
        PeftModel, "__deepcopy__", lambda *_: pytest.fail("the model was copied"), raising=False
    )
    training = train.prepare(train.build_accelerator(options), options)
    folder = train.fit(training)
    trained = load_file(folder / "training_state" / "weights" / WEIGHTS)
    assert differing(trained, load_file(plain / WEIGHTS)) == []  # averaging changes no step
    changed = differing(load_file(folder / WEIGHTS), trained)
    assert any("experts" in name for name in changed)
    assert any("router" in name for name in changed)
    # What remove.py and evaluate.py load is the model inside of the context, its router included.
    pipe = load_pipeline(str(random_flux_fill))
    load_checkpoint(pipe, folder)
    batch = next(training.stream)
    latents = training.parts.encoder(batch)
    prompt_embeds, pooled = training.parts.conditioner.of_batch(batch)
    inputs = {
        "hidden_states": torch.cat([latents.x0, latents.condition], dim=-1),
        "timestep": torch.full((len(latents.x0),), 0.5),
        "guidance": None,
        "pooled_projections": pooled,
        "encoder_hidden_states": prompt_embeds,
        "txt_ids": prompt_embeds.new_zeros(prompt_embeds.shape[1], 3),
        "img_ids": latents.image_ids,
    }
    model = training.parts.model.eval()
    with torch.no_grad():
        before = model(**inputs)[0]
        with averaged(training.optimizer, training.average):
            torch.testing.assert_close(model(**inputs)[0], pipe.transformer(**inputs)[0])
        assert torch.equal(model(**inputs)[0], before)
        assert not torch.equal(pipe.transformer(**inputs)[0], before)


@pytest.mark.slow
def test_an_average_can_begin_and_end_when_a_run_resumes(
    arguments: Arguments, tmp_path: Path
) -> None:
    plain = run(arguments(max_train_steps=4, checkpointing_steps=2, output_dir=tmp_path / "plain"))
    early = plain.with_name("checkpoint-2")
    begun = run(arguments(max_train_steps=4, ema_decay=0.6, resume_from_checkpoint=early))
    trained = load_file(begun / "training_state" / "weights" / WEIGHTS)
    assert differing(trained, load_file(plain / WEIGHTS)) == []
    assert differing(trained, load_file(begun / WEIGHTS)) != []
    before = run(arguments(max_train_steps=2, ema_decay=0.6, output_dir=tmp_path / "average"))
    ended = run(
        arguments(max_train_steps=4, resume_from_checkpoint=before, output_dir=tmp_path / "ended")
    )
    assert differing(load_file(ended / WEIGHTS), load_file(plain / WEIGHTS)) == []
    assert not (ended / "training_state" / "weights").exists()
