"""Prior preservation against a float64 formula written out by hand. Tolerance 1e-12: the rounding of float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from baselines.dreambooth import DreamBooth, dreambooth_loss

REF, CLASS = [0.5, 0.2, 0.9], [0.4, 0.7, 0.1]


def tensors():
    return [torch.tensor(x, dtype=torch.float64) for x in (REF, CLASS)]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_loss_is_the_formula(weight):
    loss = dreambooth_loss(*tensors(), weight)
    assert loss.similarity.item() == pytest.approx(sum(REF) / 3, abs=1e-12)
    assert loss.prior.item() == pytest.approx(sum(CLASS) / 3, abs=1e-12)
    assert loss.total.item() == pytest.approx((sum(REF) + weight * sum(CLASS)) / 3, abs=1e-12)


def test_default_weight_is_one():
    assert dreambooth_loss(*tensors()) == dreambooth_loss(*tensors(), 1.0) == DreamBooth().loss(*tensors())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradients_match_finite_differences(weight):
    ref, prior = (x.requires_grad_() for x in tensors())
    assert torch.autograd.gradcheck(lambda a, b: dreambooth_loss(a, b, weight).total, (ref, prior))


def test_weight_zero_is_similarity_alone():
    """The value, the gradient, and whatever the class images say: even ∞ does not get in."""
    ref, prior = (x.requires_grad_() for x in tensors())
    loss = DreamBooth(prior_weight=0).loss(ref, prior * math.inf)
    assert loss.total == loss.similarity == ref.mean()
    loss.total.backward()
    assert ref.grad.tolist() == pytest.approx([1 / 3] * 3, abs=1e-12) and prior.grad is None


def test_bad_shapes_and_weights():
    ref, prior = tensors()
    for wrong in (prior[:, None], prior[:1], prior.sum()):
        with pytest.raises(ValueError, match=r"^dreambooth_loss: [^\n]*batch > 0[^\n]*$"):
            dreambooth_loss(ref, wrong)
    with pytest.raises(ValueError, match="batch > 0"):
        dreambooth_loss(ref[:0], prior[:0])
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^dreambooth_loss: the prior's weight[^\n]*$"):
            dreambooth_loss(ref, prior, weight)


def test_what_it_draws():
    assert DreamBooth().drawn_prompts(SimpleNamespace(class_prompt="a photo of a dog"), 3) == ["a photo of a dog"] * 3
