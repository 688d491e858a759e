"""The aesthetic predictor against plain torch layers with the same random weights, in the published file's layout.

Tolerance: float32 sums in another order differ by about 1e-7 here; an activation between the layers changes the score
by more than 1e-3.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from model.aesthetic import AestheticPredictor
from model.clip import CLIP, CLIPConfig
from model.files.config import config_from
from model.files.errors import CheckpointError


def tiny_clip(width):
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    towers = {"text_config": tower, "vision_config": tower | {"image_size": 16, "patch_size": 8}}
    return CLIP(config_from(CLIPConfig, towers | {"projection_dim": width}))


def published(path):
    """The published layout: linear layers numbered 0, 2, 4, 6, 7."""
    torch.manual_seed(1)
    widths = 768, 1024, 128, 64, 16, 1
    linear = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    numbered = zip((0, 2, 4, 6, 7), linear, strict=True)
    tensors = {f"layers.{i}.{name}": tensor for i, layer in numbered for name, tensor in layer.state_dict().items()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return nn.Sequential(*linear)


@pytest.mark.parametrize("name", ["sac+logos+ava1-l14-linearMSE.pth", "predictor.safetensors"])
@torch.no_grad()
def test_equals_plain_layers(tmp_path, name):
    theirs, clip = published(tmp_path / name), tiny_clip(768)
    ours = AestheticPredictor.from_pretrained(tmp_path / name, clip)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
    features = F.normalize(clip.image_features(torch.randn(5, 3, 16, 16)), dim=1)
    assert (ours(features) - theirs(features)[:, 0]).abs().max() < 1e-5


def test_another_clip_is_refused(tmp_path):
    published(tmp_path / "predictor.pth")
    with pytest.raises(CheckpointError, match=r"ViT-L/14.*layers\.0\.weight is \(1024, 768\) and should be .*512"):
        AestheticPredictor.from_pretrained(tmp_path / "predictor.pth", tiny_clip(512))
