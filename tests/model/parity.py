"""Helpers of the parity tests: random weights that make mistakes visible, and distances."""

import torch


def randomise(network, quiet=False):
    """Fill a network of transformers: weights of a trained size, norms away from their defaults.

    quiet: 25 times smaller, so that every norm sees a tiny variance and its eps shows.
    """
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            if "norm" in name or "layrnorm" in name:
                parameter.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
            else:
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "embedding" not in name else 0.5
                parameter.copy_(noise * scale / (25 if quiet else 1))
    return network.eval()


def disturb(network, scale=1.0):
    """Freeze a network of diffusers: norms and biases off their defaults, the other weights times `scale`."""
    for name, parameter in network.eval().requires_grad_(False).named_parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn_like(parameter)
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter *= 4  # else attention is nearly uniform, and the number of heads hardly shows
        elif "norm" not in name:
            parameter *= scale
    return network


def relative(ours, theirs):
    """The largest difference, relative to the largest expected value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def untrained(network):
    """The parameters that backward() gave no gradient, or one that is not finite or zero everywhere."""
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {name for name, grad in grads.items() if grad is None or not grad.isfinite().all() or not grad.any()}
