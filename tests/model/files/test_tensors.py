"""Checkpoints are found, read and loaded strictly: what does not fit is named in one line, and no broken file gives
another error than CheckpointError."""

import json
import os
import pickle
import random
import struct
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPTextEncoder
from model.files import tensors as files
from model.files.config import config_from
from model.files.errors import CheckpointError, error_context
from model.files.tensors import find_weights, load_tensors, read_metadata, read_tensors, what_is
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig

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


def test_rename(tmp_path):
    tensors = saved(tmp_path)
    save_file({f"old.{name}": tensor for name, tensor in tensors.items()}, tmp_path / NAME)
    refused(lambda: load(tmp_path), "lacks linear.bias", "unexpected old.linear.bias")
    network = load(tmp_path, rename=lambda old: {name.removeprefix("old."): tensor for name, tensor in old.items()})
    assert torch.equal(network.linear.weight, tensors["linear.weight"])


CHOICES = [  # what a folder holds; the variant asked for; what is taken, or pieces of the refusal
    (f"{UNET}.safetensors {UNET}.fp16.safetensors {UNET}.non_ema.safetensors {UNET}.bin", None, f"{UNET}.safetensors"),
    ("model.safetensors model.fp16.safetensors model.bin pytorch_model.bin", None, NAME),
    (f"{UNET}.fp16.safetensors", None, f"{UNET}.fp16.safetensors"),
    ("model.fp16.safetensors pytorch_model.bin pytorch_model.fp16.bin", None, "model.fp16.safetensors"),
    ("pytorch_model.bin pytorch_model.fp16.bin", None, "pytorch_model.bin"),
    (f"{UNET}.bin", None, f"{UNET}.bin"),
    ("model.fp16.safetensors model.ema.safetensors", None, ["holds model.ema.safetensors, model.fp16", "--variant"]),
    (f"{UNET}.safetensors {UNET}.non_ema.safetensors", "non_ema", f"{UNET}.non_ema.safetensors"),
    (f"{NAME} pytorch_model.fp16.bin", "fp16", "pytorch_model.fp16.bin"),
    ("model.fp16.safetensors pytorch_model.fp16.bin", "fp16", "model.fp16.safetensors"),
    (f"{NAME} model.fp16.safetensors", "bf16", ["variant bf16", NAME, "model.fp16.safetensors"]),
    ("config.json model.onnx pytorch_lora_weights.safetensors", None, [f"{UNET}.safetensors", "config.json, model"]),
    ("", "fp16", ["variant fp16", "no file"]),
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
def test_what_the_libraries_write(tmp_path, variant, safe):
    """Names of files and variants as diffusers and transformers 5 write them (which knows no .bin)."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=4, layers_per_block=2, **blocks)
    text_config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config))

    def total(network):
        return sum(parameter.detach().double().abs().sum().item() for parameter in network.parameters())

    for theirs, ours in ((vae, VAE), (text, CLIPTextEncoder)):
        folder = tmp_path / ours.__name__
        theirs.save_pretrained(folder, variant=variant, safe_serialization=safe)
        for asked in {variant, None}:
            assert total(ours.from_pretrained(folder, variant=asked)) == pytest.approx(total(theirs), rel=1e-12)
        refused(lambda: ours.from_pretrained(folder, variant="bf16"), folder, "variant bf16")  # noqa: B023


KINDS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": "a LoRA, not a whole U-Net",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA, not a whole U-Net",
    "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": "a LoRA, not a whole U-Net",
    "model.diffusion_model.input_blocks.0.0.weight": "--base FILE",
    "model.diffusion_model.label_emb.0.0.weight": "SDXL",
    "add_embedding.linear_1.weight": "an SDXL or an upscaler, which is not supported",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
}


def test_what_is():
    for key, kind in KINDS.items():
        assert kind in what_is(["time_embedding.linear_1.weight", key])
    assert what_is(["something.else"]) is None


def test_what_the_networks_are(tmp_path):
    """Each network's keys differ from the others', and the refusal of a file says which network it belongs to."""
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        networks = {
            "a U-Net": UNet(UNetConfig(layers_per_block=1)),
            "a VAE": VAE(VAEConfig(layers_per_block=1)),
            "a CLIP text encoder": CLIPTextEncoder(CLIPTextConfig(**text)),
            "CLIP or ALIGN, with both towers": CLIP(
                config_from(CLIPConfig, {"text_config": text, "vision_config": text})
            ),
        }
    for kind, network in networks.items():
        assert what_is(network.state_dict()) == kind
        for other in networks.values():
            if other is not network:
                refused(lambda: load_tensors(other, network.state_dict(), "FILE"), f"it is {kind}; it ")  # noqa: B023
    lora = {"lora_unet_x.lora_up.weight": torch.ones(1)}
    words = "FILE does not fit UNet: it is a LoRA, not a whole U-Net; it lacks conv_in.bias, conv_in.weight"
    refused(lambda: load_tensors(networks["a U-Net"], lora, "FILE"), words, "unexpected lora_unet_x.lora_up.weight")


def file_of(header, body=b""):
    """A safetensors file's bytes: the header's length, the header, the numbers."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


BROKEN = {
    "empty": b"",
    "garbage": random.Random(0).randbytes(300),
    "a web page": b"<!doctype html><html>Entry not found</html>\n",
    "no JSON": file_of(b"{"),
    "a longer header than the file": struct.pack("<Q", 2**62) + b"{}",
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


@pytest.mark.parametrize("zipped", [True, False])
def test_bin(tmp_path, zipped):
    tensors = as_bin(tmp_path, zipped)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(tmp_path).state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["safetensors", "bin", "bin before 2020"])
def test_a_file_cut_short(tmp_path, form):
    """As by a download that broke off."""
    saved(tmp_path) if form == "safetensors" else as_bin(tmp_path, zipped=form == "bin")
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
        def __init__(self, function, *args):
            self.call = (function, args)

        def __reduce__(self):
            return self.call

    executed = tmp_path / "executed"
    for trap in (Trap(open, str(executed), "w"), Trap(os.system, f"touch {executed}")):
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
    def full(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    (tmp_path / "model.bin").write_bytes(b"anything")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="allocate") as raised:
        read_tensors(tmp_path / "model.bin")
    assert not isinstance(raised.value, CheckpointError)
    for error in (MemoryError(), RuntimeError("can't allocate memory"), OSError(12, "Cannot allocate memory")):
        with pytest.raises(type(error)) as raised, error_context("FILE"):
            raise error
        assert raised.value is error


def test_a_network_and_its_file_do_not_change_each_other(tmp_path):
    """Tensors are mapped from the file: they are trained, another file is renamed over it, it is deleted."""
    tensors, path = saved(tmp_path), tmp_path / NAME
    before = path.read_bytes()
    network, other = load(tmp_path).train().requires_grad_(True), load(tmp_path)
    network(torch.randn(5, 4)).square().sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    network.norm.num_batches_tracked += 1
    assert not torch.equal(network.linear.weight, other.linear.weight)
    del network
    assert path.read_bytes() == before
    (tmp_path / "other").write_bytes(bytes(len(before)))
    for change in (lambda: os.replace(tmp_path / "other", path), path.unlink):
        change()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.state_dict().items())


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux reports a process's memory there")
def test_memory(tmp_path):
    """Same precision: only mapped, so nothing is in memory before it is used. Another: the cast copy and no more."""
    page, size = os.sysconf("SC_PAGE_SIZE"), 32 * 2**20

    def used():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * page

    class Wide(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(16))

    tensors = {f"layers.{i}.weight": torch.ones(1024, 1024, dtype=torch.float16) for i in range(16)}
    save_file(tensors, tmp_path / NAME)
    del tensors
    before = used()
    same = files.load(Wide, Config(), tmp_path, torch.float16)
    assert used() - before < 0.3 * size
    assert sum(float(parameter.float().sum()) for parameter in same.parameters()) == 2**24
    assert used() - before < 1.3 * size
    del same
    before = used()
    cast = files.load(Wide, Config(), tmp_path, torch.float32)
    assert used() - before < 1.3 * 2 * size
    assert cast.layers[0].weight.dtype == torch.float32
