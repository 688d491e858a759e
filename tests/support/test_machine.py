"""machine.py: θ, θ₀ and the optimizer, in every precision, with LoRA and with gradient checkpointing."""

import copy
import math

import pytest
import torch
from torch import nn

from model.lora import add_lora
from model.stable_diffusion import StableDiffusion
from support import machine
from support.machine import Machine, Optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def inputs():
    draws = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=draws), torch.tensor([7, 900]), torch.randn(2, 5, 32, generator=draws)


def error(unet):
    return unet(*inputs()).square().mean()


@pytest.fixture
def sd(world):
    return StableDiffusion.from_pretrained(world / "base")


def test_default_precision(monkeypatch):
    assert machine.precision(None, CPU) == machine.precision(None, torch.device("mps")) == "fp32"
    assert machine.precision("bf16", CPU) == "bf16" and machine.precision("fp32", CUDA) == "fp32"
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert machine.precision(None, CUDA) == expected


@pytest.mark.parametrize("lora", [False, True])
def test_cast_frozen_weights_change_no_prediction(sd, lora):
    unet = sd.unet
    if lora:
        add_lora(unet, 2, generator=torch.Generator())
    rounded, other = copy.deepcopy(unet), nn.Module()
    other.weight = rounded.conv_in.weight  # of another network, which must not change
    machine.cast_frozen_weights(rounded, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in rounded.named_parameters()}
    assert dtypes["conv_in.weight"] == dtypes["mid_block.attentions.0.proj_out.weight"] == torch.bfloat16
    assert dtypes["conv_norm_out.weight"] == other.weight.dtype == torch.float32  # autocast computes norms in fp32
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if "lora" in name)  # they are trained
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded(*inputs()), unet(*inputs()))
    assert not torch.equal(unet(*inputs()), rounded.float()(*inputs()))  # in fp32 it would show


def test_only_the_chosen_parameters_are_trained(sd):
    """Norms too, in whose gradient torch would crash if nothing before them needed one."""
    run = Machine(sd, lambda unet: unet.mid_block.parameters())
    Optimizer(run, 0.01, 0.01, 1.0).minimize(error(run.theta))
    for name, weight in run.weights().items():
        assert torch.equal(weight, run.base_unet.state_dict()[name]) != name.startswith("mid_block"), name


def fp16(sd, scale):
    """A run in fp16, with this scale of the loss at the start."""
    sd = copy.deepcopy(sd)  # Machine rounds its U-Net
    sd.precision = torch.float16
    run = Machine(sd)
    optimizer = Optimizer(run, 1e-3, 0.01, 1.0)
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return run, optimizer


def test_fp16_scales_the_loss(sd):
    """Not the norm. A step that overflows is skipped; if all do, the run ends: the scale would be halved forever."""
    exact = Machine(sd)
    norm = Optimizer(exact, 1e-3, 0.01, 1.0).minimize(error(exact.theta))
    run, optimizer = fp16(sd, 2.0**10)
    assert norm != optimizer.minimize(error(run.theta)) == pytest.approx(norm.item(), rel=0.1)
    run, optimizer = fp16(sd, 2.0**127)
    before, loss = copy.deepcopy(run.weights()), error(run.theta)
    row = optimizer.numbers(1, {"total": loss, "gradient_norm": optimizer.minimize(loss)})
    assert row == {"total": pytest.approx(loss.item()), "gradient_norm": None}
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())
    assert optimizer.scaler.get_scale() == 2.0**126
    run, optimizer = fp16(sd, 1.0)
    with pytest.raises(FloatingPointError, match="try --precision fp32"):
        optimizer.minimize(error(run.theta) * math.inf)


@pytest.mark.parametrize("half", [False, True])
def test_the_term_that_is_not_finite_is_named(sd, half):
    numbers = (fp16(sd, 1.0)[1] if half else Optimizer(Machine(sd), 1e-3, 0.01, 1.0)).numbers
    nan, inf, one = torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(1.0)
    good = {"total": one, "margin": torch.tensor([1.0, 2.0]), "gradient_norm": one}
    assert numbers(1, good | {"label": None}) == {"total": 1.0, "margin": 1.5, "gradient_norm": 1.0}
    assert numbers(1, good | {"margin": nan})["total"] == 1.0  # no part of the total
    advice = "--lr, or --precision fp32" if half else "--lr$"
    with pytest.raises(FloatingPointError, match=rf"loss is nan at step 7 \(preference is inf\).*{advice}"):
        numbers(7, {"total": nan, "similarity": one, "preference": inf, "gradient_norm": nan})
    with pytest.raises(FloatingPointError, match=r"\(total is nan\)"):
        numbers(7, good | {"total": nan})
    if not half:
        with pytest.raises(FloatingPointError, match="gradient_norm is inf"):
            numbers(7, good | {"gradient_norm": inf})


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_checkpointed_gradients_are_the_same(sd, lora_rank):
    kept, gradients = [], []
    for checkpointed in (False, True):
        run = Machine(copy.deepcopy(sd), lora_rank=lora_rank, checkpoint_gradients=checkpointed)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = (run.theta(*inputs()) - run.theta_0(*inputs())).square().mean() + error(run.theta)
        loss.backward()
        kept.append(sum(saved))
        gradients.append([parameter.grad for parameter in run.parameters])
    assert all(map(torch.equal, *gradients)) and any(gradient.any() for gradient in gradients[0])
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_learns_fp32_weights_and_resumes_exactly(sd, precision):
    def new():
        part = copy.deepcopy(sd)
        part.precision = precision
        return Optimizer(Machine(part), 1e-3, 0.01, 1.0)

    whole, resumed = new(), new()
    for step in (1, 2, 3):
        whole.minimize(error(whole.machine.theta))
        if step > 1:
            resumed.minimize(error(resumed.machine.theta))
        else:
            for name, part in resumed.state().items():
                part.load_state_dict(copy.deepcopy(whole.state()[name].state_dict()))
            machine.own_averages(resumed.adamw)
    weights, others = whole.machine.weights(), resumed.machine.weights()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, others[name]) for name, tensor in weights.items())
    assert bool(whole.scaler.state_dict()) == (precision == torch.float16)
