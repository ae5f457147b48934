"""Train a model for a given number of minutes, with averaged weights and resumable state."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class TimedRun:
    """Hold what a training run of a given number of minutes needs to go on after a stop.

    The learning rate warms up over `warmup` steps and then follows a cosine over the *time*
    budget, so that a run ends on time with its rate at zero on any machine.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        *,
        lr: float,
        minutes: float,
        ema: float,
        warmup: int = 200,
        weight_decay: float = 0.0,
    ) -> None:
        self.model, self.path, self.lr, self.minutes, self.warmup = model, path, lr, minutes, warmup
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.decay, self.steps, self.elapsed = ema, 0, 0.0
        self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._clock: float | None = None
        self._threads = ThreadPoolExecutor()

    @property
    def progress(self) -> float:
        """Return the part of the time budget that is used up, in [0, 1]."""
        return min(1.0, self.elapsed / (60 * self.minutes))

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        """Make one optimizer step of the mean of `losses` and move the averaged weights along.

        Each loss, over its share of the batch, runs forward and backward in a thread of its own:
        on busy cores that wastes far less than the barriers of parallel operators.

        Returns:
            The mean loss.
        """
        for group in self.optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * self.progress)
            group["lr"] = self.lr * min(1.0, (self.steps + 1) / self.warmup) * max(cosine, 1e-3)
        results = list(self._threads.map(self._gradients, losses))
        parameters: list[Tensor] = list(self.model.parameters())
        for p, *parts in zip(parameters, *(gradients for _, gradients in results), strict=True):
            p.grad = torch.stack(parts).mean(0)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), parameters, 1 - decay)
        now = time.monotonic()
        self.elapsed += now - (self._clock or now)
        self._clock = now
        return sum(loss for loss, _ in results) / len(results)

    def _gradients(self, loss: Callable[[], Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        value = loss()
        return value.item(), torch.autograd.grad(value, list(self.model.parameters()))

    def save(self) -> None:
        """Write weights, averaged weights and optimizer state, atomically."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        for name, p in self.model.named_parameters():
            tensors[f"model.{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                tensors[f"{key}.{name}"] = value
        scratch = self.path.with_suffix(".part")
        meta = {"steps": str(self.steps), "elapsed": str(self.elapsed)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, scratch, metadata=meta)
        os.replace(scratch, self.path)

    def resume(self) -> None:
        """Take up the run where `save` left it."""
        with safe_open(self.path, "pt") as file:
            meta = file.metadata()
            self.steps, self.elapsed = int(meta["steps"]), float(meta["elapsed"])
            for name, p in self.model.named_parameters():
                p.data.copy_(file.get_tensor(f"model.{name}"))
                self.ema[name].copy_(file.get_tensor(f"ema.{name}"))
                self.optimizer.state[p] = {
                    key: file.get_tensor(f"{key}.{name}")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self._clock = None

    def averaged(self) -> dict[str, Tensor]:
        """Return the state dict of the averaged weights."""
        return self.model.state_dict() | self.ema
