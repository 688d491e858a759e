"""Helpers of the parity tests: small U-Nets, random weights that make mistakes visible, and distances."""

import torch

DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
SD = {
    "block_out_channels": (16, 32, 48, 48),
    "down_block_types": (DOWN[0],) * 3 + (DOWN[1],),
    "up_block_types": (UP[0],) + (UP[1],) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
UNETS = {  # small ones
    "sd1": SD | {"attention_head_dim": 4},
    "sd2": SD | {"attention_head_dim": (1, 2, 3, 6), "use_linear_projection": True, "upcast_attention": True},
    "toy": SD  # other levels read the prompt, one layer a block
    | {
        "block_out_channels": (16, 32, 48),
        "down_block_types": (DOWN[1], DOWN[0], DOWN[0]),
        "up_block_types": (UP[1], UP[1], UP[0]),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2, 6),
    },
}


@torch.no_grad()
def randomise(network, quiet=False):
    """Fill a network of transformers: weights of a trained size, norms and their statistics away from the defaults.

    quiet: 25 times smaller, so that every norm sees a tiny variance and its eps shows.
    """
    source, scale = torch.Generator().manual_seed(0), 0.04 if quiet else 1
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=source)
        if any(norm in name.lower() for norm in ("norm", "bn")):
            # BERT feeds each LayerNorm what the last one gave, so they must be quiet as well
            level = scale if "LayerNorm" in name else 1
            parameter.copy_(level * (1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise))
        else:
            size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "embedding" not in name else 0.5
            parameter.copy_(noise * size * scale)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * scale * torch.randn(buffer.shape, generator=source))
        elif name.endswith("running_var"):
            buffer.copy_(scale**2 * (0.2 + torch.rand(buffer.shape, generator=source)))
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
