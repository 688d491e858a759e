"""DINO against transformers' ViT with the same random weights, through files; the published size; preprocessing.

Tolerances: float32 sums in another order differ by about 1e-6 of an output of order 1, a wrong detail by 1e-3 and more.
With weights and pixels 25 times smaller ("quiet") the eps of the norms (1e-12, not the usual 1e-5) shows.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

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


def reference(folder, pooler=False, quiet=False, **changes):
    """A random ViT, saved: weights of a trained size, norms away from their defaults; `quiet`: 25 times smaller."""
    network = transformers.ViTModel(transformers.ViTConfig(**{**SMALL, **changes}), add_pooling_layer=pooler)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
            else:
                scale = parameter[0].numel() ** -0.5 if name.endswith("weight") else 0.5
                parameter.copy_(noise * scale / (25 if quiet else 1))
    network.eval().save_pretrained(folder)
    return network


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("changes", [{}, {"pooler": True}, {"qkv_bias": False}, {"image_size": 32, "patch_size": 16}])
def test_equals_transformers(tmp_path, changes, quiet):
    theirs = reference(tmp_path, quiet=quiet, **changes)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "encoder.layer.0.attention.attention.query.weight" in names  # the published names, not those in memory
    assert ("pooler.dense.weight" in names) == changes.get("pooler", False)
    ours = DINO.from_pretrained(tmp_path)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
    size = changes.get("image_size", 40)
    assert ours.image_size == size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)) / (25 if quiet else 1)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, 0]
    assert expected.shape == (3, 48) and 0.3 < expected.abs().max() < 30
    assert (ours(pixels) - expected).abs().max() <= 1e-4
    assert (ours(pixels.contiguous(memory_format=torch.channels_last)) - expected).abs().max() <= 1e-4


def test_wrong_eps_shows(tmp_path):
    """The quiet weights do tell 1e-12 from DINO's own code's 1e-6: the test above would fail."""
    theirs = reference(tmp_path, quiet=True)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "layer_norm_eps": 1e-6}))
    pixels = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1)) / 25
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, 0]
    assert (DINO.from_pretrained(tmp_path)(pixels) - expected).abs().max() > 2e-4


def test_errors(tmp_path):
    reference(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"image_size": 48}, "position_embeddings is .* should be"),
        ({"num_hidden_layers": 4}, "lacks encoder.layer.3"),
        ({"num_hidden_layers": 2}, "unexpected encoder.layer.2"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match=message):
            DINO.from_pretrained(tmp_path)


def photos():
    """Odd sizes, tall and wide, tiny and square, in RGB and grey."""
    source = np.random.default_rng(0)
    for width, height in [(61, 97), (133, 50), (40, 40), (17, 23), (301, 300), (41, 200)]:
        noise = source.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield Image.fromarray(noise)
        yield Image.fromarray(noise[..., 0])


@pytest.mark.parametrize(
    "settings",
    [None, {"size": 40}, {"size": {"height": 40, "width": 40}, "resample": 3, "image_mean": [0.5] * 3}],
)
def test_preprocess_equals_transformers(tmp_path, settings):
    """Every bit. The reference's own class defaults are mean and std 0.5, the checkpoint's are ImageNet's."""
    reference(tmp_path)
    if settings:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = DINO.from_pretrained(tmp_path)
    defaults = {"size": 40, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    theirs = transformers.ViTImageProcessorPil(**{**defaults, **(settings or {})})
    images = list(photos())
    pixels = ours.preprocess(images)
    assert pixels.shape == (len(images), 3, 40, 40) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    expected = theirs([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    assert pixels.equal(expected)


def test_preprocess_refuses_another_size(tmp_path):
    reference(tmp_path)
    others = [{"size": size} for size in (224, {"shortest_edge": 40}, {"height": 40, "width": 48})]
    for settings in [*others, *({"size": 40, step: False} for step in ("do_resize", "do_rescale", "do_normalize"))]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError):
            DINO.from_pretrained(tmp_path)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(CheckpointError, match="into 7 heads"):
        DINOConfig(hidden_size=48, num_attention_heads=7)


def test_trains_and_autocasts():
    """The toy weights are trained with this class: gradients everywhere, finite, in bfloat16 too."""
    torch.manual_seed(0)
    network = DINO(DINOConfig(**SMALL)).train()
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(4, 3, 40, 40)).float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())
