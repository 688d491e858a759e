"""ALIGN against transformers' AlignModel: same files, same numbers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AlignConfig, AlignModel
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from model.align import ALIGN, ALIGNConfig, ALIGNImageConfig, ALIGNTextConfig, ALIGNVisionConfig
from model.files.errors import CheckpointError

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


def reference(folder, vision=VISION, width=24, quiet=1.0):
    """A small random AlignModel, saved in `folder`, norms off their defaults; `quiet` scales what each norm sees."""
    torch.manual_seed(0)
    config = AlignConfig(text_config=dict(TEXT), vision_config=dict(vision), projection_dim=width)
    network = AlignModel(config).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.copy_(torch.randn_like(module.weight) * (quiet * module.weight[0].numel() ** -0.5))
            if module.bias is not None:
                module.bias.copy_(torch.randn_like(module.bias) * quiet)
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(torch.randn_like(module.weight) * quiet)
        elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            # A post-norm transformer feeds each norm what the last one gave, so LayerNorms must be quiet as well.
            level = quiet if isinstance(module, nn.LayerNorm) else 1.0
            module.weight.copy_(level * (1 + 0.3 * torch.randn_like(module.weight)))
            module.bias.copy_(level * 0.3 * torch.randn_like(module.bias))
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.3 * quiet * torch.randn_like(module.running_mean))
            module.running_var.copy_(quiet**2 * (0.2 + torch.rand_like(module.running_var)))
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


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# Both sides compute the same float32 sums in another order, below 1e-6 apart. The quiet set shows a wrong LayerNorm
# eps (1e-5 for 1e-12), which ordinary weights hide (2e-6).
@pytest.mark.parametrize("quiet", [1.0, 0.04], ids=["ordinary", "quiet"])
@pytest.mark.parametrize(("vision", "width"), [(VISION, 24), (PLAIN, 48)], ids=["scaled", "plain"])
@torch.no_grad()
def test_parity(tmp_path, vision, width, quiet):
    theirs = reference(tmp_path, vision, width, quiet)
    ours = ALIGN.from_pretrained(tmp_path)
    assert ours.temperature.shape == ()
    assert ours.temperature.item() == pytest.approx(0.7)
    for size in [(64, 64), (65, 65), (66, 35), (97, 64)]:
        x = pixels(*size)
        got, expected = ours.image_features(x), theirs.get_image_features(pixel_values=x).pooler_output
        assert got.shape == expected.shape == (2, width)
        assert relative(got, expected) <= 1e-5
        if quiet == 1.0:
            assert 0.1 < expected.abs().max() < 30
            assert (got - expected).abs().max() <= 1e-4
    ids, mask = words(12, 3, 7)
    got = ours.text_features(ids, mask)
    expected = theirs.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    assert got.shape == expected.shape == (3, width)
    assert relative(got, expected) <= 1e-5
    if quiet == 1.0:
        assert 0.1 < expected.abs().max() < 30
        assert (got - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_cosines_over_temperature_are_their_logits(tmp_path):
    theirs = reference(tmp_path)
    ours = ALIGN.from_pretrained(tmp_path)
    (ids, mask), x = words(5, 9), pixels(64, 64)
    images = nn.functional.normalize(ours.image_features(x), dim=-1)
    texts = nn.functional.normalize(ours.text_features(ids, mask), dim=-1)
    expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=x).logits_per_image
    assert (images @ texts.T / ours.temperature - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_padding_does_not_change_a_text(tmp_path):
    reference(tmp_path)
    ours = ALIGN.from_pretrained(tmp_path)
    ids, mask = words(20, 6)
    alone = ours.text_features(ids[1:, :6], mask[1:, :6])
    assert (ours.text_features(ids, mask)[1:] - alone).abs().max() <= 1e-5
    assert (ours.text_features(ids, torch.ones_like(mask))[1:] - alone).abs().max() > 1e-2
    assert torch.equal(ours.text_features(ids, mask), ours.text_features(ids, mask.bool()))


@torch.no_grad()
def test_channels_last_and_autocast(tmp_path):
    reference(tmp_path)
    ours = ALIGN.from_pretrained(tmp_path)
    x, (ids, mask) = pixels(64, 64), words(5, 9)
    plain, text = ours.image_features(x), ours.text_features(ids, mask)
    last = ours.to(memory_format=torch.channels_last).image_features(x.to(memory_format=torch.channels_last))
    assert (last - plain).abs().max() <= 1e-4
    with torch.autocast("cpu", torch.bfloat16):  # 8 bits through about 10 blocks
        assert relative(ours.image_features(x).float(), plain) <= 0.1
        assert relative(ours.text_features(ids, mask).float(), text) <= 0.1


def test_it_trains():
    """One contrastive step moves every parameter that the features use, and brings the loss down."""
    torch.manual_seed(0)
    vision = VISION | {"batch_norm_momentum": 0.1}
    network = ALIGN(ALIGNConfig.from_json({"text_config": TEXT, "vision_config": vision, "projection_dim": 24}))
    assert all(parameter.requires_grad for parameter in network.parameters())
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    (ids, mask), x = words(12, 3, 7, 9), pixels(32, 32, batch=4)
    losses = []
    for _ in range(12):
        images = nn.functional.normalize(network.image_features(x), dim=-1)
        texts = nn.functional.normalize(network.text_features(ids, mask), dim=-1)
        loss = nn.functional.cross_entropy(images @ texts.T / network.temperature, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    idle = {name for name, p in network.named_parameters() if p.grad is None}
    assert idle == {"text_model.pooler.dense.weight", "text_model.pooler.dense.bias"}
    assert losses[-1] < 0.8 * losses[0]


def picture(width, height, mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


@pytest.mark.parametrize(
    ("size", "crop"), [((346, 346), (289, 289)), ((147, 130), (128, 97)), ((96, 96), (96, 96))], ids=str
)
def test_preprocess_is_the_public_processor_exactly(tmp_path, size, crop):
    reference(tmp_path)
    config = {
        "crop_size": {"height": crop[0], "width": crop[1]},
        "do_center_crop": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "include_top": False,
        "resample": 2,
        "rescale_factor": 0.00784313725490196,
        "rescale_offset": True,
        "size": {"height": size[0], "width": size[1]},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    ours = ALIGN.from_pretrained(tmp_path)
    images = [picture(640, 480), picture(333, 777), picture(31, 17), picture(*size[::-1])]
    expected = EfficientNetImageProcessorPil(**config)(images, return_tensors="pt")["pixel_values"]
    got = ours.preprocess(images)
    assert got.dtype == torch.float32
    assert got.shape == (4, 3, *crop)
    assert torch.equal(got, expected)
    assert got.min() >= -1
    assert got.max() <= 1


def test_preprocess_defaults_and_modes(tmp_path):
    reference(tmp_path)
    ours = ALIGN.from_pretrained(tmp_path)  # no preprocessor_config.json: kakaobrain/align-base's numbers
    assert ours.config.images == ALIGNImageConfig()
    for mode in ("L", "P", "RGBA", "CMYK"):
        image = picture(50, 40, mode)
        assert torch.equal(ours.preprocess([image]), ours.preprocess([image.convert("RGB")]))
        assert image.mode == mode
    assert ours.preprocess([picture(50, 40)]).shape == (1, 3, 289, 289)


def test_old_position_ids_are_passed_over(tmp_path):
    from safetensors.torch import load_file, save_file

    reference(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) == len(ALIGN.from_pretrained(tmp_path).state_dict())
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(48)[None]}, tmp_path / "model.safetensors")
    ALIGN.from_pretrained(tmp_path)
    del tensors["temperature"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks temperature"):
        ALIGN.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act"),
        ({"text_config": {"position_embedding_type": "relative_key"}}, "position_embedding_type"),
        ({"text_config": {"num_attention_heads": 7}}, "7 heads"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act"),
        ({"vision_config": {"pooling_type": "max"}}, "pooling_type"),
        ({"vision_config": {"strides": [1, 2]}}, "differ in length"),
        ({"vision_config": {"strides": [1, 2, 2, 3, 1, 2, 1]}}, "strides"),
        ({"text_config": "x"}, "text_config is 'x'"),
        ({"projection_dim": 512}, "projection_dim"),
    ],
    ids=str,
)
def test_unsupported_config_is_refused(values, named):
    with pytest.raises(CheckpointError, match=named):
        ALIGNConfig.from_json(values)


@pytest.mark.parametrize(
    "values",
    [
        {"do_normalize": True},
        {"include_top": True},
        {"do_center_crop": False},
        {"rescale_offset": False},
        {"do_resize": False},
        {"do_rescale": False},
        {"resample": 9},
        {"size": {"shortest_edge": 346}},
        {"size": {"height": 346.0, "width": 346}},
        {"size": [346, 346, 3]},
        {"crop_size": {"height": None, "width": 289}},
        {"crop_size": 0},
        {"crop_size": {"height": 400, "width": 400}},
    ],
    ids=str,
)
def test_unsupported_preprocessor_is_refused(values):
    with pytest.raises(CheckpointError, match=f"^FOLDER: .*{next(iter(values))}"):
        ALIGNConfig.from_json({}, values, "FOLDER")


def test_config_defaults_are_the_public_ones():
    assert ALIGNConfig.from_json({}) == ALIGNConfig()
    assert ALIGNConfig.from_json({"text_config": None, "unknown": 3}).text_config == ALIGNTextConfig()
    assert ALIGNVisionConfig().width(112) == 224
    assert ALIGNConfig.from_json({}, {"size": 100, "crop_size": 96}).images.size == (100, 100)
