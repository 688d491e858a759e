"""The adversary from which the VAE's decoder learns to draw lines, as Stable Diffusion's did (arXiv 2112.10752, 3.1).

Of an outline that may lie here or a pixel further, the picture with the least squared error is a smear over both. No
drawing looks like that, and a network that tells drawings from decoded pictures soon tells the decoder so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

FOOL, MATCH = 0.15, 0.4  # how strongly each pulls at a decoded picture, beside the error's pull


class Adversary(nn.Module):
    """Is it a drawing? Asked of every patch of 54 x 54 pixels (PatchGAN, arXiv 1611.07004), not of the whole."""

    def __init__(self, width: int = 32):
        super().__init__()
        ways = [(3, width, 4, 2), (width, 2 * width, 4, 2), (2 * width, 4 * width, 4, 2), (4 * width, 4 * width, 3, 1)]
        # spectral_norm (arXiv 1802.05957): its verdict cannot be a cliff
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, side, stride, padding=1)) for before, after, side, stride in ways
        )
        self.verdict = spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 3, H, W) in [-1, 1] -> verdicts (B, 1, H/8, W/8), above 0 for a drawing, and every layer's features."""
        features = []
        for layer in self.layers:
            images = F.leaky_relu(layer(images), 0.2)
            features.append(images)
        return self.verdict(images), features


def sharpened(error: Tensor, decoded: Tensor, drawings: Tensor, adversary: Adversary) -> tuple[Tensor, Tensor]:
    """What the decoder minimises, and what the adversary does: both 0-d, and neither's gradient reaches the other.

    error: 0-d, of `decoded` (B, 3, H, W), which the gradient must reach. To it come the verdict on the decoded pictures
    and the distance of their features from the drawings' (feature matching, arXiv 1711.11585); each is scaled to pull
    at the pictures FOOL or MATCH times as strongly as the error does (as in VQGAN, arXiv 2012.09841, eq. 7).
    The adversary's is the hinge loss.
    """
    adversary.requires_grad_(False)
    verdict, features = adversary(decoded)
    adversary.requires_grad_(True)
    on_drawings, wanted = adversary(drawings)
    on_decoded, _ = adversary(decoded.detach())

    def pull(term: Tensor) -> Tensor:
        return torch.autograd.grad(term, decoded, retain_graph=True)[0].norm()

    apart = [(a - b.detach()).abs().mean() / b.detach().abs().mean() for a, b in zip(features, wanted, strict=True)]
    loss = error
    for share, term in ((FOOL, -verdict.mean()), (MATCH, torch.stack(apart).mean())):
        loss = loss + share * pull(error) / pull(term).clamp(min=1e-8) * term
    return loss, F.relu(1 - on_drawings).mean() + F.relu(1 + on_decoded).mean()
