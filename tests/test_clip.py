"""CLIP against transformers' with the same random weights, through files; published sizes; preprocessing.

Tolerances: float32 sums in another order differ by about 1e-6 of an output of order 1, and a wrong detail (gelu for
quick_gelu, another mask) by 1e-2 and more, so 1e-4 tells them apart. With weights 25 times smaller every variance is so
small that the eps of a norm shows; there the tolerance is 1e-4 of the largest output.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from model.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPTextEncoder, CLIPVisionConfig
from model.files.config import config_from
from model.files.errors import CheckpointError

TEXT = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "eos_token_id": 90,  # not the largest id, so that the two rules for the end differ
    "bos_token_id": 89,
    "pad_token_id": 90,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 40,
    "patch_size": 8,
}


def randomise(network, quiet):
    """Weights of a trained size, norms away from their defaults; `quiet`: 25 times smaller."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            if "norm" in name or "layrnorm" in name:
                value = (1 + 0.3 * noise) if name.endswith("weight") else 0.3 * noise
            elif parameter.ndim > 1 and "embedding" not in name:
                value = noise / parameter[0].numel() ** 0.5
            else:
                value = noise * 0.5
            parameter.copy_(value / (25 if quiet and "norm" not in name else 1))
    return network.eval()


def assert_close(ours, theirs, quiet):
    scale = theirs.abs().max().item()
    if not quiet:
        assert 0.3 < scale < 30
    assert (ours - theirs).abs().max().item() <= 1e-4 * (scale if quiet else 1)


def save_text_encoder(network, folder, prefix="text_model."):
    """The published files prefix every key; transformers 5 leaves the prefix out of those that it writes."""
    network.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if prefix:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # in files of before 2023
    save_file(tensors, folder / "model.safetensors")


def random_ids(count=5, length=77):
    """Start, a few tokens, end, padding: as a tokenizer gives, with id 98 > end somewhere in the last row."""
    source = torch.Generator().manual_seed(1)
    ids = torch.full((count, length), 90)
    for row, end in enumerate([1, 8, 30, length - 1, 12][:count]):
        ids[row, 0] = 89
        ids[row, 1:end] = torch.randint(0, 89, (end - 1,), generator=source)
    ids[-1, 3] = 98
    return ids


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize(("act", "prefix"), [("quick_gelu", "text_model."), ("gelu", "text_model."), ("gelu", "")])
def test_text_encoder_equals_transformers(tmp_path, act, prefix, quiet):
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, hidden_act=act))
    save_text_encoder(randomise(theirs, quiet), tmp_path, prefix)
    ours = CLIPTextEncoder.from_pretrained(tmp_path)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
    ids = random_ids()
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
    assert expected.shape == (5, 77, 48)
    assert_close(ours(ids), expected, quiet)
    assert_close(ours(ids[:, :9]), expected[:, :9], quiet)  # shorter texts are allowed, and causal


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("eos", [90, 2])
def test_clip_equals_transformers(tmp_path, eos, quiet):
    """Both rules for where a text ends: the first end token, or (old files) the largest id."""
    config = transformers.CLIPConfig(text_config={**TEXT, "eos_token_id": eos}, vision_config=VISION, projection_dim=24)
    theirs = randomise(transformers.CLIPModel(config), quiet)
    theirs.save_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    assert ours.image_size == 40
    assert ours.logit_scale.equal(theirs.logit_scale)
    ids, pixels = random_ids(), torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        text, image = theirs.get_text_features(ids).pooler_output, theirs.get_image_features(pixels).pooler_output
    assert text.shape == (5, 24) and image.shape == (3, 24)
    assert_close(ours.text_features(ids), text, quiet)
    assert_close(ours.image_features(pixels), image, quiet)
    assert_close(ours.image_features(pixels.contiguous(memory_format=torch.channels_last)), image, quiet)


def test_minimal_and_old_configs(tmp_path):
    """Public files leave out defaults, and files of 2022 carry *_dict, null values and position_ids."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    randomise(transformers.CLIPModel(config), quiet=False).save_pretrained(tmp_path)
    expected = CLIP.from_pretrained(tmp_path)
    values = {"text_config_dict": TEXT, "text_config": None, "vision_config": VISION, "vision_config_dict": None}
    (tmp_path / "config.json").write_text(json.dumps({**values, "projection_dim": 24}))
    ours = CLIP.from_pretrained(tmp_path)
    assert ours.config == expected.config
    assert ours.config.vision_config == CLIPVisionConfig(**VISION)
    assert CLIPConfig() == config_from(CLIPConfig, {"text_config": {}, "vision_config": {"patch_size": 32}})


def test_errors(tmp_path):
    save_text_encoder(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"hidden_size": 52}, "should be"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 2}, "unexpected"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match=message):
            CLIPTextEncoder.from_pretrained(tmp_path)


def photos():
    """Odd sizes, tall and wide, tiny and square, in the modes that photos come in."""
    source = np.random.default_rng(0)
    for width, height in [(61, 97), (133, 50), (40, 40), (17, 23), (301, 300), (41, 200)]:
        noise = source.integers(0, 256, (height, width, 4), dtype=np.uint8)
        yield Image.fromarray(noise[..., :3], "RGB")
        yield Image.fromarray(noise[..., 0], "L")
        yield Image.fromarray(noise, "RGBA")


@pytest.mark.parametrize("tower", ["x", 3, {"hidden_size": "wide"}], ids=str)
def test_a_tower_that_is_no_configuration_is_told(tmp_path, tower):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": tower}))
    with pytest.raises(CheckpointError, match=r"^[^\n]*config\.json[^\n]*$"):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}},
        {"size": 57, "crop_size": 40, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]},
    ],
)
def test_preprocess_equals_transformers(tmp_path, settings):
    """Every bit."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    if settings:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = CLIP.from_pretrained(tmp_path)
    theirs = transformers.CLIPImageProcessorPil(**(settings or {"size": 40, "crop_size": 40}))
    images = list(photos())
    copies = [image.copy() for image in images]
    pixels = ours.preprocess(images)
    assert pixels.shape == (len(images), 3, 40, 40) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    expected = theirs([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    assert pixels.equal(expected)
    assert images == copies


@pytest.mark.parametrize("heads", [0, 7])
@pytest.mark.parametrize("config", [CLIPTextConfig, CLIPVisionConfig])
def test_heads_that_do_not_divide_the_width(config, heads):
    """No tensor's shape tells how many there are."""
    with pytest.raises(CheckpointError, match=f"into {heads} heads"):
        config_from(config, {"hidden_size": 48, "num_attention_heads": heads})


def test_preprocess_refuses_another_size(tmp_path):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    others = [{"size": 224, "crop_size": 224}, {"size": 30, "crop_size": 40}, {"size": {"height": 40}}]
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    for settings in [*others, *({"size": 40, "crop_size": 40, step: False} for step in steps)]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError):
            CLIP.from_pretrained(tmp_path)


def test_trains_and_autocasts():
    """The toy weights are trained with these classes: gradients everywhere, finite, in bfloat16 too."""
    torch.manual_seed(0)
    towers = {"text_config": TEXT, "vision_config": VISION}
    network = CLIP(config_from(CLIPConfig, towers | {"projection_dim": 24})).train()
    with torch.autocast("cpu", torch.bfloat16):
        image, text = network.image_features(torch.randn(4, 3, 40, 40)), network.text_features(random_ids(4))
        similarity = torch.cosine_similarity(image[:, None].float(), text[None].float(), dim=-1)
        logits = network.logit_scale.exp() * similarity
        torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_half_precision_copy(tmp_path):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    randomise(transformers.CLIPModel(config), quiet=False).save_pretrained(tmp_path)
    full, half = CLIP.from_pretrained(tmp_path), CLIP.from_pretrained(tmp_path, torch.bfloat16)
    pixels = torch.randn(2, 3, 40, 40)
    assert half.image_features(pixels).dtype == torch.bfloat16
    similarity = torch.cosine_similarity(half.image_features(pixels).float(), full.image_features(pixels))
    assert similarity.min() > 0.99
