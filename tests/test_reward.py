"""The λ-Harmonic reward, with a tiny fake ALIGN whose features can be computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from reward import Reward, lambda_arithmetic, lambda_harmonic, similarity, strip_token, unit_features


def test_both_means_by_hand():
    """The first two pairs are the paper's example: its means are 0.0198 and 0.3231, and 0.455."""
    image, text = torch.tensor([0.9, 0.7, 0.8, 0.2]), torch.tensor([0.01, 0.21, 0.5, 1.0])
    assert lambda_harmonic(image, text, 0.5)[:2].tolist() == pytest.approx([0.0198, 0.3231], abs=1e-4)
    assert lambda_arithmetic(image, text, 0.5)[:2].tolist() == pytest.approx([0.455] * 2)
    harmonic, arithmetic = lambda_harmonic(image, text, 0.3)[2:], lambda_arithmetic(image, text, 0.3)[2:]
    assert harmonic.tolist() == pytest.approx([1 / (0.3 / 0.8 + 0.7 / 0.5), 1 / (0.3 / 0.2 + 0.7)], rel=1e-6)
    assert arithmetic.tolist() == pytest.approx([0.3 * 0.8 + 0.7 * 0.5, 0.3 * 0.2 + 0.7], rel=1e-6)
    for lam, alone in ((0, text), (1.0, image)):
        assert torch.equal(lambda_arithmetic(image, text, lam), alone)


def test_limits():
    """λ = 0 and 1 are exact, where the formula has 0/0 too; in between a zero makes the reward zero."""
    image, text, zero = *torch.rand(2, 100, generator=torch.Generator().manual_seed(0)), torch.zeros(100)
    for ignored in (image, text, zero):
        assert torch.equal(lambda_harmonic(ignored, text, 0), text)
        assert torch.equal(lambda_harmonic(image, ignored, 1.0), image)
    for pair in ((zero, text), (image, zero), (zero, zero)):
        assert torch.equal(lambda_harmonic(*pair, 0.3), zero)


def test_similarity_stays_in_its_range():
    a = torch.tensor([[1.000001, 0], [0, 1], [-1.000001, 0]])
    assert similarity(a, torch.tensor([1.0, 0])).tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    "prompt, token, scored",
    [
        ("a [V] dog in the snow", "[V]", "a dog in the snow"),
        ("a dog like [V]", "[V]", "a dog like"),
        ("a sks dog asks sksy sks_1", "sks", "a dog asks sksy sks_1"),
        ("a V dog.* x", ".*", "a V dog x"),
        ("  a   dog ", "[V]", "a dog"),
    ],
)
def test_strip_token(prompt, token, scored):
    assert strip_token(prompt, token) == scored


TEXTS = {"a dog": [1.0, 0, 0], "a dog in the snow": [0, 1.0, 0], "a red dog": [0, 0, 2.0]}


class FakeALIGN(nn.Module):
    """An image's feature is its mean colour, so that its alignments can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(text_config={"vocab_size": len(TEXTS)})
        self.weight = nn.Parameter(torch.ones(()))
        self.image_batches, self.text_batches = [], []

    def preprocess(self, images):
        return torch.stack([torch.tensor(image.getpixel((0, 0))) / 255 for image in images])

    def forward(self, pixels):
        return self.image_features(pixels)

    def image_features(self, pixels):
        self.image_batches.append(len(pixels))
        return pixels * self.weight

    def text_features(self, ids, mask):
        assert mask.shape == ids.shape
        self.text_batches.append(len(ids))
        return torch.tensor([TEXTS[list(TEXTS)[i]] for i in ids[:, 0]]) * self.weight


class FakeTokenizer:
    """A text's id is its place in TEXTS: a text that still has its token is a ValueError."""

    def check_fits(self, config, network):
        if config["vocab_size"] < len(TEXTS):
            raise ValueError(f"{network} is too small")

    def __call__(self, texts):
        ids = torch.tensor([[list(TEXTS).index(text)] for text in texts])
        return ids, torch.ones_like(ids)


def colour(*rgb):
    return Image.new("RGB", (4, 4), rgb)


RED, GREEN, BLUE, GREY = colour(255, 0, 0), colour(0, 255, 0), colour(0, 0, 255), colour(80, 80, 80)


def rewards_of(*photos, **options):
    return Reward(FakeALIGN(), FakeTokenizer(), list(photos), **options)


@pytest.mark.parametrize("token", ["[V]", "sks"])
def test_alignments_by_hand(token):
    reward, prompts = rewards_of(RED, GREEN, token=token), [f"a {token} dog", f"a {token} dog in the snow"]
    alignments, third = reward.alignments([RED, GREY], prompts), (1 / math.sqrt(3) + 1) / 2
    for got, expected in zip(alignments, ([(1 + 0.5) / 2, third], [1, third]), strict=True):
        assert got.tolist() == pytest.approx(expected, abs=1e-6) and not got.requires_grad  # fp32 rounding
    assert reward([RED, GREY], prompts, 0.3).tolist() == pytest.approx([1 / (0.3 / 0.75 + 0.7), third], abs=1e-6)
    for lam, alone in ((1, alignments[0]), (0, alignments[1])):
        assert torch.equal(reward([RED, GREY], prompts, lam), alone)
    reward.combine = lambda_arithmetic
    assert reward([RED], prompts[:1], 0.3).tolist() == pytest.approx([0.3 * 0.75 + 0.7], abs=1e-6)


@pytest.mark.parametrize("lam", [0, 0.3, 1])
def test_a_batch_and_the_photos_are_scored_as_single_images(lam):
    """The release's bug: every label used the reward of the prompt's first negative, not of the image in the pair."""
    photos, prompts = [colour(13 * i, 250 - 11 * i, 7 * i) for i in range(18)], ["a red [V] dog", "a [V] dog"] * 9
    reward = rewards_of(*photos)  # all different; two batches
    table = torch.stack([reward([photo] * 2, prompts[:2], lam) for photo in photos])
    assert torch.allclose(reward.of_photos(prompts[:2], lam), table, atol=1e-6)
    assert torch.allclose(reward(photos, prompts, lam), table.flatten()[torch.arange(18) * 2 + torch.arange(18) % 2])


def test_texts_are_embedded_once_and_images_in_batches():
    reward = rewards_of(RED, GREEN, BLUE)
    reward.alignments([RED] * 18, ["a [V] dog"] * 17 + ["a red [V] dog"])
    assert reward.align.image_batches == [3, 16, 2] and reward.align.text_batches == [2]
    reward.alignments([RED] * 3, ["a dog", "a red [V] dog", "a [V] dog in the snow"])
    assert reward.align.text_batches == [2, 1]  # only the new text


def test_autocast_around_the_reward_does_not_round_the_cosines():
    reward = rewards_of(colour(250, 61, 7), BLUE)
    plain = reward([colour(90, 120, 33)], ["a dog"], 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward([colour(90, 120, 33)], ["a dog"], 0.3), plain)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="2 images, 1 prompts"):  # broadcast
        rewards_of(RED).alignments([RED, RED], ["a dog"])
    small = FakeALIGN()
    small.config.text_config["vocab_size"] = 2
    with pytest.raises(ValueError, match=r"^ALIGN is too small"):  # another model's tokenizer
        Reward(small, FakeTokenizer(), [RED])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite(value):
    reward = rewards_of(RED)
    reward.align.weight.data.fill_(value)
    for call in (
        lambda: Reward(reward.align, FakeTokenizer(), [RED]),
        lambda: reward.alignments([RED], ["a dog"]),
        *[lambda: reward.of_photos(["a dog"], 0.3)] * 2,  # nor are they kept and returned the second time
        lambda: unit_features(reward.align, torch.ones_like, torch.ones(2, 3), torch.device("cpu")),  # called itself
    ):
        with pytest.raises(FloatingPointError, match=r"^FakeALIGN's .* not finite: its weights are damaged$"):
            call()
