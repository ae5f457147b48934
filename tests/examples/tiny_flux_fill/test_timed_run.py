"""A timed run makes the step of the whole batch, and goes on where it stopped."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from timed_run import TimedRun


def make(path: Path, *, ema: float = 0.9, minutes: float = 1e9) -> TimedRun:
    torch.manual_seed(0)
    return TimedRun(nn.Linear(4, 3), path, lr=0.01, minutes=minutes, ema=ema, warmup=1)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_split_batch_makes_the_step_of_the_whole_one(tmp_path: Path) -> None:
    run = make(tmp_path / "a.safetensors")
    plain = nn.Linear(4, 3)
    plain.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for seed in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        whole = loss(plain, x)
        whole.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        got = run.step([partial(loss, run.model, part) for part in x.chunk(2)])
        assert got == pytest.approx(whole.item(), rel=1e-5)
    for ours, theirs in zip(run.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_averaged_weights_follow_the_formula(tmp_path: Path) -> None:
    run = make(tmp_path / "a.safetensors", ema=0.15)
    average = run.model.weight.detach().clone()
    for step in range(1, 4):
        run.step([partial(loss, run.model, torch.ones(2, 4))])
        decay = min(0.15, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * run.model.weight.detach()
    torch.testing.assert_close(run.averaged()["weight"], average)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    run = make(path)
    x = torch.arange(12.0).view(3, 4)
    for _ in range(2):
        run.step([partial(loss, run.model, x)])
    run.save()
    again = make(path)
    nn.init.zeros_(again.model.weight)
    again.resume()
    assert again.steps == 2
    assert again.elapsed == run.elapsed
    for each in (run, again):
        each.step([partial(loss, each.model, x)])
    torch.testing.assert_close(again.model.weight, run.model.weight, rtol=0, atol=0)
    torch.testing.assert_close(again.averaged()["weight"], run.averaged()["weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_rate_falls_with_the_time_that_is_used_up(tmp_path: Path) -> None:
    run = make(tmp_path / "a.safetensors", minutes=1.0)
    for elapsed, expected in ((0.0, 0.01), (30.0, 0.005), (60.0, 0.00001)):
        run.elapsed = elapsed
        run.step([partial(loss, run.model, torch.ones(1, 4))])
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=0.02)
    assert run.progress == 1.0
