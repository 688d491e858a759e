"""The label and the loss, against float64 formulas written out by hand. Tolerances: 1e-12, the rounding of float64."""

import math

import pytest
import torch

from rpo import denoising_loss, preference_label, preference_probability, rpo_loss

REF, GEN, BASE_REF, BASE_GEN = [0.5, 0.2, 0.9], [0.4, 0.7, 0.1], [0.6, 0.25, 0.3], [0.45, 0.5, 0.35]
LABEL = [1.0, 0.0, 1.0]


def tensors():
    return [torch.tensor(x, dtype=torch.float64) for x in (REF, GEN, BASE_REF, BASE_GEN, LABEL)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(beta):
    """(margins, similarity, preference) with Python floats, in the paper's form."""
    pairs = zip(REF, GEN, BASE_REF, BASE_GEN, strict=True)
    margins = [beta * ((base_ref - ref) - (base_gen - gen)) for ref, gen, base_ref, base_gen in pairs]
    labelled = list(zip(margins, LABEL, strict=True))
    preference = -sum(y * math.log(sigmoid(m)) + (1 - y) * math.log(sigmoid(-m)) for m, y in labelled) / 3
    return margins, sum(REF) / 3, preference


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
def test_loss_is_the_formula(beta):
    margins, similarity, preference = by_hand(beta)
    loss = rpo_loss(*tensors(), beta)
    assert loss.margin.tolist() == pytest.approx(margins, abs=1e-12)
    assert loss.similarity.item() == pytest.approx(similarity, abs=1e-12)
    assert loss.preference.item() == pytest.approx(preference, abs=1e-12)
    assert loss.total.item() == pytest.approx(similarity + preference, abs=1e-12)


def test_beta_matters():
    values = [rpo_loss(*tensors(), beta).preference.item() for beta in (0.1, 1.0, 7.0)]
    assert len({round(value, 6) for value in values}) == 3


def test_accuracy_counts_agreeing_signs():
    # at beta 1 the margins are +0.05, +0.25, -0.85 and the labels 1, 0, 1: only the first agrees
    assert rpo_loss(*tensors(), 1.0).accuracy.item() == pytest.approx(1 / 3)
    zero = torch.zeros(4)
    assert rpo_loss(zero, zero, zero, zero, torch.tensor([1.0, 0, 1, 0]), 1.0).accuracy == 0


def test_untrained_model_has_preference_log_2():
    ref, gen, _, _, label = tensors()
    loss = rpo_loss(ref, gen, ref, gen, label, 1.0)
    assert loss.margin.tolist() == [0, 0, 0]
    assert loss.preference.item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("y, ref_sign, gen_sign", [(1.0, 1, -1), (0.0, -1, 1)])
def test_gradient_signs(y, ref_sign, gen_sign):
    """y = 1 pushes ℓ(x_ref) down and ℓ(x_gen) up; y = 0 the reverse. Similarity always pushes ℓ(x_ref) down."""
    ref, gen, base_ref, base_gen, label = tensors()
    ref.requires_grad_(), gen.requires_grad_()
    loss = rpo_loss(ref, gen, base_ref, base_gen, torch.full_like(label, y), 1.0)
    grad_ref, grad_gen = torch.autograd.grad(loss.preference, [ref, gen], retain_graph=True)
    assert (grad_ref.sign() == ref_sign).all() and (grad_gen.sign() == gen_sign).all()
    (grad_similarity,) = torch.autograd.grad(loss.similarity, ref)
    torch.testing.assert_close(grad_similarity, torch.full_like(ref, 1 / 3))


def test_gradients_match_finite_differences():
    ref, gen, base_ref, base_gen, label = tensors()
    ref.requires_grad_(), gen.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rpo_loss(a, b, base_ref, base_gen, label, 2.0).total, (ref, gen))


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.5])
def test_preference_weight_scales_the_preference_alone(weight):
    """The value, the parts, and the gradient against finite differences."""
    _, similarity, preference = by_hand(2.0)
    loss = rpo_loss(*tensors(), 2.0, weight)
    assert loss.total.item() == pytest.approx(similarity + weight * preference, abs=1e-12)
    assert loss.similarity.item() == pytest.approx(similarity, abs=1e-12)
    assert loss.preference.item() == pytest.approx(preference, abs=1e-12)
    ref, gen, *fixed = tensors()
    ref.requires_grad_(), gen.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rpo_loss(a, b, *fixed, 2.0, weight).total, (ref, gen))


def test_preference_weight_zero_is_similarity_alone():
    """Whatever the preference is: even NaN does not get in."""
    ref, gen, base_ref, base_gen, label = tensors()
    loss = rpo_loss(ref.requires_grad_(), gen * math.inf, base_ref, base_gen, label, 1.0, 0.0)
    assert loss.preference.isnan() and loss.total == loss.similarity == ref.mean()
    loss.total.backward()
    assert ref.grad.tolist() == pytest.approx([1 / 3] * 3, abs=1e-12)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_bad_preference_weight(weight):
    with pytest.raises(ValueError, match="preference_weight"):
        rpo_loss(*tensors(), 1.0, weight)


def test_base_and_diagnostics_carry_no_gradient():
    ref, gen, base_ref, base_gen, label = (x.requires_grad_() for x in tensors())
    loss = rpo_loss(ref, gen, base_ref, base_gen, label.detach(), 1.0)
    assert not loss.margin.requires_grad and not loss.accuracy.requires_grad
    loss.total.backward()
    assert base_ref.grad is None and base_gen.grad is None and ref.grad is not None


def test_swapping_roles_and_label_changes_nothing_but_the_margins_sign():
    ref, gen, base_ref, base_gen, label = tensors()
    loss = rpo_loss(ref, gen, base_ref, base_gen, label, 1.5)
    swapped = rpo_loss(gen, ref, base_gen, base_ref, 1 - label, 1.5)
    torch.testing.assert_close(swapped.margin, -loss.margin)
    torch.testing.assert_close(swapped.preference, loss.preference)
    torch.testing.assert_close(swapped.accuracy, loss.accuracy)


def test_huge_margins_stay_finite():
    zero, huge = torch.zeros(1), torch.full((1,), 1e4)
    for y in (0.0, 1.0):
        ref = huge.clone().requires_grad_()
        loss = rpo_loss(ref, zero, zero, zero, torch.full((1,), y), 1.0)
        assert loss.preference.item() == pytest.approx(1e4 if y else 0)
        loss.total.backward()
        assert ref.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0, -1.0, math.nan, math.inf])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match=r"^beta must be a positive number[^\n]*$"):
        rpo_loss(*tensors(), beta)


def test_bad_shapes():
    ref, gen, base_ref, base_gen, label = tensors()
    for wrong in (label[:, None], label[:1], label.sum()):
        with pytest.raises(ValueError, match="batch"):
            rpo_loss(ref, gen, base_ref, base_gen, wrong, 1.0)
    with pytest.raises(ValueError, match="batch > 0"):
        rpo_loss(*[x[:0] for x in tensors()], 1.0)


def test_probability():
    r_ref, r_gen = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.6, 0.7], dtype=torch.float64)
    expected = [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(0.2))]
    assert preference_probability(r_ref, r_gen).tolist() == pytest.approx(expected, abs=1e-12)
    expected = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(2))]
    assert preference_probability(r_ref, r_gen, tau=0.1).tolist() == pytest.approx(expected, abs=1e-12)
    assert preference_probability(0.9, 0.6).item() == pytest.approx(1 / (1 + math.exp(-0.3)), abs=1e-6)
    with pytest.raises(ValueError, match="tau"):
        preference_probability(r_ref, r_gen, tau=0)


def test_label_frequency_and_seed():
    p = torch.tensor([0.0, 0.27, 0.5, 0.73, 1.0]).repeat(20_000, 1)
    labels = preference_label(p, torch.Generator().manual_seed(0))
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    frequency = labels.mean(0)  # standard error at most 0.0036: 0.015 is four of them
    assert frequency.tolist() == pytest.approx([0.0, 0.27, 0.5, 0.73, 1.0], abs=0.015)
    assert frequency[0] == 0 and frequency[-1] == 1
    assert torch.equal(labels, preference_label(p, torch.Generator().manual_seed(0)))
    assert not torch.equal(labels, preference_label(p, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_label_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        preference_label(torch.tensor([0.5, p]), torch.Generator())


def test_denoising_loss():
    prediction = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    target = torch.tensor([[[1.0, 0.0]], [[3.0, 1.0]]])
    assert denoising_loss(prediction, target).tolist() == [2.0, 5.0]
    half = denoising_loss(prediction.bfloat16(), target.bfloat16())
    assert half.dtype == torch.float32 and half.tolist() == [2.0, 5.0]
    # 300² overflows fp16: the square must be taken in fp32
    assert denoising_loss(torch.full((1, 4), 300.0).half(), torch.zeros(1, 4).half()).item() == 90_000
    with pytest.raises(ValueError, match="differ"):
        denoising_loss(prediction, target[:1])


def test_denoising_loss_has_the_gradient_of_a_mean_square():
    """2 (prediction - target) / elements, a sample at a time. 1e-6: it is taken in fp32."""
    draws = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 3, 4, generator=draws) for _ in range(2))
    prediction.requires_grad_()
    for i in range(2):
        (gradient,) = torch.autograd.grad(denoising_loss(prediction, target)[i], prediction)
        expected = torch.zeros_like(target)
        expected[i] = 2 * (prediction[i] - target[i]).detach() / 12
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)
