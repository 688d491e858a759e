"""The loop that trains every network of weights/toy: AdamW, a running average of the weights, and resuming."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from toy import data


class EMA:
    """A running average of the weights, with a warm-up."""

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


def fit(
    name: str,
    network: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    lr: float,
    device: str,
    save: Callable[[dict[str, Tensor]], None],
    weight_decay: float = 0.01,
    minutes_between_saves: float = 4.0,
    fixed: Sequence[nn.Module] = (),
    seed: int = 0,
) -> None:
    """Train `network` with AdamW, warm-up and cosine decay, and an average of the weights; resumable until it is done.

    `loss_of(number)` draws its batch from a number that only `seed` and the step decide, and torch's noise comes of it
    too: a resumed run sees what an unbroken one would see, and a run that goes on from another's weights sees new
    batches if it has another seed. `fixed` names the modules inside `network` that are not trained.
    Raises ValueError if the run to resume had another seed.
    """
    network.to(device).train().requires_grad_(True)
    for module in fixed:
        module.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    ema, first, path = EMA(network), 0, data.CACHE / f"{name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")  # AdamW wants its step counts there
        if (other := state.get("seed", 0)) != seed:
            raise ValueError(f"{path} is of a run with --seed {other}: give the same one, or remove it")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        ema.average = {key: tensor.to(device) for key, tensor in state["ema"].items()}
        ema.count, first = state["count"], state["step"]

    def checkpoint(step: int) -> None:
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.average,
            "count": ema.count,
            "step": step,
            "seed": seed,
        }
        torch.save(state, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        save({key: tensor.cpu() for key, tensor in ema.average.items()})

    smooth: dict[str, float] = {}
    saved = time.time()
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5)
    for step in bar:
        number = (seed * 1_000_000 + step) % 2**63  # torch's largest seed
        torch.manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with data.autocast(device):
            loss, parts = loss_of(number)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(network)
        for key, value in parts.items():
            smooth[key] = value if key not in smooth else 0.98 * smooth[key] + 0.02 * value
        if step % 25 == 0:
            bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()})
        if time.time() - saved > 60 * minutes_between_saves:
            checkpoint(step + 1)
            saved = time.time()
    checkpoint(steps)
    path.unlink()  # done: the next command of this name begins anew, or with --go-on from weights/toy
