"""CLIP against transformers' with the same random weights, through files.

Tolerances: float32 sums in another order differ by about 1e-6 of an output of order 1, and a wrong detail (gelu for
quick_gelu, another mask) by 1e-2 and more, so 1e-4 distinguishes them. With weights 25 times smaller every variance is
so small that the eps of a norm shows; there the tolerance is 1e-4 of the largest output.
"""

import json

import pytest
import torch
import transformers
from parity import randomise, relative, untrained

from model.clip import CLIP, CLIPConfig, CLIPTextEncoder
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


def reference(folder, quiet=False, **text):
    """A small random CLIPModel, saved in `folder`."""
    config = transformers.CLIPConfig(text_config=TEXT | text, vision_config=VISION, projection_dim=24)
    network = randomise(transformers.CLIPModel(config), quiet)
    network.save_pretrained(folder)
    return network


def assert_close(ours, theirs, quiet):
    if quiet:
        assert relative(ours, theirs) <= 1e-4
    else:
        assert 0.3 < theirs.abs().max() < 30
        assert (ours - theirs).abs().max() <= 1e-4


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
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_text_encoder_equals_transformers(tmp_path, act, quiet):
    """transformers 5 writes the names without "text_model."; test_full_size.py has the published names."""
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, hidden_act=act))
    randomise(theirs, quiet).save_pretrained(tmp_path)
    ours = CLIPTextEncoder.from_pretrained(tmp_path)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
    ids = random_ids()
    expected = theirs(ids).last_hidden_state
    assert expected.shape == (5, 77, 48)
    assert_close(ours(ids), expected, quiet)
    assert_close(ours(ids[:, :9]), expected[:, :9], quiet)  # shorter texts are allowed, and causal


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("eos", [90, 2])
@torch.no_grad()
def test_clip_equals_transformers(tmp_path, eos, quiet):
    """Both rules for where a text ends: the first end token, or (old files) the largest id."""
    theirs = reference(tmp_path, quiet, eos_token_id=eos)
    ours = CLIP.from_pretrained(tmp_path)
    assert ours.logit_scale.equal(theirs.logit_scale)
    ids, pixels = random_ids(), torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    text, image = theirs.get_text_features(ids).pooler_output, theirs.get_image_features(pixels).pooler_output
    assert text.shape == (5, 24) and image.shape == (3, 24)
    assert_close(ours.text_features(ids), text, quiet)
    assert_close(ours.image_features(pixels), image, quiet)
    assert_close(ours.image_features(pixels.contiguous(memory_format=torch.channels_last)), image, quiet)


def test_minimal_and_old_configs(tmp_path):
    """Public files leave out defaults, and files of 2022 carry *_dict, which repeat the others or are null."""
    reference(tmp_path)
    expected = CLIP.from_pretrained(tmp_path)
    values = {"text_config_dict": TEXT, "text_config": TEXT, "vision_config": VISION, "vision_config_dict": None}
    (tmp_path / "config.json").write_text(json.dumps({**values, "projection_dim": 24}))
    assert CLIP.from_pretrained(tmp_path).config == expected.config


def test_a_preprocessor_of_another_size_is_refused(tmp_path):
    reference(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="224 pixels"):
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
    assert not untrained(network)
