"""memory.py: the estimate against what autograd keeps, and what to try when the memory does not suffice."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import UNET

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
    return memory.estimate(UNetConfig(), **{"others": OTHERS, "side": 64, "pictures": 3, "precision": "bf16"} | changed)


def test_estimate_counts_the_weights():
    whole, lora = estimated(), estimated(lora_rank=16)
    assert whole["weights"] == (4 + 2) * UNET_WEIGHTS and whole["AdamW"] == 8 * UNET_WEIGHTS
    assert estimated(precision="fp32")["weights"] == (4 + 4) * UNET_WEIGHTS
    assert lora["weights"] == 2 * UNET_WEIGHTS + 4 * ADAPTERS and lora["AdamW"] == 8 * ADAPTERS
    assert whole["other networks"] == lora["other networks"] == 4 * OTHERS
    assert whole["a step"] > 4 * UNET_WEIGHTS  # the gradients
    assert estimated(lora_rank=16, pictures=6)["a step"] > 1.4 * lora["a step"]


def test_estimate_counts_what_is_trained_besides_the_unet():
    """In fp32: AdamW's two averages and the gradient; the weights are among the other networks'."""
    more, without = estimated(also=1000), estimated()
    assert more == without | {"AdamW": without["AdamW"] + 8000, "a step": without["a step"] + 4000}


def test_estimate_of_the_modes():
    """Of the targets of benchmarks/memory.py the whole U-Net misses its 18 GB. On a CPU some were measured."""
    modes = [(None, False), (None, True), (16, False), (16, True)]
    total = [sum(estimated(lora_rank=rank, checkpointed=checkpointed).values()) for rank, checkpointed in modes]
    assert total == sorted(total, reverse=True) and total[2] < 10e9 and total[3] < 6e9
    assert total[0] == pytest.approx(18.7e9, abs=5e7)
    assert total[3] == 4 * UNET_WEIGHTS + 4 * OTHERS  # a step needs less than the weights before they are rounded
    for side, pictures, measured in ((64, 2, [21.8, 20.2, 9.7, 7.4]), (16, 3, [None, None, 6.1, 5.8])):
        for (rank, checkpointed), gigabytes in zip(modes, measured, strict=True):
            modes_of = {"precision": "fp32", "lora_rank": rank, "checkpointed": checkpointed}
            total = sum(estimated(side=side, pictures=pictures, **modes_of).values()) / 1e9
            assert gigabytes is None or total == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize(("kind", "checkpointed"), [("fp32", False), ("fp32", True), ("half", False)])
def test_what_the_forward_pass_keeps(kind, checkpointed):
    """Counted by autograd in a network of SD 1.5's shape, a tenth as wide."""
    unet = UNet(UNetConfig(block_out_channels=(32, 64, 128, 128), cross_attention_dim=32))
    if checkpointed:
        unet.checkpoint_gradients()
    weights, kept, side = {each.data_ptr() for each in unet.parameters()}, {}, 32

    def note(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=kind == "half"),
    ):
        out = unet(torch.randn(1, 4, side, side), 7, torch.randn(1, 5, 32))
    assert out.requires_grad
    if kind == "half":
        kept[0] = -2 * sum(weight.numel() for weight in unet.parameters())  # the copies, which are counted apart
    counted = memory.KEPT_CHECKPOINTED[kind] if checkpointed else memory.KEPT[kind] + memory.LAYER[kind] / 2
    assert sum(kept.values()) / side**2 / (32 + 64 / 4 + 128 / 16 + 128 / 64) == pytest.approx(counted, rel=0.12)


def flags(batch=4, resolution=None, **changed):
    """train.py's flags when its settings are resolved, for weights/toy on a GPU."""
    settings = SimpleNamespace(batch=batch, resolution=resolution, pictures_a_pair=2, also_trained=())
    given = {"precision": "bf16", "checkpoint_gradients": False, "lora_rank": None, "base": TOY, "settings": settings}
    more = {"align": TOY / "reward", "variant": None, "prediction_type": None}
    return argparse.Namespace(**given | more | changed)


def test_remedies_come_in_order():
    every = "--precision bf16, then --lora-rank 16, then --checkpoint-gradients, then a smaller --batch, "
    every += "then a larger machine"
    for changed, expected in (
        ({"precision": "fp32"}, every),
        ({}, every.removeprefix("--precision bf16, then ")),
        ({"checkpoint_gradients": True, "lora_rank": 4, "batch": 1}, "a larger machine"),
    ):
        assert memory.remedy(flags(**changed)) == f"try {expected}"
    both = flags()
    both.settings.also_trained = ("text_encoder",)  # LoRA is refused then
    assert memory.remedy(both).startswith("try --checkpoint-gradients, then ")
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
    assert memory.estimate_of(flags(resolution=256, batch=16))["a step"] > 2 * of_folder["a step"]


def test_a_wrong_configuration_is_named(base):
    path = base / "unet" / "config.json"
    path.write_text(json.dumps(UNET | {"in_channels": -4}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=str(path)):
        memory.estimate_of(flags(base=base))
