"""The λ-Harmonic reward, with a tiny fake ALIGN whose features can be worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from reward import Reward, _to_unit, lambda_arithmetic, lambda_harmonic, strip_token, unit_features

ABOVE_0 = st.floats(1e-3, 1)
LAMBDA = st.floats(0, 1)
# A busy machine must not fail a test, and the same cases must be tried everywhere.
steady = settings(deadline=None, derandomize=True, database=None)


@steady
@given(ABOVE_0, ABOVE_0, LAMBDA)
def test_between_both_alignments(image, text, lam):
    reward = lambda_harmonic(image, text, lam)
    assert min(image, text) - 1e-12 <= reward <= max(image, text) + 1e-12


@steady
@given(ABOVE_0, ABOVE_0, ABOVE_0, LAMBDA)
def test_rises_with_each_alignment(one, other, fixed, lam):
    low, high = sorted((one, other))
    assert lambda_harmonic(low, fixed, lam) <= lambda_harmonic(high, fixed, lam) + 1e-12
    assert lambda_harmonic(fixed, low, lam) <= lambda_harmonic(fixed, high, lam) + 1e-12


@steady
@given(ABOVE_0, ABOVE_0, LAMBDA, LAMBDA)
def test_moves_with_lambda_from_text_to_image(image, text, one, other):
    low, high = sorted((one, other))
    step = lambda_harmonic(image, text, high) - lambda_harmonic(image, text, low)
    assert step >= -1e-12 if image >= text else step <= 1e-12


@steady
@given(ABOVE_0, ABOVE_0)
def test_half_is_the_harmonic_mean(image, text):
    assert lambda_harmonic(image, text, 0.5) == pytest.approx(2 * image * text / (image + text), rel=1e-12)


def test_known_value():
    assert lambda_harmonic(0.8, 0.5, 0.3) == pytest.approx(1 / (0.3 / 0.8 + 0.7 / 0.5), rel=1e-12)


@steady
@given(image=st.floats(0, 1), text=st.floats(0, 1))
def test_ends_are_exact(image, text):
    image, text = torch.tensor(image), torch.tensor(text)
    for zero in (torch.tensor(0.0), None):
        assert lambda_harmonic(image if zero is None else zero, text, 0) == text
        assert lambda_harmonic(image, text if zero is None else zero, 1.0) == image


def test_zero_alignment_gives_zero_in_between():
    for pair in [(0.0, 0.7), (0.7, 0.0), (0.0, 0.0)]:
        assert lambda_harmonic(*torch.tensor(pair), 0.3).item() == 0


@pytest.mark.parametrize("lam", [-0.01, 1.01, math.nan, math.inf])
def test_lambda_outside_is_refused(lam):
    with pytest.raises(ValueError, match=r"^lam[^\n]*\[0, 1\]"):
        lambda_harmonic(0.5, 0.5, lam)


def test_arithmetic_mean():
    assert lambda_arithmetic(0.8, 0.5, 0.3) == pytest.approx(0.3 * 0.8 + 0.7 * 0.5, abs=1e-12)
    assert (lambda_arithmetic(0.8, 0.5, 0), lambda_arithmetic(0.8, 0.5, 1)) == (0.5, 0.8)
    image, text = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 1.0])
    assert lambda_arithmetic(image, text, 0.5).tolist() == pytest.approx([0.65, 0.6], abs=1e-6)
    assert (lambda_arithmetic(image, text, 0.3) > lambda_harmonic(image, text, 0.3)).all()
    for lam in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"^lam[^\n]*\[0, 1\]"):
            lambda_arithmetic(0.5, 0.5, lam)


@pytest.mark.parametrize(
    "prompt, token, scored",
    [
        ("a [V] dog in the snow", "[V]", "a dog in the snow"),
        ("[V] dog", "[V]", "dog"),
        ("a dog like [V]", "[V]", "a dog like"),
        ("a [V], wet dog", "[V]", "a , wet dog"),
        ("[V] [V] dog", "[V]", "dog"),
        ("a sks dog asks sksy sks_1", "sks", "a dog asks sksy sks_1"),
        ("a <new1> dog", "<new1>", "a dog"),
        ("a dog.* x", ".*", "a dog x"),
        ("a V dog", "[V]", "a V dog"),
        ("  a   dog ", "[V]", "a dog"),
    ],
)
def test_strip_token(prompt, token, scored):
    assert strip_token(prompt, token) == scored


def test_strip_token_refuses_an_empty_token():
    with pytest.raises(ValueError, match="empty"):
        strip_token("a dog", " ")


TEXTS = {"a dog": [1.0, 0, 0], "a dog in the snow": [0, 1.0, 0], "a red dog": [0, 0, 2.0]}


class FakeALIGN(nn.Module):
    """An image's feature is its mean colour, so that a picture's alignments can be worked out by hand."""

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
    """A text's id is its place in TEXTS: a text that was not stripped of its token is a ValueError."""

    def check_fits(self, config, network):
        if config["vocab_size"] < len(TEXTS):
            raise ValueError(f"{network} is too small")

    def __call__(self, texts):
        ids = torch.tensor([[list(TEXTS).index(text)] for text in texts])
        return ids, torch.ones_like(ids)


def colour(*rgb):
    return Image.new("RGB", (4, 4), rgb)


RED, GREEN, BLUE, GREY = colour(255, 0, 0), colour(0, 255, 0), colour(0, 0, 255), colour(80, 80, 80)


def test_alignments_by_hand():
    reward = Reward(FakeALIGN(), FakeTokenizer(), [RED, GREEN])
    align_i, align_t = reward.alignments([RED, GREY], ["a [V] dog", "a [V] dog in the snow"])
    third = (1 / math.sqrt(3) + 1) / 2
    assert align_i.tolist() == pytest.approx([(1 + 0.5) / 2, third], abs=1e-6)  # fp32 rounding
    assert align_t.tolist() == pytest.approx([1, third], abs=1e-6)
    got = reward([RED, GREY], ["a [V] dog", "a [V] dog in the snow"], 0.3)
    assert got.tolist() == pytest.approx([1 / (0.3 / 0.75 + 0.7), third], abs=1e-6)
    assert torch.equal(reward([RED], ["a [V] dog"], 0), align_t[:1])
    assert torch.equal(reward([RED], ["a [V] dog"], 1), align_i[:1])


def test_each_negative_gets_its_own_reward_with_its_own_prompt():
    """The release's bug: every label used the reward of the prompt's first negative, whichever image was drawn."""
    images = [colour(13 * i, 250 - 11 * i, 7 * i) for i in range(18)]  # six of each prompt, all different; two batches
    prompts = ["a [V] dog"] * 6 + ["a [V] dog in the snow"] * 6 + ["a red [V] dog"] * 5 + ["a red dog"]

    def make():
        return Reward(FakeALIGN(), FakeTokenizer(), [colour(250, 60, 0), BLUE])

    together = make()(images, prompts, 0.3)
    alone = torch.cat([make()([image], [prompt], 0.3) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert len({round(value, 4) for value in together.tolist()}) == len(images)
    order = [5 * i % 18 for i in range(18)]
    shuffled = make()([images[i] for i in order], [prompts[i] for i in order], 0.3)
    torch.testing.assert_close(shuffled, together[order], atol=1e-6, rtol=0)


def test_photos_and_texts_are_embedded_once_and_in_batches():
    align = FakeALIGN()
    reward = Reward(align, FakeTokenizer(), [RED, GREEN, BLUE])
    assert align.image_batches == [3]
    reward.alignments([RED] * 18, ["a [V] dog"] * 17 + ["a red [V] dog"])
    assert align.image_batches == [3, 16, 2] and align.text_batches == [2]
    reward.alignments([RED] * 3, ["a dog", "a red [V] dog", "a [V] dog in the snow"])
    assert align.text_batches == [2, 1]  # only the new text


def test_range_gradients_and_other_tokens():
    reward = Reward(FakeALIGN(), FakeTokenizer(), [RED], token="sks")
    align_i, align_t = reward.alignments([RED, BLUE], ["a sks dog", "a red sks dog"])
    for alignment in (align_i, align_t):
        assert not alignment.requires_grad and alignment.min() >= 0 and alignment.max() <= 1
    assert align_i.tolist() == pytest.approx([1, 0.5], abs=1e-6)


def test_rounding_never_leaves_the_range():
    assert _to_unit(torch.tensor([1.000001, 0.5, -1.000001])).tolist() == [1, 0.75, 0]


def test_autocast_around_the_reward_does_not_round_the_cosines():
    reward = Reward(FakeALIGN(), FakeTokenizer(), [colour(250, 61, 7), BLUE])
    plain = reward([colour(90, 120, 33)], ["a dog"], 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward([colour(90, 120, 33)], ["a dog"], 0.3), plain)


def test_odd_calls():
    reward = Reward(FakeALIGN(), FakeTokenizer(), [RED])
    assert [x.shape for x in reward.alignments([], [])] == [(0,), (0,)]
    assert reward([], [], 0.3).shape == (0,)
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        reward.alignments([RED, RED], ["a dog"])
    with pytest.raises(ValueError, match="at least one reference photo"):
        Reward(FakeALIGN(), FakeTokenizer(), [])
    small = FakeALIGN()
    small.config.text_config["vocab_size"] = 2
    with pytest.raises(ValueError, match=r"^ALIGN is too small"):
        Reward(small, FakeTokenizer(), [RED])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_told_with_the_network(value):
    align = FakeALIGN()
    reward = Reward(align, FakeTokenizer(), [RED])
    align.weight.data.fill_(value)
    words = "^FakeALIGN's features are not finite: its weights are damaged$"
    with pytest.raises(FloatingPointError, match=words):
        Reward(align, FakeTokenizer(), [RED])
    with pytest.raises(FloatingPointError, match=words):
        reward.alignments([RED], ["a dog"])
    for _ in range(2):  # nor is it kept and given out the second time
        with pytest.raises(FloatingPointError, match=words):
            reward.of_photos(["a dog"], 0.3)
    with pytest.raises(FloatingPointError, match=words):  # a network that is called itself, as DINO
        unit_features(align, lambda items: torch.ones(len(items), 3), [1, 2], torch.device("cpu"))


@pytest.mark.parametrize("lam", [0, 0.3, 1])
def test_photos_with_prompts_are_as_any_picture_and_are_not_embedded_again(lam):
    photos, prompts = [colour(250, 61, 7), BLUE, GREEN], ["a red [V] dog", "a [V] dog in the snow"]
    reward = Reward(FakeALIGN(), FakeTokenizer(), photos)
    table = torch.stack([reward([photo] * len(prompts), prompts, lam) for photo in photos])
    reward._image_features = None  # calling it would fail
    assert torch.allclose(reward.of_photos(prompts, lam), table, atol=1e-6)
