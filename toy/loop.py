"""The loop that trains every network of weights/toy: AdamW, a running average of the weights, and resuming."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from toy.data import CACHE, autocast
from toy.networks import WEIGHTS

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]  # a batch's number -> the loss, and what the progress bar shows


@dataclass(frozen=True)
class Job:
    """What the command line says about one training."""

    steps: int
    batch: int
    device: str = "cpu"
    go_on: bool = False  # start from the weights in `weights`, not from random ones
    seed: int = 0
    weights: Path = WEIGHTS  # the folder that the networks are written to
    cache: Path = CACHE  # the folder of the drawings and of what resuming needs
    seconds_between_saves: float = 240.0


def initialized(job: Job, network: nn.Module, part: str) -> nn.Module:
    """The network itself, or, with --go-on, with the weights that the folder `part` of weights/toy has."""
    if job.go_on:
        network.load_state_dict(type(network).from_pretrained(job.weights / part).state_dict())
    return network


class EMA:
    """An exponential moving average of the weights, with a warm-up."""

    def __init__(self, network: nn.Module, decay: float = 0.999):
        self.decay, self.count = decay, 0
        self.average = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.count += 1
        keep = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - keep)
            else:
                self.average[name].copy_(tensor)


class Training:
    """A network, its optimizer and its average: what a step changes, and what resuming needs."""

    def __init__(
        self, job: Job, name: str, network: nn.Module, lr: float, weight_decay: float, fixed: Sequence[nn.Module]
    ):
        self.job, self.network, self.lr = job, network, lr
        self.path, self.done = job.cache / f"{name}.pt", 0
        network.to(job.device).train().requires_grad_(True)
        for module in fixed:
            module.requires_grad_(False)
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
        self.ema = EMA(network)

    def resume(self) -> None:
        """Load the state of an interrupted run, if there is one. Raises ValueError if it had another seed."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True, map_location="cpu")  # AdamW keeps its step counts there
        if (other := state.get("seed", 0)) != self.job.seed:
            raise ValueError(f"{self.path} is of a run with --seed {other}: give the same one, or remove the file")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.average = {name: tensor.to(self.job.device) for name, tensor in state["ema"].items()}
        self.ema.count, self.done = state["count"], state["step"]

    def save(self) -> None:
        """Write the state."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.average,
            "count": self.ema.count,
            "step": self.done,
            "seed": self.job.seed,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def step(self, loss_of: Loss) -> dict[str, float]:
        """One step of AdamW; the learning rate warms up for 5 % of the steps, then decays as a half cosine."""
        step, steps = self.done, self.job.steps
        number = (self.job.seed * 1_000_000 + step) % 2**63  # torch's largest seed
        torch.manual_seed(number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, step / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with autocast(self.job.device):
            loss, terms = loss_of(number)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.ema.update(self.network)
        self.done += 1
        return terms


def fit(
    job: Job,
    name: str,
    network: nn.Module,
    loss_of: Loss,
    save: Callable[[dict[str, Tensor]], None],
    lr: float,
    weight_decay: float = 0.01,
    fixed: Sequence[nn.Module] = (),
) -> None:
    """Train `network`, and give the averaged weights to `save` every few minutes and at the end.

    loss_of: takes the number of a batch, from which it draws the batch; torch's noise is seeded with it too. The number
    depends only on the seed and the step, so a resumed run sees the same batches, and another seed other batches.
    fixed: modules of `network` that are not trained. Raises ValueError if the run to resume had another seed.
    """
    training = Training(job, name, network, lr, weight_decay, fixed)
    training.resume()

    def checkpoint() -> None:
        training.save()
        save({key: tensor.cpu() for key, tensor in training.ema.average.items()})

    smooth: dict[str, float] = {}
    saved = time.time()
    bar = tqdm(range(training.done, job.steps), name, initial=training.done, total=job.steps, mininterval=5)
    for step in bar:
        for key, value in training.step(loss_of).items():
            smooth[key] = 0.98 * smooth.get(key, value) + 0.02 * value
        if step % 25 == 0:
            bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()})
        if time.time() - saved >= job.seconds_between_saves:
            checkpoint()
            saved = time.time()
    checkpoint()
    training.path.unlink()  # done: the next run of this name does not resume
