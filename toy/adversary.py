"""The adversary that teaches the VAE's decoder to draw sharp lines, as Stable Diffusion's (arXiv 2112.10752, 3.1).

Where an outline may be here or one pixel further, the picture with the least squared error is a blur over both. No
drawing is blurred, so a network that learns to tell drawings from decoded pictures penalizes the blur.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

FOOL, MATCH = 0.15, 0.4  # the gradient of each term at the decoded picture, relative to the error's gradient


class Adversary(nn.Module):
    """A discriminator: one verdict for each patch of 54 x 54 pixels (PatchGAN, arXiv 1611.07004)."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = [(3, width, 4, 2), (width, 2 * width, 4, 2), (2 * width, 4 * width, 4, 2), (4 * width, 4 * width, 3, 1)]
        # spectral_norm (arXiv 1802.05957) bounds the slope of the verdict
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, side, stride, padding=1)) for before, after, side, stride in sizes
        )
        self.verdict = spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 3, H, W) in [-1, 1] -> verdicts (B, 1, H/8, W/8), above 0 for a drawing, and the features of each layer.

        Each layer's features are (B, channels, height, width).
        """
        features = []
        for layer in self.layers:
            images = F.leaky_relu(layer(images), 0.2)
            features.append(images)
        return self.verdict(images), features


def sharpened(error: Tensor, decoded: Tensor, drawings: Tensor, adversary: Adversary) -> tuple[Tensor, Tensor]:
    """The decoder's loss and the adversary's, both 0-d. Neither sends a gradient to the other network.

    error: 0-d, computed from `decoded` (B, 3, H, W). The decoder's loss adds two terms to it: the verdict on the
    decoded pictures, and the distance between their features and the drawings' (feature matching, arXiv 1711.11585).
    Each is scaled so that its gradient at the pictures is FOOL or MATCH times as large as the error's (VQGAN, arXiv
    2012.09841, eq. 7). The adversary's loss is the hinge loss.
    """
    adversary.requires_grad_(False)
    verdict, features = adversary(decoded)
    adversary.requires_grad_(True)
    on_drawings, wanted = adversary(drawings)
    on_decoded, _ = adversary(decoded.detach())

    def slope(term: Tensor) -> Tensor:
        return torch.autograd.grad(term, decoded, retain_graph=True)[0].norm()

    apart = [(a - b.detach()).abs().mean() / b.detach().abs().mean() for a, b in zip(features, wanted, strict=True)]
    loss = error
    for share, term in ((FOOL, -verdict.mean()), (MATCH, torch.stack(apart).mean())):
        loss = loss + share * slope(error) / slope(term).clamp(min=1e-8) * term
    return loss, F.relu(1 - on_drawings).mean() + F.relu(1 + on_decoded).mean()
