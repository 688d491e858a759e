"""Checkpoints are found, read and loaded strictly: what does not fit is named in one line, and no broken file gives
another error than CheckpointError."""

import json
import os
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model.files import tensors as files
from model.files.errors import CheckpointError, error_context
from model.files.tensors import find_weights, identify, load_tensors, read_metadata, read_tensors
from model.vae import VAE
from toy.networks import WEIGHTS as TOY

NAME, UNET = "model.safetensors", "diffusion_pytorch_model"


@dataclass(frozen=True)
class Config:
    width: int = 4


class Network(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.width, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x))


def saved(folder, **changes):
    """A network's folder; `changes` replace tensors, None leaves one out. Dots in names are written as __."""
    torch.manual_seed(0)
    tensors = Network(Config()).state_dict()
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / NAME)
    return tensors


def load(folder, **kwargs):
    return files.load(Network, Config(), folder, **kwargs)


def refused(call, *parts):
    """`call` raises a CheckpointError of one line that holds all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value)


def test_load(tmp_path):
    tensors = saved(tmp_path)
    network = load(tmp_path)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    half = load(tmp_path, dtype=torch.float16)
    assert half.linear.weight.dtype == half.norm.running_var.dtype == torch.float16
    assert half.norm.num_batches_tracked.dtype == torch.int64
    save_file({name: tensor.contiguous() for name, tensor in half.state_dict().items()}, tmp_path / NAME)
    assert load(tmp_path).linear.weight.dtype == torch.float32  # whatever the file holds


def test_misfits_are_named(tmp_path):
    for change, *words in [
        ({"linear__bias": None}, tmp_path / NAME, "Network", "lacks linear.bias"),
        ({"linear__scale": torch.ones(3)}, "unexpected linear.scale"),
        ({"linear__weight": torch.ones(3, 4).char()}, "it has integers in linear.weight"),
        ({"linear__weight": torch.ones(4, 3)}, "linear.weight is (4, 3) and should be (3, 4)"),
        ({"linear__weight": None, "x": torch.ones(1)}, "lacks linear.weight; it has unexpected x"),  # all at once
        ({f"{letter}\nb": torch.ones(1) for letter in "edcba"}, "unexpected a b, b b, c b and 2 more"),
        ({"text__position_ids_table": torch.ones(1)}, "position_ids_table"),
    ]:
        saved(tmp_path, **change)
        refused(lambda: load(tmp_path), *words)
    saved(tmp_path, text__embeddings__position_ids=torch.arange(77)[None])
    load(tmp_path)  # position_ids are ignored
    refused(lambda: files.load(Network, Config(width=-2), tmp_path), tmp_path / NAME, "no possible network")


CHOICES = [  # what a folder holds; the variant asked for; what is taken, or pieces of the refusal
    (f"{UNET}.safetensors {UNET}.fp16.safetensors {UNET}.non_ema.safetensors {UNET}.bin", None, f"{UNET}.safetensors"),
    ("model.safetensors model.fp16.safetensors model.bin pytorch_model.bin", None, NAME),
    ("model.fp16.safetensors pytorch_model.bin", None, "model.fp16.safetensors"),
    ("pytorch_model.bin pytorch_model.fp16.bin", None, "pytorch_model.bin"),
    ("model.fp16.safetensors model.ema.safetensors", None, ["holds model.ema.safetensors, model.fp16", "--variant"]),
    (f"{UNET}.safetensors {UNET}.non_ema.safetensors", "non_ema", f"{UNET}.non_ema.safetensors"),
    (f"{NAME} model.fp16.safetensors", "bf16", ["variant bf16", NAME, "model.fp16.safetensors"]),
    ("config.json model.onnx pytorch_lora_weights.safetensors", None, [f"{UNET}.safetensors", "config.json, model"]),
    ("", "fp16(", ["variant fp16(", "no file"]),
]


@pytest.mark.parametrize(("names", "variant", "expected"), CHOICES)
def test_find_weights(tmp_path, names, variant, expected):
    for name in names.split():
        (tmp_path / name).touch()
    if isinstance(expected, str):
        assert find_weights(tmp_path, variant) == tmp_path / expected
    else:
        refused(lambda: find_weights(tmp_path, variant), tmp_path, *expected)


def test_no_file(tmp_path):
    (tmp_path / "x.bin").touch()
    refused(lambda: find_weights(tmp_path / "none"), tmp_path / "none", "not a checkpoint folder")
    for path in (tmp_path / "none.safetensors", tmp_path / "none.bin", tmp_path):
        refused(lambda path=path: read_tensors(path), path, "missing")
        refused(lambda path=path: read_metadata(path), path, "missing")


@pytest.mark.parametrize("name", [NAME, "pytorch_model.bin"])
def test_a_link_to_a_missing_file_and_a_git_lfs_pointer(tmp_path, name):
    """As in a Hugging Face snapshot whose blob was deleted: `ls` shows the name."""
    (tmp_path / name).symlink_to(tmp_path / "blob")
    refused(lambda: load(tmp_path), tmp_path / name, "is a link to a missing file")
    (tmp_path / "blob").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(lambda: load(tmp_path), tmp_path / name, "git lfs pull")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_what_diffusers_writes(tmp_path, variant, safe):
    """Names of files and variants. transformers 5 writes no .bin; the parity tests of CLIP read what it writes."""
    theirs = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=4)
    theirs.save_pretrained(tmp_path, variant=variant, safe_serialization=safe)
    for asked in {variant, None}:
        ours = VAE.from_pretrained(tmp_path, variant=asked).state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
    refused(lambda: VAE.from_pretrained(tmp_path, variant="bf16"), tmp_path, "variant bf16")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "a LoRA, not a whole U-Net"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight", "a LoRA"),
        ("conditioner.embedders.1.model.ln_final.weight", "SDXL"),
        ("model.diffusion_model.label_emb.0.0.weight", "an upscaler"),
        ("add_embedding.linear_1.weight", "an SDXL or an upscaler, which is not supported"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "a Flux"),
        ("ztsnr", "a model with zero terminal SNR"),
        ("model.diffusion_model.input_blocks.0.0.weight", "--base FILE"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
    ],
)
def test_identify(key, kind):
    assert kind in identify(["time_embedding.linear_1.weight", key])


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("unet", "a U-Net"),
        ("vae", "a VAE"),
        ("text_encoder", "a CLIP text encoder"),
        ("reward", "CLIP or ALIGN, with both towers"),
        ("metrics/clip", "CLIP or ALIGN, with both towers"),
    ],
)
def test_what_the_networks_are(part, kind):
    """The refusal of a file says which network it belongs to."""
    tensors = read_tensors(find_weights(TOY / part))
    assert identify(tensors) == kind
    refused(lambda: load_tensors(Network(Config()), tensors, "FILE"), f"FILE does not fit Network: it is {kind}; it ")


def file_of(header, body=b""):
    """A safetensors file's bytes: the header's length, the header, the numbers."""
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


BROKEN = {
    "a web page": b"<!doctype html><html>Entry not found</html>\n",
    "no numbers": file_of({"x": {"dtype": "F32", "shape": (2,), "data_offsets": (0, 8)}}),
    "a type that torch lacks": file_of({"x": {"dtype": "F6_E2M3", "shape": (8,), "data_offsets": (0, 6)}}, bytes(6)),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file(tmp_path, data):
    (tmp_path / NAME).write_bytes(data)
    refused(lambda: load(tmp_path), tmp_path / NAME, "not a whole safetensors file")


def as_bin(folder, zipped=True):
    """The network's file as torch.save writes it: in a zip file, or in the format of before 2020."""
    tensors = saved(folder)
    (folder / NAME).unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return tensors


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["safetensors", "bin", "bin before 2020"])
def test_a_whole_file_and_one_cut_short(tmp_path, form):
    """As by a download that broke off."""
    tensors = saved(tmp_path) if form == "safetensors" else as_bin(tmp_path, zipped=form == "bin")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(tmp_path).state_dict().items())
    path = find_weights(tmp_path)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(lambda: load(tmp_path), path)
        if form == "safetensors":
            refused(lambda: read_metadata(path), path, "not a whole safetensors file")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bin_file_is_read_without_running_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {executed}",)

    executed = tmp_path / "executed"
    trap = Trap()
    torch.save({"weight": trap}, tmp_path / "zip.bin")
    torch.save({"weight": trap}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(trap))
    for name in ("zip.bin", "old.bin", "plain.bin"):
        refused(lambda name=name: read_tensors(tmp_path / name), tmp_path / name, "code in it is not run")
    assert not executed.exists()
    pickle.loads((tmp_path / "plain.bin").read_bytes())
    assert executed.exists()  # the trap is one


def test_a_bin_file_of_something_else(tmp_path):
    for values in ([1, 2], {"x": 1}, {"state_dict": {"x": torch.ones(1)}}, torch.ones(1)):
        torch.save(values, tmp_path / "other.bin")
        refused(lambda: read_tensors(tmp_path / "other.bin"), tmp_path / "other.bin", "nothing else")


def test_a_full_memory_is_not_reported_as_a_broken_file(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(b"anything")
    for error in (MemoryError(), RuntimeError("can't allocate memory"), OSError(12, "Cannot allocate memory")):
        with pytest.raises(type(error)) as raised, error_context("FILE"):
            raise error
        assert raised.value is error
        monkeypatch.setattr(torch, "load", Mock(side_effect=error))
        with pytest.raises(type(error)) as raised:
            read_tensors(tmp_path / "model.bin")
        assert raised.value is error


def test_a_network_and_its_file_do_not_change_each_other(tmp_path):
    """Tensors are mapped from the file: they are trained, another file is renamed over it, it is deleted."""
    tensors, path = saved(tmp_path), tmp_path / NAME
    before = path.read_bytes()
    network, other = load(tmp_path), load(tmp_path)
    for tensor in network.state_dict().values():
        tensor += 1
    assert path.read_bytes() == before
    (tmp_path / "other").write_bytes(bytes(len(before)))
    for change in (lambda: os.replace(tmp_path / "other", path), path.unlink):
        change()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.state_dict().items())


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux reports a process's memory there")
def test_memory(tmp_path):
    """Same precision: only mapped, so nothing is in memory before it is used. Another: the cast copy and no more."""
    size = 32 * 2**20

    def used():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    class Wide(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2**24))

    save_file({"weight": torch.ones(2**24, dtype=torch.float16)}, tmp_path / NAME)
    before = used()
    same = files.load(Wide, Config(), tmp_path, torch.float16)
    assert used() - before < 0.3 * size
    assert float(same.weight.float().mean()) == 1
    assert used() - before < 1.3 * size
    del same
    before = used()
    cast = files.load(Wide, Config(), tmp_path, torch.float32)
    assert used() - before < 1.3 * 2 * size
    assert cast.weight.dtype == torch.float32
