"""The label and the loss against formulas written out by hand in float64. Tolerance 1e-12: the rounding of float64."""

import math

import pytest
import torch

from rpo import denoising_loss, preference_label, preference_probability, rpo_loss

SIMILARITY, REF, GEN = [0.3, 0.8, 0.4], [0.5, 0.2, 0.9], [0.4, 0.7, 0.1]
BASE_REF, BASE_GEN, LABEL = [0.6, 0.25, 0.3], [0.45, 0.5, 0.35], [1.0, 0.0, 1.0]


def tensors():
    rows = (SIMILARITY, REF, GEN, BASE_REF, BASE_GEN, LABEL)
    return [torch.tensor(row, dtype=torch.float64).requires_grad_(row is not LABEL) for row in rows]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def margins(beta):
    pairs = zip(REF, GEN, BASE_REF, BASE_GEN, strict=True)
    return [beta * ((base_ref - ref) - (base_gen - gen)) for ref, gen, base_ref, base_gen in pairs]


@pytest.mark.parametrize(("beta", "similar", "weight"), [(1, 1, 1), (7, 1, 0.3), (0.1, 0.5, 0)])
def test_value_and_gradient_by_hand(beta, similar, weight):
    labelled = list(zip(margins(beta), LABEL, strict=True))
    preference = -sum(y * math.log(sigmoid(m)) + (1 - y) * math.log(sigmoid(-m)) for m, y in labelled) / 3
    similarity, ref, gen, base_ref, base_gen, label = tensors()
    loss = rpo_loss(similarity, ref, gen, base_ref, base_gen, label, beta, similar, weight)
    assert loss.similarity.item() == pytest.approx(0.5, abs=1e-12)
    assert loss.preference.item() == pytest.approx(preference, abs=1e-12)
    assert loss.total.item() == pytest.approx(similar * 0.5 + weight * preference, abs=1e-12)
    assert loss.margin.tolist() == pytest.approx(margins(beta), abs=1e-12)

    loss.total.backward()
    slopes = [weight * beta * (sigmoid(m) - y) / 3 for m, y in labelled]  # of Δ, times weight and β
    assert similarity.grad.tolist() == pytest.approx([similar / 3] * 3, abs=1e-12)
    assert ref.grad.tolist() == pytest.approx([-slope for slope in slopes], abs=1e-12)
    assert gen.grad.tolist() == pytest.approx(slopes, abs=1e-12)
    assert base_ref.grad is None and base_gen.grad is None  # θ₀ is frozen


def test_margin_and_accuracy_carry_no_gradient_and_accuracy_counts_agreeing_signs():
    loss = rpo_loss(*tensors())
    assert loss.margin.tolist() == pytest.approx([0.05, 0.25, -0.85])  # the labels are 1, 0, 1: the first agrees
    assert loss.accuracy.item() == pytest.approx(1 / 3)
    assert loss.total == loss.similarity + loss.preference  # the defaults of β and of the weights are 1, the paper's
    assert not loss.margin.requires_grad and not loss.accuracy.requires_grad
    zero = torch.zeros(4)
    assert rpo_loss(zero, zero, zero, zero, zero, torch.tensor([1.0, 0, 1, 0])).accuracy == 0


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_huge_margins_stay_finite(y):
    zero, ref = torch.zeros(1), torch.full((1,), 1e4, requires_grad=True)
    loss = rpo_loss(zero, ref, zero, zero, zero, torch.full((1,), y))
    assert loss.preference.item() == pytest.approx(1e4 if y else 0)
    loss.total.backward()
    assert ref.grad.isfinite().all()


def test_probability():
    """Of every photo with every negative: (photos, 1) and (negatives,) are broadcast."""
    r_ref, r_gen = torch.tensor([[0.9], [0.5]], dtype=torch.float64), torch.tensor([0.6, 0.7, 1.0], dtype=torch.float64)
    p = preference_probability(r_ref, r_gen)
    expected = [[sigmoid(0.3), sigmoid(0.2), sigmoid(-0.1)], [sigmoid(-0.1), sigmoid(-0.2), sigmoid(-0.5)]]
    assert p.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]


def test_label_frequency_and_seed():
    expected = [0.0, 0.27, 0.5, 0.73, 1.0]
    p = torch.tensor(expected).repeat(20_000, 1)
    labels = preference_label(p, torch.Generator().manual_seed(0))
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    frequency = labels.mean(0).tolist()  # standard error at most 0.0036: 0.015 is four of them
    assert frequency == pytest.approx(expected, abs=0.015) and frequency[0] == 0 and frequency[-1] == 1
    assert torch.equal(labels, preference_label(p, torch.Generator().manual_seed(0)))
    assert not torch.equal(labels, preference_label(p, torch.Generator().manual_seed(1)))


def test_denoising_loss_is_a_mean_square_a_sample_in_fp32():
    prediction = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]], requires_grad=True)
    target = torch.tensor([[[1.0, 0.0]], [[3.0, 1.0]]])
    loss = denoising_loss(prediction, target)
    assert loss.tolist() == [2.0, 5.0]
    loss[1].backward()
    assert prediction.grad.tolist() == [[[0.0, 0.0]], [[-3.0, -1.0]]]  # 2 (prediction - target) / 2 elements
    assert denoising_loss(prediction.bfloat16(), target.bfloat16()).dtype == torch.float32
    # 300² overflows fp16: the square must be computed in fp32
    assert denoising_loss(torch.full((1, 4), 300.0).half(), torch.zeros(1, 4).half()).item() == 90_000
