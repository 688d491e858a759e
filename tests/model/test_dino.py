"""DINO against transformers' ViT with the same random weights, through files.

Tolerances: float32 sums in another order differ by about 1e-6 of an output of order 1, a wrong detail by 1e-3 and more.
With weights and pixels 25 times smaller ("quiet") the eps of the norms (1e-12, not the usual 1e-5) shows.
"""

import json

import pytest
import torch
import transformers
from parity import randomise, untrained

from model.dino import DINO, DINOConfig
from model.files.errors import CheckpointError

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 40,
    "patch_size": 8,
}


def reference(folder, quiet=False):
    """A small random ViTModel, saved in `folder`."""
    config = transformers.ViTConfig(**SMALL)
    network = randomise(transformers.ViTModel(config, add_pooling_layer=False), quiet)
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("quiet", [False, True])
@torch.no_grad()
def test_equals_transformers(tmp_path, quiet):
    theirs = reference(tmp_path, quiet)
    ours = DINO.from_pretrained(tmp_path)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
    pixels = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1)) / (25 if quiet else 1)
    expected = theirs(pixels).last_hidden_state[:, 0]
    assert expected.shape == (3, 48) and 0.3 < expected.abs().max() < 30
    assert (ours(pixels) - expected).abs().max() <= 1e-4
    assert (ours(pixels.contiguous(memory_format=torch.channels_last)) - expected).abs().max() <= 1e-4
    if quiet:  # 1e-6, the eps of DINO's own code, would be seen
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**values, "layer_norm_eps": 1e-6}))
        assert (DINO.from_pretrained(tmp_path)(pixels) - expected).abs().max() > 2e-4


def test_a_preprocessor_of_another_size_is_refused(tmp_path):
    reference(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    with pytest.raises(CheckpointError, match="224 pixels"):
        DINO.from_pretrained(tmp_path)


def test_trains_and_autocasts():
    """The toy weights are trained with this class: gradients everywhere, finite, in bfloat16 too."""
    torch.manual_seed(0)
    network = DINO(DINOConfig(**SMALL)).train()
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(4, 3, 40, 40)).float().square().mean().backward()
    assert not untrained(network)
