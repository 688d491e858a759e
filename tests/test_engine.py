"""engine.py, and what train.py does with it: precision, gradient checkpointing, the estimate, torch.compile."""

import argparse
import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import UNET, call, error_line, write_base, write_photos
from torch import nn

import sample
import train
from model.files.config import config_from
from model.files.errors import CheckpointError
from model.lora import add_lora, lora_of, without_lora
from model.stable_diffusion import StableDiffusion
from model.unet import UNet, UNetConfig
from support import machine, memory, ranks
from toy.networks import WEIGHTS

QUICK = ("--steps", 2, "--validate-every", 1, "--solver-steps", 1, "--images-per-prompt", 1, "--lr", 1e-3)
CPU = torch.device("cpu")


def flags(**changed):
    """train.py's flags as they are after `settle`, on a GPU."""
    given = {"precision": "bf16", "checkpoint_gradients": False, "lora_rank": None, "batch": 4, "resolution": None}
    return argparse.Namespace(**given | changed)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(config_from(UNetConfig, UNET))


def inputs(batch=2):
    draws = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 8, 8, generator=draws), torch.tensor([7, 900]), torch.randn(2, 5, 32, generator=draws)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_base(folder / "base")
    write_photos(folder / "dog")
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *more: call(
        train, monkeypatch, "--subject", world / "dog", "--base", world / "base", *QUICK, "--device", "cpu", *more
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "best.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------- precision


def test_default_precision(monkeypatch):
    assert machine.precision(None, CPU) == machine.precision(None, torch.device("mps")) == "fp32"
    assert machine.precision("bf16", CPU) == "bf16"
    for knows, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, knows=knows: knows)
        assert machine.precision(None, torch.device("cuda")) == expected
        assert machine.precision("fp32", torch.device("cuda")) == "fp32"


@pytest.mark.parametrize("lora", [False, True])
def test_rounded_frozen_weights_change_no_prediction(unet, lora):
    learned = add_lora(unet, 2, generator=torch.Generator()) if lora else None
    unet.requires_grad_(False)
    if lora:
        learned.requires_grad_(True)
    rounded = copy.deepcopy(unet)
    machine.round_frozen(rounded, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in rounded.named_parameters()}
    assert dtypes["conv_in.weight"] == dtypes["mid_block.attentions.0.proj_out.weight"] == torch.bfloat16
    assert dtypes["conv_norm_out.weight"] == torch.float32  # autocast computes the norms in fp32
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if "lora" in name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded(*inputs()), unet(*inputs()))
    assert not torch.equal(unet(*inputs()), rounded.float()(*inputs()))  # in fp32 it would show


def test_a_frozen_network_that_learns_is_left_alone(unet):
    machine.round_frozen(unet.requires_grad_(True), torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in unet.parameters())


def test_half_precision_draws_other_numbers_and_the_same_picture(world, tmp_path, monkeypatch):
    pictures = {}
    for precision in ("fp32", "bf16", "fp16"):
        sd = StableDiffusion.from_pretrained(world / "base")
        sd.precision = machine.PRECISIONS[precision]
        seen = []
        sd.vae.decoder.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.dtype))
        pictures[precision] = torch.tensor(list(sd.generate(["a dog"], [0], steps=2)[0].tobytes()), dtype=torch.float)
        # fp16 would overflow in the decoder of a real VAE
        assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]
    for precision in ("bf16", "fp16"):
        assert not torch.equal(pictures[precision], pictures["fp32"])
        assert (pictures[precision] - pictures["fp32"]).abs().mean() < 4  # of 255; chance would give some 80
    assert call(sample, monkeypatch, "--base", world / "base", "--precision", "fp8") == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_fp32_weights_and_resumes_exactly(run, tmp_path, monkeypatch, precision):
    results, step = [], train.Trainer.step
    for folder, stop in (("whole", None), ("twice", 2)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)

        def interrupted(self, now, stop=stop):
            if now == stop:
                raise KeyboardInterrupt
            return step(self, now)

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "step", interrupted)
            assert run("--precision", precision) == (130 if stop else 0)
        if stop:
            scaler = torch.load("best.state.pt")["scaler"]
            assert bool(scaler) == (precision == "fp16")
            assert run("--precision", precision, "--resume") == 0
        results.append(load_file("best.safetensors"))
        assert all(math.isfinite(row["total"]) for row in rows(tmp_path / folder) if "total" in row)
    assert all(tensor.dtype == torch.float32 for tensor in results[0].values())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_fp16_clips_the_gradient_and_not_its_multiple(run, tmp_path):
    norms = []
    for precision in ("fp32", "fp16"):
        assert run("--precision", precision, "--steps", 1) == 0
        norms.append(rows(tmp_path)[1]["gradient_norm"])
    assert norms[0] != norms[1] == pytest.approx(norms[0], rel=0.1)


def test_fp16_that_overflows_at_every_scale_ends_the_run(run, monkeypatch, capsys):
    """GradScaler would halve its scale, and pass over steps, for ever; the run would end with the base's weights."""

    class Small(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", Small)
    unscale = Small.unscale_

    def unscale_(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.fill_(torch.inf)
        unscale(self, optimizer)

    monkeypatch.setattr(Small, "unscale_", unscale_)
    assert run("--precision", "fp16", "--steps", 9) == 2
    assert "try --precision fp32" in capsys.readouterr().err


def test_fp16_passes_over_a_step_that_overflows(run, tmp_path, monkeypatch):
    """Its gradients times a scale so large are infinite: no NaN, no step, and half of the scale for the next."""
    scalers, kept = [], []

    class Huge(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0**127, enabled=enabled)
            scalers.append(self)

    monkeypatch.setattr(torch.amp, "GradScaler", Huge)
    step = train.Trainer.step

    def watched(self, now):
        before = copy.deepcopy(self.unet.state_dict())
        row = step(self, now)
        kept.append(all(torch.equal(tensor, before[name]) for name, tensor in self.unet.state_dict().items()))
        return row

    monkeypatch.setattr(train.Trainer, "step", watched)
    assert run("--precision", "fp16", "--steps", 1) == 0
    assert kept == [True] and scalers[0].get_scale() == 2.0**126
    assert rows(tmp_path)[1]["gradient_norm"] is None


# ---------------------------------------------------------------------------------------------- no number


def test_the_term_that_is_no_number_is_named():
    tensors = {"total": torch.tensor(2.0), "similarity": torch.ones(()), "margin": torch.tensor([1.0, 2.0])}
    good = machine.numbers(tensors | {"gradient_norm": torch.tensor(3.0)})
    assert good == {"total": 2.0, "similarity": 1.0, "margin": 1.5, "gradient_norm": 3.0}
    assert machine.check_numbers(good, 1) == machine.check_numbers(good, 1, scaled=True) == good
    wrong = {"total": math.nan, "similarity": 1.0, "preference": math.inf, "gradient_norm": 3.0}
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 7 \(preference is inf\).*--lr"):
        machine.check_numbers(wrong, 7)
    with pytest.raises(FloatingPointError, match="preference"):  # a scaler excuses gradients, not a loss
        machine.check_numbers(wrong | {"gradient_norm": math.nan}, 7, scaled=True)
    overflow = good | {"gradient_norm": math.inf}
    with pytest.raises(FloatingPointError, match="gradient_norm is inf"):
        machine.check_numbers(overflow, 7)
    assert machine.check_numbers(overflow, 7, scaled=True)["gradient_norm"] is None
    assert machine.check_numbers(good | {"margin": math.nan}, 1)["total"] == 2.0  # no part of the total


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_best(run, tmp_path, monkeypatch, capsys):
    loss = train.denoising_loss
    calls = []

    def broken(prediction, target):
        calls.append(0)
        return loss(prediction, target) * (math.nan if len(calls) > 2 else 1)  # θ₀ and θ of the second step

    monkeypatch.setattr(train, "denoising_loss", broken)
    assert run() == 2
    assert "step 2 (similarity is nan)" in capsys.readouterr().err.splitlines()[-1]
    assert load_file("best.safetensors")["conv_in.weight"].isfinite().all()


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointed_gradients_are_the_same(unet, lora):
    learned = add_lora(unet, 2, generator=torch.Generator()) if lora else unet
    kept, gradients = [], []
    for checkpointed in (False, True):
        if checkpointed:
            unet.checkpoint_gradients()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            with torch.no_grad(), without_lora(unet):
                base = unet(*inputs())
            loss = (unet(*inputs()) - base).square().mean() + unet(*inputs()).square().mean()
        kept.append(sum(saved))
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in learned.parameters()])
        learned.zero_grad(set_to_none=True)
    assert all(map(torch.equal, *gradients)) and any(gradient.abs().sum() > 0 for gradient in gradients[0])
    assert kept[1] < kept[0] / 3


def test_a_checkpointed_run_is_the_same_run(run, tmp_path):
    results = []
    for more in ((), ("--checkpoint-gradients",), ("--lora-rank", 2), ("--lora-rank", 2, "--checkpoint-gradients")):
        assert run(*more) == 0
        results.append(load_file(tmp_path / "best.safetensors"))
    for plain, checkpointed in (results[:2], results[2:]):
        assert all(torch.equal(tensor, checkpointed[name]) for name, tensor in plain.items())


SD15 = UNetConfig()
OTHERS = 380_000_000  # VAE, text encoder and ALIGN


def estimated(**changed):
    return memory.estimate(SD15, **{"others": OTHERS, "side": 64, "batch": 1, "precision": "bf16"} | changed)


def test_estimate_counts_the_weights():
    weights = 859_520_964  # of Stable Diffusion 1.5's U-Net
    parts = estimated()
    assert parts["weights"] == (4 + 2) * weights and parts["AdamW"] == 8 * weights
    assert parts["other networks"] == 4 * OTHERS
    parts = estimated(precision="fp32")
    assert parts["weights"] == (4 + 4) * weights
    adapters = 16 * 199_296  # 3.2 M at rank 16, as diffusers' LoRA of SD 1.5 has
    parts = estimated(lora_rank=16)
    assert parts["weights"] == 2 * weights + 4 * adapters and parts["AdamW"] == 8 * adapters


def test_estimate_of_the_modes():
    """The goals: at 512 px in bf16, 18 GB for the whole U-Net, 10 for LoRA, 6 with gradient checkpointing."""
    total = {
        (rank, checkpointed): sum(estimated(lora_rank=rank, checkpointed=checkpointed).values())
        for rank in (None, 16)
        for checkpointed in (False, True)
    }
    assert total[None, False] < 18e9 and total[16, False] < 10e9 and total[16, True] < 6e9
    assert total[None, True] < total[None, False] and total[16, True] < total[16, False] < total[None, True]


def test_estimate_grows():
    for grown in ({"batch": 2}, {"side": 96}, {"precision": "fp32"}):
        assert sum(estimated(lora_rank=4, **grown).values()) > sum(estimated(lora_rank=4).values())
        assert estimated(lora_rank=4, **grown)["a step"] > 1.4 * estimated(lora_rank=4)["a step"]


def test_estimate_of_a_step_is_what_autograd_keeps(unet):
    """Counted in a real forward pass in fp32, of a batch so large that what backward() adds is little beside it."""
    weights, kept, pairs, side = {each.data_ptr() for each in unet.parameters()}, {}, 16, 16

    def note(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = unet(torch.randn(2 * pairs, 4, side, side), 7, torch.randn(2 * pairs, 5, 32))
    assert out.requires_grad
    assert memory.estimate(unet.config, 0, side, pairs)["a step"] == pytest.approx(sum(kept.values()), rel=0.1)


def test_remedies_come_in_order():
    def of(**changed):
        return memory.remedy(flags(**changed))

    first = of(precision="fp32")
    flags_in_order = ("bf16", "--lora-rank", "--checkpoint-gradients", "--batch", "larger machine")
    order = [first.index(flag) for flag in flags_in_order]
    assert order == sorted(order)
    assert of().startswith("try --lora-rank 16, then --checkpoint-gradients, then a smaller --batch")
    assert of(checkpoint_gradients=True).startswith("try --lora-rank 16")
    assert of(checkpoint_gradients=True, lora_rank=4).startswith("try a smaller --batch")
    assert of(checkpoint_gradients=True, lora_rank=4, batch=1).startswith("try a larger machine")


def test_short_memory_is_told_and_the_frozen_networks_go_between_validations(run, tmp_path, monkeypatch, capsys):
    """Played on the CPU: where the networks are asked to be, and that the result is the same."""
    assert run() == 0
    plain, out = load_file("best.safetensors"), capsys.readouterr()
    assert "memory, estimated" in out.out and "warning" not in out.out
    moves = []
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e3)
    monkeypatch.setattr(nn.Module, "cpu", lambda self: moves.append("away"))
    visiting = memory.visiting
    monkeypatch.setattr(memory, "visiting", lambda away, device: moves.append("back") or visiting(away, device))
    assert run() == 0
    assert "warning: this GPU has" in capsys.readouterr().out
    assert moves == ["away"] * 3 + (["back"] + ["away"] * 3) * 3
    assert all(torch.equal(tensor, plain[name]) for name, tensor in load_file("best.safetensors").items())


def test_drawing_batch_follows_free_memory(world, monkeypatch):
    sd = StableDiffusion.from_pretrained(world / "base")
    assert sd.drawing_batch() == 8
    sd.device, sd.precision, free = torch.device("cuda"), torch.bfloat16, {}
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["GB"] * 1e9 - 1e9, 80e9))
    for gigabytes, expected in ((1, 2), (2, 4), (4, 8), (24, 16), (80, 16), (0.1, 1)):
        free["GB"] = gigabytes
        assert sd.drawing_batch(512) == expected
    free["GB"] = 24
    assert sd.drawing_batch(512, reserve=23 * 10**9) == 2
    assert sd.drawing_batch(2048) == 4
    free["GB"], sd.precision = 4, torch.float32
    assert sd.drawing_batch(512) == 4


def test_a_full_gpu_names_the_next_flag(run, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Trainer, "prepare", full)
    assert run("--checkpoint-gradients", "--precision", "bf16", "--batch", 2) == 2
    assert "try --lora-rank 16, then a smaller --batch" in error_line(capsys)


# ---------------------------------------------------------------------------------------------- torch.compile


def test_compiled_keeps_its_keys_and_heeds_the_switch(unet, monkeypatch):
    """With a backend that needs no compiler."""
    add_lora(unet, 2, generator=torch.Generator())
    nn.init.ones_(next(iter(lora_of(unet).values())).lora_up.weight)
    keys, plain = list(unet.state_dict()), unet(*inputs())
    with torch.no_grad(), without_lora(unet):
        base = unet(*inputs())
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compiler(*args, backend="eager"))
    machine.compile_networks([unet], CPU)
    assert unet._compiled_call_impl is not None and list(unet.state_dict()) == keys
    assert torch.allclose(unet(*inputs()), plain, atol=1e-6)
    with torch.no_grad(), without_lora(unet):
        assert torch.allclose(unet(*inputs()), base, atol=1e-6)
    assert not torch.allclose(base, plain, atol=1e-4)
    assert torch.allclose(unet(*inputs()), plain, atol=1e-6)


def test_no_compiler_is_one_line(run, monkeypatch, capsys):
    def missing(function):
        raise RuntimeError("No working C++ compiler found\nand a page of advice")

    monkeypatch.setattr(torch, "compile", missing)
    assert run("--compile") == 2
    assert "--compile needs a C++ compiler, which failed: No working" in error_line(capsys)


def test_flags_are_few():
    """At most twenty, but for the method's."""
    *groups, method = train.arguments()._action_groups
    flags = [action for group in groups for action in group._group_actions if action.dest != "help"]
    assert method.title.startswith("the method") and len(method._group_actions) > 5
    assert 15 <= len(flags) <= 20


def test_a_process_holds_its_own_pairs_alone(monkeypatch):
    common = {"base": WEIGHTS, "align": WEIGHTS / "reward", "variant": None, "prediction_type": None}
    of_one = memory.estimate_of(flags(batch=2, **common))
    monkeypatch.setattr(ranks, "world", lambda: 3)
    assert memory.estimate_of(flags(batch=5, **common)) == of_one
    assert "a smaller --batch" in memory.remedy(flags(batch=5))
    assert "smaller --batch" not in memory.remedy(flags(batch=3))


def test_a_single_file_is_estimated_as_it_is_loaded(tmp_path):
    """One that does not say what it predicts, so that the command line has to."""
    StableDiffusion.from_pretrained(WEIGHTS).export(tmp_path / "told.safetensors", {})
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "told.safetensors"), bare)  # without the header
    common = {"align": WEIGHTS / "reward", "variant": None}
    with pytest.raises(CheckpointError, match="what it predicts"):
        memory.estimate_of(flags(base=bare, prediction_type=None, **common))
    ours = memory.estimate_of(flags(base=bare, prediction_type="epsilon", **common))
    assert ours["weights"] == memory.estimate_of(flags(base=WEIGHTS, prediction_type=None, **common))["weights"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_channels", -4), ("layers_per_block", -1), ("block_out_channels", "x"), ("down_block_types", ["Foo", "Foo"])],
)
def test_a_wrong_configuration_is_named_before_anything_is_loaded(world, run, tmp_path, capsys, name, value):
    shutil.copytree(world / "base", tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    assert run("--base", tmp_path / "base") == 2
    told = capsys.readouterr().err
    assert str(path) in told and told.count("\n") == 1


def test_rounding_leaves_another_network_with_the_same_weights_alone():
    layer, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    other.weight, other.bias = layer.weight, layer.bias
    machine.round_frozen(torch.nn.Sequential(layer).requires_grad_(False), torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert other.weight.dtype == other.bias.dtype == torch.float32


def test_the_estimate_holds_the_load_in_fp32():
    """Checkpointed LoRA needs less for a step in half precision than for its weights as they are read."""
    config, others = UNetConfig(), 380_000_000
    parts = memory.estimate(config, others, 64, 1, "bf16", 16, True)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in UNet(config).parameters())
    assert sum(parts.values()) == 4 * weights + 4 * others
    assert sum(memory.estimate(config, others, 64, 1, "bf16", 16, False).values()) > 4 * weights + 4 * others
