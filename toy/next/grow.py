"""A wider VAE with more latent channels that starts as a copy of a trained narrow one (Net2Net, arXiv 1511.05641).

A channel of the wider layer copies one of the narrow layer's; the layer after it takes the copies' mean. So the wider
network begins with almost the same function, and noise on its weights lets the copies part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.vae import VAE

NOISE = 0.1  # in standard deviations of a layer's weights


def copies(new: int, old: int) -> Tensor:
    """Which of the `old` channels each of the `new` ones copies; neighbours, so that GroupNorm's groups stay."""
    return torch.arange(new) * old // new


def widened(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A weight (out, in, ...) or bias (out) of more channels."""
    wide = tensor[copies(shape[0], tensor.shape[0])]
    if tensor.ndim > 1 and shape[1] != tensor.shape[1]:
        chosen = copies(shape[1], tensor.shape[1])
        times = torch.bincount(chosen)[chosen]
        wide = wide[:, chosen] / times.view(1, -1, *[1] * (tensor.ndim - 2))
    if wide.ndim > 1 and wide.shape != tensor.shape:
        wide = wide + NOISE * wide.std() * torch.randn_like(wide)
    return wide


@torch.no_grad()
def grow(vae: VAE, trained: VAE) -> None:
    """Start `vae` from `trained`, in place. Its further latent channels start small, and mean nothing yet."""
    old, new = trained.state_dict(), vae.state_dict()
    z, more = trained.config.latent_channels, vae.config.latent_channels
    rows = torch.tensor([*range(z), *range(more, more + z)])  # the old channels' means and log variances
    for name, target in new.items():
        if name == "encoder.conv_out.weight":
            target[rows] = widened(old[name], torch.Size((2 * z, *target.shape[1:])))
        elif name == "encoder.conv_out.bias":
            target.zero_()[more:] = -4  # a small variance: the decoder can read the new channels
            target[rows] = old[name]
        elif name == "decoder.conv_in.weight":
            target[:, :z] = widened(old[name], torch.Size((target.shape[0], *old[name].shape[1:])))
        elif name in ("quant_conv.weight", "post_quant_conv.weight"):
            chosen = rows if name.startswith("quant") else torch.arange(z)
            target.copy_(torch.eye(len(target))[:, :, None, None])
            target[chosen[:, None], chosen] = old[name]
        elif name in ("quant_conv.bias", "post_quant_conv.bias"):
            target.zero_()[rows if name.startswith("quant") else slice(z)] = old[name]
        else:
            target.copy_(widened(old[name], target.shape))
        if ".to_q." in name:  # copies count twice in q · k, against 1 / √width
            target.mul_((old[name].shape[0] / target.shape[0]) ** 0.5)
