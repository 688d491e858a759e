"""DreamBooth: learn the photos, and keep the class as it was (arXiv 2208.12242, section 3.3; CVPR 2023).

    python -m baselines dreambooth --subject data/dog --keep-last

The photos are trained under `a photo of [V] dog`. So that the class does not shrink to this one dog, the base model
first draws images of it, `a photo of a dog`, and θ learns these too: prior preservation. Photos and class images have
their own t and ε, as in public recipes.

The paper's loss measures x̂_0 - x_0 with a weight for each t; as usual for Stable Diffusion we measure ε (or v) without
one, as rpo.py does. Numbers: weight 1 and about 1,000 steps in the paper, 200 x N class images for N photos; public
recipes for Stable Diffusion say 200 to 300 images. (The section and the numbers are from the paper as others quote it.)

By default only the U-Net is trained, as in all we compare. RPO's Table 1 has a DreamBooth with 1,000 class images and
1,000 steps, and a trained text encoder, which the checkpoint then holds too:

    python -m baselines dreambooth --subject data/dog --train-text-encoder --class-images 1000 --steps 1000 --keep-last
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from support.randomness import NEGATIVES, step_generator
from support.settings import at_least_0, count, ours
from train import RPO, Settings, latents


@dataclass(frozen=True)
class DreamBoothSettings(Settings):
    prior_weight: float = ours(1.0, at_least_0, "weight of the class images' loss")
    class_images: int = ours(200, count, "class images that the base draws")
    train_text_encoder: bool = ours(False, None, "train the text encoder too, not only the U-Net")

    @property
    def also_trained(self) -> tuple[str, ...]:
        """See train.Settings."""
        return ("text_encoder",) if self.train_text_encoder else ()


class DreamBoothLoss(NamedTuple):
    """What `dreambooth_loss` returns: scalars, all with a gradient."""

    total: Tensor  # similarity + weight * prior, the value to minimise
    similarity: Tensor  # mean of ℓ(θ; x_ref)
    prior: Tensor  # mean of ℓ(θ; x_class), before the weight


def dreambooth_loss(ref: Tensor, prior: Tensor, prior_weight: float = 1.0) -> DreamBoothLoss:
    """ℓ(θ; x_ref) + w ℓ(θ; x_class), averaged over the batch.

    ref: (n,) denoising losses of photos, instance prompt. prior: (n,) of class images, class prompt.
    """
    similarity, prior = ref.mean(), prior.mean()
    return DreamBoothLoss(similarity + prior_weight * prior, similarity, prior)


class PriorBatch(NamedTuple):
    """n photos and n class images."""

    x_ref: Tensor  # (n, C, h, w) clean latents of the photo
    x_class: Tensor  # (n, C, h, w) clean latents of the class image
    eps_ref: Tensor  # (n, C, h, w)
    eps_class: Tensor  # (n, C, h, w)
    t_ref: Tensor  # (n,)
    t_class: Tensor  # (n,)
    c: Tensor  # (n, 77, width) "a photo of [V] dog"
    c_class: Tensor  # (n, 77, width) "a photo of a dog"
    photo: Tensor  # (n,) the photo's index
    p: None = None  # no labels
    label: None = None


class DreamBooth(RPO):
    """RPO's loop with class images in the place of the negatives, and DreamBooth's loss."""

    Settings = DreamBoothSettings
    result = "dreambooth.safetensors"

    def prepare(self) -> None:
        """Once: θ₀ draws the class images."""
        prompts = [self.subject.class_prompt] * self.settings.class_images
        self.encode(self.draw(prompts, self.theta_0, NEGATIVES, "drawing class images"), prompts)
        self.machine.free_base()

    def batch(self, step: int) -> PriorBatch:
        """Photo i and class image j, each with its own t and ε."""
        rng, n = step_generator(self.settings.seed, step), self.settings.batch
        i = torch.randint(len(self.photos), (n,), generator=rng)
        j = torch.randint(len(self.c_mod), (n,), generator=rng)
        x_ref, x_class = latents(self.photo_latents, i, rng), latents(self.generated_latents, j, rng)
        t_ref, t_class = torch.randint(len(self.sd.scheduler.alphas_cumprod), (2, n), generator=rng)
        eps_ref, eps_class = torch.randn(2, *x_ref.shape, generator=rng)
        return PriorBatch(
            x_ref, x_class, eps_ref, eps_class, t_ref, t_class, self.c.expand(n, -1, -1), self.c_mod[j], i
        )

    def both(self, batch: PriorBatch) -> tuple[Tensor, ...]:
        """x_0, eps, t and context of the photos and then the class images, (2n, ...) each.

        If the text encoder learns, it encodes both prompts anew, with gradient.
        """
        x_0, eps = torch.cat([batch.x_ref, batch.x_class]), torch.cat([batch.eps_ref, batch.eps_class])
        if self.settings.train_text_encoder:
            prompts = self.sd.tokenizer([self.subject.instance_prompt, self.subject.class_prompt])
            context = self.sd.text_encoder(prompts.to(self.sd.device)).repeat_interleave(len(batch.photo), 0)
        else:
            context = torch.cat([batch.c, batch.c_class])
        return x_0, eps, torch.cat([batch.t_ref, batch.t_class]), context

    def loss(self, batch: PriorBatch) -> DreamBoothLoss:
        """See `dreambooth_loss`."""
        ref, prior = self.error(self.theta, *self.both(batch)).chunk(2)
        return dreambooth_loss(ref, prior, self.settings.prior_weight)


METHOD = DreamBooth
