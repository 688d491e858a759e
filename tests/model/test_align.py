"""ALIGN against transformers' AlignModel: same files, same numbers."""

import json

import pytest
import torch
from parity import randomise, relative, untrained
from PIL import Image
from torch import nn
from transformers import AlignConfig, AlignModel

from model.align import ALIGN, ALIGNConfig
from model.files.config import config_from

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
# Every kind of block: expanded or not, stride 1 and 2, kernels 3 and 5, first and repeated. Half of 22 rounds up to 16.
VISION = {
    "width_coefficient": 0.5,
    "depth_coefficient": 1.4,
    "kernel_sizes": [3, 5, 3, 5],
    "in_channels": [32, 16, 22, 40],
    "out_channels": [16, 22, 40, 48],
    "strides": [1, 2, 2, 1],
    "num_block_repeats": [1, 2, 1, 1],
    "expand_ratios": [1, 6, 4, 6],
    "hidden_dim": 640,
    "image_size": 64,
}
# A toy's: plain widths and depths, and two stride-2 blocks that pad on all sides.
PLAIN = VISION | {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "depthwise_padding": [1, 3],
    "squeeze_expansion_ratio": 0.5,
    "batch_norm_eps": 1e-2,
}


@torch.no_grad()
def reference(folder, vision=VISION, width=24, quiet=False):
    """A small random AlignModel, saved in `folder`."""
    config = AlignConfig(text_config=dict(TEXT), vision_config=dict(vision), projection_dim=width)
    network = randomise(AlignModel(config).requires_grad_(False), quiet)
    network.temperature.fill_(0.7)
    network.save_pretrained(folder)
    return network


def words(*lengths):
    """Random ids and their padding mask, one row a length."""
    ids = torch.randint(1, 99, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def pixels(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


# Both sides compute the same float32 sums in another order, below 1e-6 apart. The quiet set shows a wrong LayerNorm
# eps (1e-5 for 1e-12), which ordinary weights hide (2e-6).
@pytest.mark.parametrize("quiet", [False, True], ids=["ordinary", "quiet"])
@pytest.mark.parametrize(("vision", "width"), [(VISION, 24), (PLAIN, 48)], ids=["scaled", "plain"])
@torch.no_grad()
def test_parity(tmp_path, vision, width, quiet):
    theirs = reference(tmp_path, vision, width, quiet)
    ours = ALIGN.from_pretrained(tmp_path)
    for size in [(64, 64), (65, 65), (66, 35), (97, 64)]:
        x = pixels(*size)
        got, expected = ours.image_features(x), theirs.get_image_features(pixel_values=x).pooler_output
        assert got.shape == expected.shape == (2, width)
        assert relative(got, expected) <= 1e-5
        if not quiet:
            assert 0.1 < expected.abs().max() < 30
            assert (got - expected).abs().max() <= 1e-4
            last = ours.image_features(x.contiguous(memory_format=torch.channels_last))
            assert (last - expected).abs().max() <= 1e-4
    ids, mask = words(12, 3, 7)
    texts = ours.text_features(ids, mask)
    expected = theirs.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    assert texts.shape == expected.shape == (3, width)
    assert relative(texts, expected) <= 1e-5
    if not quiet:
        assert 0.1 < expected.abs().max() < 30
        assert (texts - expected).abs().max() <= 1e-4
        logits = theirs(input_ids=ids, attention_mask=mask, pixel_values=x).logits_per_image
        cosines = nn.functional.normalize(got) @ nn.functional.normalize(texts).T
        assert (cosines / ours.temperature - logits).abs().max() <= 1e-5


@torch.no_grad()
def test_padding_does_not_change_a_text(tmp_path):
    reference(tmp_path)
    ours = ALIGN.from_pretrained(tmp_path)
    ids, mask = words(20, 6)
    alone = ours.text_features(ids[1:, :6], mask[1:, :6])
    assert (ours.text_features(ids, mask)[1:] - alone).abs().max() <= 1e-5
    assert (ours.text_features(ids, torch.ones_like(mask))[1:] - alone).abs().max() > 1e-2
    assert torch.equal(ours.text_features(ids, mask), ours.text_features(ids, mask.bool()))


def test_trains_and_autocasts():
    """The toy weights are trained with this class: a contrastive loss reaches every parameter that the features use."""
    torch.manual_seed(0)
    network = ALIGN(config_from(ALIGNConfig, {"text_config": TEXT, "vision_config": VISION, "projection_dim": 24}))
    with torch.autocast("cpu", torch.bfloat16):
        images, texts = network.image_features(pixels(32, 32, batch=4)), network.text_features(*words(12, 3, 7, 9))
        cosines = torch.cosine_similarity(images[:, None].float(), texts[None].float(), dim=-1)
        nn.functional.cross_entropy(cosines / network.temperature, torch.arange(4)).backward()
    assert untrained(network) == {"text_model.pooler.dense.weight", "text_model.pooler.dense.bias"}


def test_settings_are_read_from_the_folder(tmp_path):
    reference(tmp_path)
    square = {"height": 30, "width": 30}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": square, "crop_size": square}))
    assert ALIGN.from_pretrained(tmp_path).preprocess([Image.new("L", (50, 40))]).shape == (1, 3, 30, 30)
