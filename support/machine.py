"""θ and θ₀ as functions, and the optimizer: precision, LoRA, gradient checkpointing, several processes, offloading.

The training loop calls `theta(latents, t, context)`, `theta_0(...)`, `optimizer.minimize(loss)`, `draw(...)` and
`place(batch)`, and sees none of these.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from model.lora import add_lora, lora_tensors, without_lora
from model.stable_diffusion import Denoiser, StableDiffusion
from model.unet import UNet
from support import ranks
from support.randomness import adapter_generator

Batch = TypeVar("Batch", bound=NamedTuple)


class Machine:
    """The trained network θ and the frozen θ₀ of one run, on one device.

    `base_unet` is sd.unet, θ₀. Without LoRA `unet`, θ, is a copy of it. With LoRA both are the same network, whose
    adapters are off for θ₀.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        trained: Callable[[UNet], Iterable[nn.Parameter]] = nn.Module.parameters,
        also_trained: Sequence[str] = (),
        *,
        batch: int = 1,
        lora_rank: int | None = None,
        checkpoint_gradients: bool = False,
        seed: int = 0,
        offloadable: Sequence[nn.Module] = (),
    ):
        """trained: returns the parameters of θ to train; LoRA trains its adapters instead. also_trained: parts of sd of
        which copies learn too, such as "text_encoder"; `free_base` puts them into sd. batch: pairs a step, of all
        processes together. seed: of LoRA's first weights. offloadable: networks that leave the device between
        validations.
        """
        self.sd, self.lora_rank, self.base_unet = sd, lora_rank, sd.unet
        self.part, self.weight = ranks.weighted_part(batch)
        if lora_rank:
            self.unet = sd.unet
            self.learned = add_lora(sd.unet, lora_rank, generator=adapter_generator(seed))
            self.parameters = [*self.learned.parameters()]
        else:
            self.unet = self.learned = copy.deepcopy(sd.unet)
            self.parameters = [*trained(self.unet)]
            # conv_in gets a gradient even if `trained` leaves it out: torch 2.13 crashes in a channels-last GroupNorm
            # whose weights are trained and whose input needs no gradient.
            for parameter in (*self.parameters, self.unet.conv_in.bias):
                parameter.requires_grad_(True)
        self.unet.train()
        self.also = {name: copy.deepcopy(getattr(sd, name)).requires_grad_(True).train() for name in also_trained}
        self.parameters += [parameter for network in self.also.values() for parameter in network.parameters()]
        cast_frozen_weights(self.base_unet, sd.precision)
        if checkpoint_gradients:
            self.unet.checkpoint_gradients()
        self.drawing_batch = sd.drawing_batch(reserve=8 * sum(each.numel() for each in self.parameters))
        self.offloadable, self.offloaded = offloadable, False

    def theta(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """θ's prediction, shaped as the latents (n, C, h, w); t (n,), context (n, 77, width)."""
        with self.sd.autocast():
            return self.unet(latents, t, context)

    @torch.no_grad()
    def theta_0(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """θ₀'s prediction, without gradient; shapes as for `theta`."""
        with self.sd.autocast(), without_lora(self.base_unet):
            return self.base_unet(latents, t, context)

    def free_base(self) -> None:
        """Free the memory of θ₀, for a loss that does not need it. `theta_0` cannot be called afterwards.

        `sd` then holds the other trained parts, such as the text encoder, instead of the base's.
        """
        self.base_unet = self.sd.unet = None
        for name, network in self.also.items():
            setattr(self.sd, name, network)

    def draw(
        self, unet: Denoiser, prompts: Sequence[str], seeds: Sequence[int], title: str, **options
    ) -> list[Image.Image]:
        """A picture of each prompt by `theta` or `theta_0`. Each process draws its part, and all get all pictures.

        options: steps, guidance and sampler.
        """
        self._offload(False)
        mine = ranks.part(len(prompts))
        prompts, seeds = prompts[mine], seeds[mine]
        quiet = ranks.rank() > 0
        with tqdm(total=len(seeds), desc=title, unit="image", leave=False, delay=0.1, disable=quiet) as bar:
            options |= {"batch_size": self.drawing_batch, "unet": unet, "on_batch": bar.update}
            return ranks.gather(self.sd.generate(prompts, seeds, **options))

    def place(self, batch: Batch) -> Batch:
        """This process's part of a batch, a NamedTuple of tensors (n, ...) or None, on the device."""
        self._offload(True)
        device = self.sd.device
        async_copy = device.type != "mps"  # an Apple GPU may read the batch after it is freed
        return type(batch)(*(None if x is None else x[self.part].to(device, non_blocking=async_copy) for x in batch))

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: θ, or its adapters; of another part that learns, "text_encoder." and its key."""
        tensors = dict(lora_tensors(self.unet) if self.lora_rank else self.unet.state_dict())
        for name, network in self.also.items():
            tensors |= network.state_dict(prefix=f"{name}.")
        return tensors

    def _offload(self, away: bool) -> None:
        if away != self.offloaded:
            for network in self.offloadable:
                network.to("cpu" if away else self.sd.device)
            self.offloaded = away


class Optimizer:
    """AdamW on the gradient averaged over all processes, with its norm clipped; a scaler guards fp16."""

    def __init__(self, machine: Machine, lr: float, weight_decay: float, clip_norm: float):
        device = machine.sd.device
        fused = device.type in ("cpu", "cuda")  # one pass over the weights instead of ten
        self.machine, self.clip_norm = machine, clip_norm
        self.adamw = torch.optim.AdamW(machine.parameters, lr=lr, weight_decay=weight_decay, fused=fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=machine.sd.precision == torch.float16)

    def minimize(self, loss: Tensor) -> Tensor:
        """Backward, clip, one step of AdamW; return the gradient's norm before it was clipped."""
        machine = self.machine
        self.scaler.scale(loss).backward()
        ranks.average_gradients(machine.parameters, machine.weight)
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(machine.parameters, self.clip_norm)
        self.scaler.step(self.adamw)  # skipped if fp16's gradients overflowed: then the scale is halved
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:  # from 2^16: 17 steps were skipped
            raise FloatingPointError("the gradient overflows fp16 in every step: try --precision fp32")
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def numbers(self, step: int, values: dict[str, Tensor | None]) -> dict[str, float | None]:
        """The mean of each tensor over all processes, in one transfer; None values are left out.

        With fp16 the gradient's norm may be None: that step was skipped. Raises FloatingPointError, naming the term,
        if the total loss or the gradient is not finite.
        """
        values = {name: value for name, value in values.items() if value is not None}
        means = torch.stack([value.float().mean() for value in values.values()]).tolist()
        row = ranks.mean(dict(zip(values, means, strict=True)), self.machine.weight)
        wrong = [name for name, value in row.items() if not math.isfinite(value)]
        if self.scaler.is_enabled() and wrong == ["gradient_norm"]:
            return row | {"gradient_norm": None}
        if "total" in wrong or "gradient_norm" in wrong:
            term = next((name for name in wrong if name != "total"), "total")
            advice = "try a smaller --lr" + (", or --precision fp32" if self.scaler.is_enabled() else "")
            raise FloatingPointError(f"the loss is {row['total']} at step {step} ({term} is {row[term]}): {advice}")
        return row

    def state(self) -> dict:
        """What --resume restores, by name: objects with state_dict() and load_state_dict()."""
        return {"unet": self.machine.learned} | self.machine.also | {"optimizer": self.adamw, "scaler": self.scaler}


def precision(name: str | None, device: torch.device) -> str:
    """The precision called `name`, or the device's own: bf16 on an NVIDIA GPU, fp16 on one too old for it, else fp32.

    Some CPUs are fast in bf16 too, but a result should not depend on the CPU.
    """
    if name is None and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return name or "fp32"


def cast_frozen_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen layers to the autocast dtype: the same results, half the memory.

    This covers linear layers and convolutions; autocast uses the norms' weights in fp32.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            for name, parameter in [*layer.named_parameters(recurse=False)]:
                if not parameter.requires_grad:  # a new parameter: another network may share the old one
                    setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def own_averages(optimizer: torch.optim.Optimizer) -> None:
    """Copy AdamW's averages, just loaded, to this device and layout: they may be mapped from a file of another one."""
    fused = optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        group["fused"] = fused
    for weight, averages in optimizer.state.items():
        averages["step"] = averages["step"].to(weight.device if fused else "cpu", copy=True)
        for name in ("exp_avg", "exp_avg_sq"):
            averages[name] = torch.empty_like(weight).copy_(averages[name])
