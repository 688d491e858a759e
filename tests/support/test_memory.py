"""memory.py: the estimate against what autograd keeps, and what to try when the memory does not suffice."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import UNET

from model.files.config import config_from
from model.files.errors import CheckpointError
from model.stable_diffusion import StableDiffusion
from model.unet import UNet, UNetConfig
from support import memory
from support.export import export_single_file
from toy.networks import WEIGHTS as TOY

OTHERS = 380_000_000  # weights of SD 1.5's VAE, text encoder and ALIGN
UNET_WEIGHTS, ADAPTERS = 859_520_964, 16 * 199_296  # 3.2 M at rank 16, as diffusers' LoRA of SD 1.5 has


def estimated(**changed):
    """Of Stable Diffusion 1.5 at 512 px."""
    return memory.estimate(UNetConfig(), **{"others": OTHERS, "side": 64, "pictures": 2, "precision": "bf16"} | changed)


def test_estimate_counts_the_weights():
    whole, lora = estimated(), estimated(lora_rank=16)
    assert whole["weights"] == (4 + 2) * UNET_WEIGHTS and whole["AdamW"] == 8 * UNET_WEIGHTS
    assert estimated(precision="fp32")["weights"] == (4 + 4) * UNET_WEIGHTS
    assert lora["weights"] == 2 * UNET_WEIGHTS + 4 * ADAPTERS and lora["AdamW"] == 8 * ADAPTERS
    assert whole["other networks"] == lora["other networks"] == 4 * OTHERS
    for grown in ({"pictures": 4}, {"side": 96}, {"precision": "fp32"}):
        assert estimated(lora_rank=16, **grown)["a step"] > 1.4 * lora["a step"]


def test_estimate_counts_what_is_trained_besides_the_unet():
    """In fp32: AdamW's two averages and the gradient; the weights are among the other networks'."""
    more, without = estimated(also=1000), estimated()
    assert {name: more[name] - without[name] for name in more if more[name] != without[name]} == {
        "AdamW": 8000,
        "a step": 4000,
    }


def test_estimate_of_the_modes():
    """The goals: at 512 px in bf16, 18 GB for the whole U-Net, 10 for LoRA, 6 with gradient checkpointing."""
    modes = [(None, False), (None, True), (16, False), (16, True)]
    total = [sum(estimated(lora_rank=rank, checkpointed=checkpointed).values()) for rank, checkpointed in modes]
    assert 18e9 > total[0] > total[1] > total[2] > total[3] and total[2] < 10e9 and total[3] < 6e9
    assert total[3] == 4 * UNET_WEIGHTS + 4 * OTHERS  # a step needs less than the weights before they are rounded


def test_estimate_of_a_step_is_what_autograd_keeps():
    """Counted in a real forward pass in fp32, of a batch so large that what backward() adds is small."""
    unet = UNet(config_from(UNetConfig, UNET))
    weights, kept, pictures, side = {each.data_ptr() for each in unet.parameters()}, {}, 32, 16

    def note(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = unet(torch.randn(pictures, 4, side, side), 7, torch.randn(pictures, 5, 32))
    assert out.requires_grad
    assert memory.estimate(unet.config, 0, side, pictures)["a step"] == pytest.approx(sum(kept.values()), rel=0.1)


def flags(batch=4, resolution=None, **changed):
    """train.py's flags when its settings are resolved, for weights/toy on a GPU."""
    given = {
        "precision": "bf16",
        "checkpoint_gradients": False,
        "lora_rank": None,
        "base": TOY,
        "align": TOY / "reward",
    }
    settings = SimpleNamespace(batch=batch, resolution=resolution, pictures_a_pair=2, also_trained=())
    return argparse.Namespace(**given | {"variant": None, "prediction_type": None, "settings": settings} | changed)


def test_remedies_come_in_order():
    every = "--precision bf16, then --lora-rank 16, then --checkpoint-gradients, then a smaller --batch, "
    every += "then a larger machine"
    for changed, expected in (
        ({"precision": "fp32"}, every),
        ({}, every.removeprefix("--precision bf16, then ")),
        ({"checkpoint_gradients": True}, "--lora-rank 16, then a smaller --batch, then a larger machine"),
        ({"checkpoint_gradients": True, "lora_rank": 4, "batch": 1}, "a larger machine"),
    ):
        assert memory.remedy(flags(**changed)) == f"try {expected}"
    loading = flags(precision=None)
    del loading.settings
    assert "a smaller --batch" in memory.remedy(loading)


def test_a_process_holds_only_its_own_pairs(monkeypatch):
    of_one = memory.estimate_of(flags(batch=2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert memory.estimate_of(flags(batch=5)) == of_one
    assert "a smaller --batch" in memory.remedy(flags(batch=5))
    assert "smaller --batch" not in memory.remedy(flags(batch=3))


def test_the_estimate_reads_the_files_that_are_loaded(tmp_path):
    export_single_file(StableDiffusion.from_pretrained(TOY), tmp_path / "whole.safetensors", {})
    of_folder = memory.estimate_of(flags())
    assert memory.estimate_of(flags(base=tmp_path / "whole.safetensors")) == of_folder
    assert memory.estimate_of(flags(resolution=128)) == of_folder  # the base's own
    assert memory.estimate_of(flags(resolution=256))["a step"] > 2 * of_folder["a step"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_channels", -4), ("layers_per_block", -1), ("block_out_channels", "x"), ("down_block_types", ["Foo", "Foo"])],
)
def test_a_wrong_configuration_is_named(tmp_path, name, value):
    path = shutil.copytree(TOY, tmp_path / "base") / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        memory.estimate_of(flags(base=tmp_path / "base"))
    assert str(path) in str(caught.value)
