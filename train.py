"""Fine-tune Stable Diffusion on one subject with Reward Preference Optimization (RPO, arXiv 2407.12164).

    python train.py --subject data/dog --steps 400                        # the embedded base, minutes on a laptop
    python train.py --subject my_dog --noun dog --base sd15               # public weights, see docs/real-weights.md
    python train.py --subject data/dog --resume                           # continue, with the same flags as before
    torchrun --standalone --nproc_per_node=4 train.py --subject my_dog --noun dog --base sd15 --batch 4   # on 4 GPUs

Writes best.safetensors (the U-Net of the best validation, in the public layout), best.jsonl (the history, a line a step
or validation) and best.png (the film strip); --ckpt moves all of them.
"""

from __future__ import annotations

from support import flags, memory, ranks, start  # first: Ctrl-C during the other imports is one line

# isort: split
import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from model.scheduler import SAMPLERS
from model.unet import UNet
from reward import MEANS, Reward
from rpo import RPOLoss, denoising_loss, preference_label, preference_probability, rpo_loss
from support.randomness import NEGATIVES, VALIDATION, picture_seeds, step_generator
from support.settings import at_least_0, count, fraction, guidance_scale, ours, paper, positive, release, seed_number
from support.start import Run

# ------------------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class Settings:
    """What RPO and the baselines share. Each default is the paper's, the authors' released code's, or ours."""

    steps: int = paper(400, count, "gradient steps")
    batch: int = release(1, count, "pairs a step")
    lr: float = paper(5e-6, positive, "learning rate of AdamW, constant; with LoRA 1e-4")
    images_per_prompt: int = paper(4, count, "negatives, and validation images, a prompt")
    validate_every: int = paper(40, count, "gradient steps between validations")
    lambda_val: float = paper(0.3, fraction, "λ of the validation's reward")
    mean: str = paper("harmonic", tuple(MEANS), "how ALIGN-I and ALIGN-T become a reward")
    guidance: float = release(7.5, guidance_scale, "classifier-free guidance when drawing")
    sampler: str = ours("dpm++", SAMPLERS, "how negatives and validation images are drawn; the release: ddim")
    solver_steps: int = ours(20, count, "steps of the sampler; the release: 50")
    resolution: int | None = ours(None, count, "side of all pictures in pixels (default: the base's; the paper: 512)")
    keep_last: bool = ours(False, None, "keep the last weights instead of the best: no early stopping")
    patience: int | None = ours(None, count, "stop after so many validations without a better reward (default: never)")
    seed: int = ours(0, seed_number, "fixes every random draw")

    pictures_a_pair: ClassVar[int] = 2  # in a pass of θ, for the memory's estimate
    also_trained: ClassVar[tuple[str, ...]] = ()  # parts of the base that learn besides the U-Net
    weight_decay: ClassVar[float] = 0.01  # the paper's
    clip_norm: ClassVar[float] = 1.0  # the paper's


@dataclass(frozen=True)
class RPOSettings(Settings):
    lambda_train: float = paper(0.0, fraction, "λ of the rewards that make the labels")
    beta: float = paper(1.0, positive, "β of the preference loss")
    similarity_weight: float = paper(1.0, at_least_0, "weight of the similarity loss; 0 for the paper's DPO variant")
    preference_weight: float = paper(1.0, at_least_0, "weight of the preference loss; 0 for the similarity loss alone")

    pictures_a_pair: ClassVar[int] = 3  # the photo under c and under c_mod, and the negative


# --------------------------------------------------------------------------------------------------------- the method


class Batch(NamedTuple):
    """n pairs of a photo and a negative. C is the number of latent channels: 4, in the embedded base 8."""

    x_ref: Tensor  # (n, C, h, w) clean latents of the photo
    x_gen: Tensor  # (n, C, h, w) clean latents of the negative
    eps_ref: Tensor  # (n, C, h, w) noise of the photo
    eps_gen: Tensor  # (n, C, h, w) noise of the negative
    t: Tensor  # (n,) one timestep a pair
    c: Tensor  # (n, 77, width) "a photo of [V] dog"
    c_mod: Tensor  # (n, 77, width) the prompt that drew the negative
    photo: Tensor  # (n,) the photo's index i
    negative: Tensor  # (n,) the negative's index j
    p: Tensor  # (n,) P(x_ref ≻ x_gen)
    label: Tensor  # (n,) the coin: 1 where the photo is preferred


class RPO:
    """One run of the method; read it from top to bottom."""

    Settings: type = RPOSettings
    result = "best.safetensors"  # the default of --ckpt

    def __init__(self, run: Run, reward: Reward):
        """run: what support/ has prepared: subject, photos, networks, optimizer, record, settings."""
        self.subject, self.photos, self.sd, self.settings = run.subject, run.photos, run.sd, run.settings
        self.machine, self.optimizer, self.record, self.reward = run.machine, run.optimizer, run.record, reward
        self.theta, self.theta_0 = run.machine.theta, run.machine.theta_0  # (latents, t, context) -> prediction
        self.prompts = [
            prompt for prompt in run.subject.training_prompts for _ in range(run.settings.images_per_prompt)
        ]

    @staticmethod
    def trained(unet: UNet) -> Iterable[nn.Parameter]:
        """The parameters of θ that are trained. (With --lora-rank its adapters are.)"""
        return unet.parameters()

    def prepare(self) -> None:
        """Once: θ₀ draws the negatives, the reward scores them and the photos, everything frozen is encoded."""
        negatives = self.draw(self.prompts, self.theta_0, NEGATIVES, "drawing negatives")
        self.r_gen = self.reward(negatives, self.prompts, self.settings.lambda_train).cpu()  # (negatives,)
        self.r_ref = self.reward.of_photos(self.prompts, self.settings.lambda_train).cpu()  # (photos, negatives)
        self.p = preference_probability(self.r_ref, self.r_gen)  # Eq. 6, (photos, negatives)
        self.encode(negatives, self.prompts)

    def encode(self, generated: list[Image.Image], prompts: list[str]) -> None:
        """Photos and θ₀'s pictures as posteriors (mean, std) of latents; c and each c_mod as text features."""
        encoded = self.sd.encode_images(self.photos), self.sd.encode_images(generated)
        # On the CPU, where batches are made.
        self.photo_latents, self.generated_latents = ([part.cpu() for part in pair] for pair in encoded)
        self.c = self.sd.encode_prompts([self.subject.instance_prompt]).cpu()
        self.c_mod = self.sd.encode_prompts(prompts).cpu()

    def batch(self, step: int) -> Batch:
        """Photo i, negative j, a coin for the label; one t for both, and each its own ε."""
        rng, n = step_generator(self.settings.seed, step), self.settings.batch
        i = torch.randint(len(self.photos), (n,), generator=rng)
        j = torch.randint(len(self.c_mod), (n,), generator=rng)
        p = self.p[i, j]
        label = preference_label(p, rng)
        x_ref, x_gen = latents(self.photo_latents, i, rng), latents(self.generated_latents, j, rng)
        t = torch.randint(len(self.sd.scheduler.alphas_cumprod), (n,), generator=rng)
        eps_ref, eps_gen = torch.randn(2, *x_ref.shape, generator=rng)
        return Batch(x_ref, x_gen, eps_ref, eps_gen, t, self.c.expand(n, -1, -1), self.c_mod[j], i, j, p, label)

    def loss(self, batch: Batch) -> RPOLoss:
        """Eq. 7 and 8."""
        settings = self.settings
        weights = settings.similarity_weight, settings.preference_weight
        return rpo_loss(*self.losses(batch), batch.label, settings.beta, *weights)

    def losses(self, batch: Batch) -> tuple[Tensor, ...]:
        """ℓ(θ; x_ref, c), ℓ(θ; x_ref, c_mod), ℓ(θ; x_gen, c_mod), ℓ(θ₀; x_ref, c_mod), ℓ(θ₀; x_gen, c_mod): (n,) each.

        One pass of each network. θ₀ runs first: θ's activations stay in memory until backward().
        """
        x_0 = torch.cat([batch.x_ref, batch.x_ref, batch.x_gen])
        eps = torch.cat([batch.eps_ref, batch.eps_ref, batch.eps_gen])
        context = torch.cat([batch.c, batch.c_mod, batch.c_mod])
        t, n = batch.t.repeat(3), len(batch.t)
        # θ₀ does not need the first n, which are L_sim's.
        base_ref, base_gen = self.error(self.theta_0, x_0[n:], eps[n:], t[n:], context[n:]).chunk(2)
        similarity, ref, gen = self.error(self.theta, x_0, eps, t, context).chunk(3)
        return similarity, ref, gen, base_ref, base_gen

    def error(self, unet: Callable, x_0: Tensor, eps: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """ℓ of a network, (m,): noise x_0 (m, C, h, w) with eps at t (m,), and predict under context (m, 77, width)."""
        scheduler = self.sd.scheduler
        x_t = scheduler.add_noise(x_0, eps, t)  # Eq. 1
        return denoising_loss(unet(x_t, t, context), scheduler.target(x_0, eps, t))

    def train(self) -> None:
        """Steps, and a validation every `validate_every` of them."""
        settings, record = self.settings, self.record
        if not record.history:
            self.validate(0)
        for step in record.steps():
            batch = self.machine.place(self.batch(step))
            loss = self.loss(batch)
            norm = self.optimizer.minimize(loss.total)  # backward, clip, AdamW
            record.step(step, loss, gradient_norm=norm, label=batch.label, p=batch.p)
            if step % settings.validate_every == 0 or step == settings.steps:
                self.validate(step)

    def validate(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw the training prompts from the same noise each time; the weights of the highest reward are kept.

        Returns ALIGN-I and ALIGN-T of each picture (toy.bench uses them).
        """
        images = self.draw(self.prompts, self.theta, VALIDATION, f"validating step {step}")
        align_i, align_t = self.reward.alignments(images, self.prompts)
        reward = self.reward.combine(align_i, align_t, self.settings.lambda_val)
        self.record.validation(step, images, align_i=align_i, align_t=align_t, reward=reward)
        return align_i, align_t

    def draw(self, prompts: list[str], unet: Callable, stream: int, title: str) -> list[Image.Image]:
        """One picture a prompt by θ or θ₀, from noise that --seed and the random stream fix."""
        settings = self.settings
        options = {"steps": settings.solver_steps, "guidance": settings.guidance, "sampler": settings.sampler}
        return self.machine.draw(unet, prompts, picture_seeds(settings.seed, stream, len(prompts)), title, **options)


def latents(posterior: tuple[Tensor, Tensor], index: Tensor, rng: torch.Generator) -> Tensor:
    """x_0 drawn from the posteriors (mean and standard deviation) of the pictures `index`."""
    mean, std = (part[index] for part in posterior)
    return mean + std * torch.randn(mean.shape, generator=rng)


# ------------------------------------------------------------------------------------------------------------ the run


def fine_tune(args: argparse.Namespace, method: type[RPO]) -> None:
    """One run, from the files to the kept checkpoint."""
    with start.prepared(args, method) as run:
        reward = Reward(run.align, run.bert, run.photos, run.subject.token, MEANS[run.settings.mean])
        training = method(run, reward)
        with run.record.session(args.resume):
            training.prepare()
            training.train()


def main(method: type[RPO] = RPO, description: str = __doc__) -> int:
    args = start.parse(method, description)
    return flags.guarded(lambda: fine_tune(args, method), lambda: memory.remedy(args))


if __name__ == "__main__":
    sys.exit(ranks.distributed(main))
