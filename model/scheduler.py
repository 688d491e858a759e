"""The noise schedule of Stable Diffusion: β, q(x_t|x_0), ε and v, and three samplers from noise to x_0.

A noise level is a number ᾱ in (0, 1]; x = √ᾱ x_0 + √(1-ᾱ) ε. Reads the public scheduler/scheduler_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.files.config import read_config

SAMPLERS = ("ddpm", "ddim", "dpm++")


@dataclass(frozen=True)
class SchedulerConfig:
    """The fields of scheduler_config.json that change a number; the defaults are Stable Diffusion 1.x's.

    `clip_sample`, which would clip x_0 to [-1, 1], is not read: latents reach ±4, and early 1.x files lack the key.
    Raises ValueError for a value that is not supported.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    num_train_timesteps: int = 1000
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None  # None: "linspace" for dpm++, "leading" for ddpm and ddim
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        supported = {"beta_schedule": ["scaled_linear"], "prediction_type": ["epsilon", "v_prediction"]}
        for name, values in (supported | {"rescale_betas_zero_snr": [False]}).items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name} is {value!r}, supported: {' or '.join(map(repr, values))}")


class Scheduler:
    """ᾱ_t for t = 0 .. num_train_timesteps - 1, and what follows from it.

    Every `t` is an int64 tensor: (B,), one for each sample, or 0-d. Coefficients are always fp32.
    """

    def __init__(self, config: SchedulerConfig = SchedulerConfig()):
        self.config = config
        start, end, count = config.beta_start, config.beta_end, config.num_train_timesteps
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32, device="cpu") ** 2  # √β is linear
        self.alphas_cumprod = (1 - betas).cumprod(0)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Scheduler:
        """Read folder/scheduler_config.json. Raises CheckpointError if it is missing or not supported."""
        return cls(read_config(SchedulerConfig, folder / "scheduler_config.json"))

    def _signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1-ᾱ_t) on `like`'s device, shaped (B or 1, 1, ...) to multiply it."""
        t = t.to(like.device).reshape(-1)  # indexing with a 0-d tensor would wait for the GPU
        a = self.alphas_cumprod.to(like.device, non_blocking=True)[t].reshape(-1, *[1] * (like.ndim - 1))
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t ~ q(x_t|x_0) = √ᾱ_t x_0 + √(1-ᾱ_t) ε (DDPM, arXiv 2006.11239, eq. 4), in x_0's shape."""
        signal, noise = self._signal_and_noise(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network predicts from x_t: ε, or v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (arXiv 2202.00512, section 4)."""
        if self.config.prediction_type == "epsilon":
            return eps
        signal, noise = self._signal_and_noise(t, x_0)
        return signal * eps - noise * x_0

    def to_x0_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `add_noise` given the network's prediction: (x_0, ε), both shaped as x_t, at least fp32."""
        signal, noise = self._signal_and_noise(t, x_t)
        if self.config.prediction_type == "epsilon":
            return (x_t - noise * prediction) / signal, prediction.to(signal.dtype)
        # arXiv 2202.00512, appendix D
        return signal * x_t - noise * prediction, signal * prediction + noise * x_t

    def timesteps(self, steps: int, sampler: str = "dpm++") -> list[int]:
        """The t at which the network is called, from noisy to clean, strictly falling.

        leading    multiples of T // steps, plus `steps_offset`: DDPM and DDIM in the SD releases.
        trailing   T, T - T/steps, ..., minus 1: starts at the noisiest t.
        linspace   evenly from T-1 down to 0.
        (Names of arXiv 2305.08891, table 2.) For leading and linspace, dpm++ takes one point more and drops the
        cleanest, since its last step goes to x_0 itself: for steps = T, T - 1 remain.
        """
        count = self.config.num_train_timesteps
        spacing = self.config.timestep_spacing or ("linspace" if sampler == "dpm++" else "leading")
        if spacing == "trailing":
            return [round((steps - i) * count / steps) - 1 for i in range(steps)]
        points = min(steps + 1, count) if sampler == "dpm++" else steps
        if spacing == "leading":
            stride = count // points
            offset = min(self.config.steps_offset, count - 1 - (points - 1) * stride)  # t = T does not exist
            times = [i * stride + offset for i in range(points)]
        else:
            gap = (count - 1) / max(points - 1, 1)
            times = [round(i * gap) for i in range(points)]
        return times[::-1][:-1] if sampler == "dpm++" else times[::-1]

    @torch.no_grad()
    def sample(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        latents: Tensor,
        steps: int,
        sampler: str = "dpm++",
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """From noise to data: `latents` (B, ...) ~ N(0, I), fp32, become x_0, in the same shape.

        denoise: (x_t, t) -> prediction, guidance included; t a 0-d int64 tensor on the latents' device. generators: one
        for each image, for ddpm, which alone draws noise. Raises ValueError for an unknown sampler, or steps not 1..T.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
        if not 1 <= steps <= self.config.num_train_timesteps:
            raise ValueError(f"steps must be between 1 and {self.config.num_train_timesteps}, not {steps}")
        x, before = latents, None  # before: x_0 and ᾱ of the previous step, for dpm++
        times = self.timesteps(steps, sampler)
        on_device = torch.tensor(times, device=x.device)  # one copy to the GPU, not one a step
        for t, a_t, a_s in zip(on_device, *self._levels(times, steps, sampler), strict=True):
            x_0, eps = self.to_x0_eps(denoise(x, t), x, t)
            if sampler == "ddpm":
                x = ddpm_step(x, x_0, a_t, a_s, randn(x.shape[1:], generators, x.device))
            elif sampler == "ddim":
                x = ddim_step(x_0, eps, a_s)
            else:
                x = dpm_step(x, x_0, a_t, a_s, before)
                before = x_0, a_t
        return x

    def _levels(self, times: list[int], steps: int, sampler: str) -> tuple[list[float], list[float]]:
        """For each step, its ᾱ_t and the ᾱ_s that the step goes to."""
        alphas, after, clean = self.alphas_cumprod.tolist(), [*times[1:], -1], 1.0  # -1: clean data
        if sampler == "ddim":  # in the SD releases a step goes to t - T // steps, and the last one to ᾱ_0
            after = [t - self.config.num_train_timesteps // steps for t in times]
            clean = 1.0 if self.config.set_alpha_to_one else alphas[0]
        return [alphas[t] for t in times], [alphas[s] if s >= 0 else clean for s in after]


def randn(shape: Sequence[int], generators: Sequence[torch.Generator], device) -> Tensor:
    """Normal noise (B, *shape), fp32, on `device`: row i from generators[i], drawn on that generator's device."""
    rows = [torch.randn(*shape, generator=generator, device=generator.device) for generator in generators]
    return torch.stack(rows).to(device)


def ddpm_step(x_t: Tensor, x_0: Tensor, a_t: float, a_s: float, z: Tensor) -> Tensor:
    """One ancestral step from ᾱ_t to the cleaner ᾱ_s: a draw from q(x_s|x_t, x_0) (DDPM, arXiv 2006.11239, eq. 6-7).

    With α = ᾱ_t/ᾱ_s and β = 1-α (a step may skip many t), and z ~ N(0, I):
    x_s = √ᾱ_s β/(1-ᾱ_t) x_0 + √α (1-ᾱ_s)/(1-ᾱ_t) x_t + σ z,   σ² = β (1-ᾱ_s)/(1-ᾱ_t)   ("fixed small" variance).
    """
    alpha = a_t / a_s
    beta = 1 - alpha
    mean = math.sqrt(a_s) * beta / (1 - a_t) * x_0 + math.sqrt(alpha) * (1 - a_s) / (1 - a_t) * x_t
    return mean + math.sqrt(beta * (1 - a_s) / (1 - a_t)) * z


def ddim_step(x_0: Tensor, eps: Tensor, a_s: float) -> Tensor:
    """x_s = √ᾱ_s x_0 + √(1-ᾱ_s) ε: one step along the same ε (DDIM, arXiv 2010.02502, eq. 12 with σ = 0)."""
    return math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s) * eps


def dpm_step(x_t: Tensor, x_0: Tensor, a_t: float, a_s: float, before: tuple[Tensor, float] | None) -> Tensor:
    """One step of DPM-Solver++(2M) from ᾱ_t to ᾱ_s (arXiv 2211.01095, algorithm 2).

    `before` is (x_0, ᾱ) of the previous step. With λ = log √(ᾱ/(1-ᾱ)), h = λ_s - λ_t and r = (λ_t - λ_before) / h:
    D = x_0 + (x_0 - x_0,before) / 2r,   x_s = √((1-ᾱ_s)/(1-ᾱ_t)) x_t - √ᾱ_s (e^-h - 1) D.
    The first step has no previous one, and the last ends at λ = ∞, where x_s = D: both are of first order, D = x_0.
    """
    h = _log_snr(a_s) - _log_snr(a_t)
    d = x_0
    if before is not None and h < math.inf:
        x_0_before, a_before = before
        r = (_log_snr(a_t) - _log_snr(a_before)) / h
        d = x_0 + (x_0 - x_0_before) / (2 * r)
    return math.sqrt((1 - a_s) / (1 - a_t)) * x_t - math.sqrt(a_s) * math.expm1(-h) * d


def _log_snr(a: float) -> float:
    """λ, half the log of the signal-to-noise ratio; infinite for clean data."""
    return 0.5 * math.log(a / (1 - a)) if a < 1 else math.inf
