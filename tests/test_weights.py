"""Reading checkpoints strictly: what does not fit is named in one line, and no file, however broken, gives another
error than CheckpointError. Writing them: whole or not at all."""

import json
import os
import pickle
import random
import struct
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.align import ALIGN, ALIGNConfig, ALIGNTextConfig, ALIGNVisionConfig
from model.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPTextEncoder
from model.dino import DINO, DINOConfig
from model.files import tensors as tensors_file
from model.files import write
from model.files.config import config_from, one_size, read_json, refuse
from model.files.errors import CheckpointError
from model.files.tensors import find_weights, load_tensors, read_metadata, read_tensors, what_is
from model.files.write import save_tensors, write_atomic
from model.scheduler import Scheduler
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig


@dataclass(frozen=True)
class Config:
    width: int = 4
    layers: tuple[int, ...] = (1, 2)
    eps: float = 1e-5
    heads: int | tuple[int, ...] = 2
    act: str = "silu"
    linear: bool = False

    def __post_init__(self):
        self.width % (self.heads if isinstance(self.heads, int) else self.heads[0])


class Network(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.width, 3)
        self.norm = nn.BatchNorm1d(3, eps=config.eps)

    def forward(self, x):
        return self.norm(self.linear(x))


NAME = "model.safetensors"


def saved(folder, **changes):
    """A network's folder; `changes` replace tensors, None leaves one out. Dots in names are written as __."""
    torch.manual_seed(0)
    tensors = Network(Config()).state_dict()
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / NAME)
    return tensors


def load(folder, **kwargs):
    return tensors_file.load(Network, Config(), folder, **kwargs)


def refused(call, *parts):
    """`call` raises a CheckpointError of one line that holds all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def test_load(tmp_path):
    tensors = saved(tmp_path)
    network = load(tmp_path)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    half = load(tmp_path, dtype=torch.float16)
    assert half.linear.weight.dtype == half.norm.running_var.dtype == torch.float16
    assert half.norm.num_batches_tracked.dtype == torch.int64
    half.half()
    save_file({name: tensor.contiguous() for name, tensor in half.state_dict().items()}, tmp_path / NAME)
    assert load(tmp_path).linear.weight.dtype == torch.float32  # whatever the file holds


def test_misfits_are_named(tmp_path):
    saved(tmp_path, linear__bias=None)
    refused(lambda: load(tmp_path), tmp_path / NAME, "Network", "lacks linear.bias")
    saved(tmp_path, linear__scale=torch.ones(3))
    refused(lambda: load(tmp_path), "unexpected linear.scale")
    saved(tmp_path, linear__weight=torch.ones(3, 5))
    refused(lambda: load(tmp_path), "linear.weight is (3, 5) and should be (3, 4)")
    saved(tmp_path, linear__weight=torch.ones(4, 3))  # as many numbers, another matrix
    refused(lambda: load(tmp_path), "linear.weight is (4, 3) and should be (3, 4)")
    saved(tmp_path, linear__bias=torch.ones(3, dtype=torch.int64))
    refused(lambda: load(tmp_path), "linear.bias is torch.int64 and should be like torch.float32")
    saved(tmp_path, norm__num_batches_tracked=torch.tensor(1.0))
    refused(lambda: load(tmp_path), "num_batches_tracked is torch.float32")
    saved(tmp_path, linear__weight=None, x=torch.ones(1), norm__bias=torch.ones(2))
    refused(lambda: load(tmp_path), "lacks linear.weight", "unexpected x", "norm.bias is (2,)")  # all at once
    saved(tmp_path, **{f"{letter}\nb": torch.ones(1) for letter in "edcba"})
    assert refused(lambda: load(tmp_path), "unexpected a b, b b, c b and 2 more")


def test_position_ids_are_passed_over(tmp_path):
    saved(tmp_path, text__embeddings__position_ids=torch.arange(77)[None])
    load(tmp_path)
    saved(tmp_path, text__position_ids_table=torch.ones(1))
    refused(lambda: load(tmp_path), "position_ids_table")


def test_rename(tmp_path):
    tensors = saved(tmp_path)
    save_file({f"old.{name}": tensor for name, tensor in tensors.items()}, tmp_path / NAME)
    refused(lambda: load(tmp_path), "lacks linear.bias", "unexpected old.linear.bias")
    network = load(tmp_path, rename=lambda old: {name.removeprefix("old."): tensor for name, tensor in old.items()})
    assert torch.equal(network.linear.weight, tensors["linear.weight"])


def test_an_impossible_config(tmp_path):
    saved(tmp_path)
    refused(lambda: tensors_file.load(Network, Config(width=-2), tmp_path), tmp_path / NAME, "no possible network")


UNET = "diffusion_pytorch_model"
CHOICES = [  # what a folder holds; the variant asked for; what is taken, or pieces of the refusal
    (f"{UNET}.safetensors {UNET}.fp16.safetensors {UNET}.non_ema.safetensors {UNET}.bin", None, f"{UNET}.safetensors"),
    ("model.safetensors model.fp16.safetensors model.bin pytorch_model.bin", None, NAME),
    (f"{NAME} {NAME}.index.json model-00001-of-00001.safetensors", None, NAME),
    (f"{NAME}.index.json model-00001-of-00001.safetensors pytorch_model.bin", None, f"{NAME}.index.json"),
    (f"{UNET}.fp16.safetensors", None, f"{UNET}.fp16.safetensors"),
    (f"{UNET}.non_ema.safetensors", None, f"{UNET}.non_ema.safetensors"),
    ("model.fp16.safetensors pytorch_model.bin pytorch_model.fp16.bin", None, "model.fp16.safetensors"),
    (
        f"{UNET}.safetensors.index.fp16.json {UNET}.fp16-00001-of-00001.safetensors",
        None,
        f"{UNET}.safetensors.index.fp16.json",
    ),
    (
        f"{UNET}.safetensors.fp16.index.json {UNET}-00001-of-00001.fp16.safetensors",
        None,
        f"{UNET}.safetensors.fp16.index.json",
    ),
    (
        "model.fp16.safetensors.index.json model.fp16-00001-of-00001.safetensors",
        None,
        "model.fp16.safetensors.index.json",
    ),
    ("pytorch_model.bin pytorch_model.fp16.bin pytorch_model.bin.index.json", None, "pytorch_model.bin"),
    (f"{UNET}.bin", None, f"{UNET}.bin"),
    ("pytorch_model.bin.index.json pytorch_model-00001-of-00001.bin", None, "pytorch_model.bin.index.json"),
    (
        "pytorch_model.bin.index.fp16.json pytorch_model.fp16-00001-of-00001.bin",
        None,
        "pytorch_model.bin.index.fp16.json",
    ),
    ("pytorch_model.fp16.bin", None, "pytorch_model.fp16.bin"),
    (f"{UNET}.fp16.safetensors {UNET}.non_ema.safetensors", None, ["fp16, non_ema", "--variant"]),
    (
        f"{UNET}.safetensors {UNET}.fp16.safetensors {UNET}.non_ema.safetensors",
        "non_ema",
        f"{UNET}.non_ema.safetensors",
    ),
    (f"{NAME} model.safetensors.index.fp16.json", "fp16", "model.safetensors.index.fp16.json"),
    (f"{NAME} pytorch_model.fp16.bin", "fp16", "pytorch_model.fp16.bin"),
    ("model.fp16.safetensors pytorch_model.fp16.bin", "fp16", "model.fp16.safetensors"),
    (f"{NAME} model.fp16.safetensors", "bf16", ["variant bf16", NAME, "model.fp16.safetensors"]),
    (
        "config.json model.onnx pytorch_lora_weights.safetensors",
        None,
        [f"{UNET}.safetensors", "config.json, model.onnx"],
    ),
    ("model-00001-of-00002.safetensors model.fp16-00001-of-00002.safetensors", None, ["none of"]),
    ("", None, [NAME, "no file"]),
    ("", "fp16", ["variant fp16", "no file"]),
]


@pytest.mark.parametrize(("files", "variant", "expected"), CHOICES)
def test_find_weights(tmp_path, files, variant, expected):
    for name in files.split():
        (tmp_path / name).touch()
    if isinstance(expected, str):
        assert find_weights(tmp_path, variant) == tmp_path / expected
    else:
        refused(lambda: find_weights(tmp_path, variant), tmp_path, *expected)


def test_a_folder_is_no_weight_file(tmp_path):
    (tmp_path / f"{UNET}.safetensors").mkdir()
    refused(lambda: find_weights(tmp_path), tmp_path)
    (tmp_path / NAME).touch()
    assert find_weights(tmp_path) == tmp_path / NAME
    for folder in (tmp_path / "none", tmp_path / NAME):
        refused(lambda folder=folder: find_weights(folder), folder, "no checkpoint folder")


def in_shards(folder, **changes):
    """The network's file in two shards, one of each format; `changes` alter the index's weight_map."""
    tensors = saved(folder)
    (folder / NAME).unlink()
    shards = {"a.safetensors": ["linear.weight", "linear.bias"]}
    shards["b.bin"] = sorted(tensors.keys() - set(shards["a.safetensors"]))
    save_file({name: tensors[name] for name in shards["a.safetensors"]}, folder / "a.safetensors")
    torch.save({name: tensors[name] for name in shards["b.bin"]}, folder / "b.bin")
    places = {name: shard for shard, names in shards.items() for name in names}
    places |= {name.replace("__", "."): shard for name, shard in changes.items()}
    (folder / f"{NAME}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return tensors


def test_shards(tmp_path):
    tensors = in_shards(tmp_path)
    read = read_tensors(tmp_path / f"{NAME}.index.json")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert torch.equal(load(tmp_path).norm.weight, tensors["norm.weight"])


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", ["10GB", "100KB"])
@pytest.mark.parametrize("safe", [True, False])
def test_what_the_libraries_write(tmp_path, variant, shards, safe):
    """Names of files, variants and shards as diffusers and transformers 5 write them (which knows no .bin)."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=4, layers_per_block=2, **blocks)
    text_config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config))

    def total(network):
        return sum(float(parameter.double().abs().sum()) for parameter in network.parameters())

    for theirs, ours in ((vae, VAE), (text, CLIPTextEncoder)):
        folder = tmp_path / ours.__name__
        theirs.save_pretrained(folder, max_shard_size=shards, variant=variant, safe_serialization=safe)
        assert (find_weights(folder).suffix == ".json") == (shards == "100KB")
        for asked in {variant, None}:
            network = ours.from_pretrained(folder, variant=asked)
            assert total(network) == pytest.approx(total(theirs), rel=1e-12)
        refused(lambda: ours.from_pretrained(folder, variant="bf16"), folder, "variant bf16")  # noqa: B023


def test_sdxl_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"addition_embed_type": "text_time", "cross_attention_dim": 2048}))
    refused(lambda: UNet.from_pretrained(tmp_path), tmp_path / "config.json", "SDXL, which is not supported")


def test_shards_that_do_not_go_together(tmp_path):
    index = tmp_path / f"{NAME}.index.json"
    in_shards(tmp_path)
    (tmp_path / "b.bin").unlink()
    refused(lambda: load(tmp_path), index, "b.bin", "missing")
    in_shards(tmp_path, linear__scale="a.safetensors")
    refused(lambda: load(tmp_path), tmp_path / "a.safetensors", "lacks linear.scale", index.name)
    in_shards(tmp_path, linear__bias="c.safetensors")
    save_file({"linear.bias": torch.ones(3)}, tmp_path / "c.safetensors")
    refused(lambda: load(tmp_path), tmp_path / "c.safetensors", "linear.bias", "another shard")
    in_shards(tmp_path)
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    refused(lambda: load(tmp_path), tmp_path / "a.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "x/a.safetensors",
        "/a.safetensors",
        "x\\a.safetensors",
        "..",
        ".",
        "",
        "config.json",
        NAME + ".index.json",
    ],
)
def test_shards_stay_in_their_folder(tmp_path, name):
    """Also a shard that is the index itself."""
    (tmp_path / "x").mkdir()
    in_shards(tmp_path)
    for place in (tmp_path.parent, tmp_path / "x"):
        (place / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    in_shards(tmp_path, linear__weight=name, linear__bias=name)
    refused(lambda: load(tmp_path), tmp_path / f"{NAME}.index.json", repr(name), "own folder")
    (tmp_path.parent / "a.safetensors").unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "should hold a JSON object"),
        *[(json.dumps(value), "weight_map") for value in ({}, {"weight_map": {}}, {"weight_map": ["a"]})],
        *[(json.dumps({"weight_map": {"x": value}}), "weight_map") for value in (None, 1, ["a.bin"])],
        *[
            (json.dumps({"weight_map": {"x": f"{value}.bin"}}), "index.json names")
            for value in ("\0", "\ud800", "a" * 999)
        ],
    ],
)
def test_a_garbled_index(tmp_path, text, message):
    (tmp_path / f"{NAME}.index.json").write_text(text)
    refused(lambda: load(tmp_path), tmp_path / f"{NAME}.index.json", message)


def test_a_note_of_git_lfs(tmp_path):
    for name in (NAME, "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        refused(lambda name=name: read_tensors(tmp_path / name), tmp_path / name, "git lfs pull")


KINDS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": "a LoRA, not a whole U-Net",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA, not a whole U-Net",
    "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": "a LoRA, not a whole U-Net",
    "model.diffusion_model.input_blocks.0.0.weight": "--base FILE",
    "model.diffusion_model.label_emb.0.0.weight": "SDXL",
    "add_embedding.linear_1.weight": "an SDXL U-Net, which is not supported",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "something.else": None,
}


@pytest.mark.parametrize(("key", "kind"), KINDS.items())
def test_what_is(key, kind):
    keys = ["time_embedding.linear_1.weight", key] if kind else [key]
    assert kind in what_is(keys) if kind else what_is(keys) is None


def test_what_the_networks_are(tmp_path):
    """Each network's keys are told from the others', and the refusal of a file says which network's it is."""
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"num_block_repeats": (1,) * 7, "depth_coefficient": 1.0}
    towers = {"text_config": text, "vision_config": text}
    with torch.device("meta"):
        networks = {
            "a U-Net": UNet(UNetConfig(layers_per_block=1)),
            "a VAE": VAE(VAEConfig(layers_per_block=1)),
            "a CLIP text encoder": CLIPTextEncoder(CLIPTextConfig(**text)),
            "CLIP, with both its towers": CLIP(config_from(CLIPConfig, towers)),
            "ALIGN": ALIGN(ALIGNConfig(ALIGNTextConfig(num_hidden_layers=1), ALIGNVisionConfig(**vision))),
            "a vision transformer, such as DINO": DINO(DINOConfig(num_hidden_layers=1)),
        }
    for kind, network in networks.items():
        assert what_is(network.state_dict()) == kind
        for other in networks.values():
            if other is not network:
                refused(lambda: load_tensors(other, network.state_dict(), "FILE"), f"it is {kind}; it ")  # noqa: B023
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, tmp_path / NAME)
    read = read_tensors(tmp_path / NAME)
    refused(
        lambda: load_tensors(networks["a U-Net"], read, tmp_path / NAME),
        f"{tmp_path / NAME} does not fit UNet: it is a LoRA, not a whole U-Net; it lacks conv_in.bias, conv_in.weight",
        "unexpected lora_unet_x.lora_up.weight",
    )


def file_of(header, body=b""):
    """A safetensors file's bytes: the header's length, the header, the numbers."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "empty": b"",
    "garbage": random.Random(0).randbytes(300),
    "text": b"<!doctype html><html>Entry not found</html>\n",
    "no body": file_of({"x": entry()}),
    "no JSON": file_of(b"{"),
    "no UTF-8": file_of(b"\xff\xfe"),
    "a list": file_of([]),
    "a longer header than the file": struct.pack("<Q", 2**62) + b"{}",
    "a shape larger than its bytes": file_of({"x": entry((3,))}, bytes(8)),
    "a shape smaller than its bytes": file_of({"x": entry((1,))}, bytes(8)),
    "a shape past counting": file_of({"x": entry((2**62, 4))}, bytes(8)),
    "an empty shape past counting": file_of({"x": entry((2**63, 0), (0, 0))}),
    "a negative shape": file_of({"x": entry((-2,))}, bytes(8)),
    "offsets past the end": file_of({"x": entry((2,), (8, 16))}, bytes(8)),
    "offsets that overlap": file_of({"x": entry(), "y": entry((2,), (4, 12))}, bytes(12)),
    "an unknown type": file_of({"x": entry(dtype="F31")}, bytes(8)),
    "a type that torch lacks": file_of({"x": entry((8,), (0, 6), "F6_E2M3")}, bytes(6)),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file(tmp_path, data):
    (tmp_path / NAME).write_bytes(data)
    refused(lambda: load(tmp_path), tmp_path / NAME, "not a whole safetensors file")


@pytest.mark.parametrize("name", [NAME, "model.bin"])
@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(12, "Cannot allocate memory")],
)
def test_a_full_memory_is_no_broken_file(tmp_path, monkeypatch, name, error):
    def full(*args, **options):
        raise error

    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setattr(tensors_file, "safe_open", full)
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(type(error)) as raised:
        read_tensors(tmp_path / name)
    assert not isinstance(raised.value, CheckpointError)


def test_a_file_cut_short(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / NAME).write_bytes(whole[:length])
        for call in (lambda: load(tmp_path), lambda: read_metadata(tmp_path / NAME)):
            refused(call, tmp_path / NAME, "not a whole safetensors file")


def test_no_file(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        refused(lambda path=path: read_tensors(path), path, "missing")
        refused(lambda path=path: read_metadata(path), path, "missing")


def test_types_torch_cannot_cast(tmp_path):
    """4-bit floats have a type in torch, and no arithmetic."""
    names = Network(Config()).state_dict()
    header, end = {}, 0
    for name, tensor in names.items():
        size = {"linear.weight": 12}.get(name, 8 if tensor.ndim == 0 else 4 * tensor.numel())
        kind = ("F4", [3, 8]) if name == "linear.weight" else ("I64" if tensor.ndim == 0 else "F32", list(tensor.shape))
        header[name] = entry(kind[1], (end, end + size), kind[0])
        end += size
    (tmp_path / NAME).write_bytes(file_of(header, bytes(end)))
    refused(lambda: load(tmp_path), tmp_path / NAME)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["safetensors", "bin", "bin before 2020", "index"])
def test_fuzz(tmp_path, form):
    """Flipped bytes, cuts and insertions, most of them near the front: success or CheckpointError."""
    if form == "index":
        in_shards(tmp_path)
        path = tmp_path / f"{NAME}.index.json"
    elif form == "safetensors":
        saved(tmp_path)
        path = tmp_path / NAME
    else:
        path = as_bin(tmp_path, zipped=form == "bin")
    source, whole = random.Random(0), path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0] if form == "safetensors" else len(whole)
    outcomes = {"whole": 0, "refused": 0}
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(source.choice([1, 1, 1, 2, 8])):
            place = source.randrange(source.choice([8, header, len(whole)]))
            kind = source.randrange(8)
            if kind == 0:
                del data[place:]
            elif kind == 1:
                data[place:place] = source.randbytes(source.randrange(1, 9))
            elif kind < 5 and place < len(data):
                data[place] = source.choice(b'0129-.,:"[]{}FIa(tRqcX')
            elif place < len(data):
                data[place] ^= 1 << source.randrange(8)
        path.write_bytes(data)
        try:
            if form == "safetensors":
                read_metadata(path)
                load(tmp_path)
            for tensor in read_tensors(path).values():
                tensor.numel() > 1000 or tensor.tolist()  # its numbers are there
            outcomes["whole"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    refused(lambda: read_json(path), path, "missing")
    for text in (b"", b"{", b"\xff", b"[" * 100_000, b"{'a': 1}", b'{"a":' + b"1" * 5000 + b"}"):
        path.write_bytes(text)
        refused(lambda: read_json(path), path, "cannot be read as JSON")
    for text, kind in (("[]", "list"), ("null", "NoneType"), ("3", "int")):
        path.write_text(text)
        refused(lambda: read_json(path), path, kind)
    path.write_text('{"é": [1]}', encoding="utf-8")
    assert read_json(path) == {"é": [1]}


def test_config_from():
    assert config_from(Config, {}) == Config()
    values = {"width": 8, "layers": [3], "eps": 1, "heads": [1, 2], "act": None, "linear": True, "_class_name": "X"}
    before = dict(values)
    assert config_from(Config, values) == Config(8, (3,), 1, (1, 2), "silu", True)
    assert values == before
    assert isinstance(config_from(Config, {"layers": [1]}).layers, tuple)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("width", value) for value in ("8", 8.0, True, [8])],
        *[("layers", 3), ("layers", [1, "2"]), ("heads", {}), ("heads", [1.5])],
        *[("eps", "1e-5"), ("act", 1), ("linear", 0)],
    ],
)
def test_config_of_another_type(name, value):
    refused(
        lambda: config_from(Config, {name: value}),
        "Config",
        name,
        repr(value),
        Config.__dataclass_fields__[name].type,
    )


def test_config_that_cannot_be():
    refused(lambda: config_from(Config, {"heads": 0}), "Config")


@pytest.mark.parametrize("network", [UNet, VAE, CLIPTextEncoder, CLIP, DINO, ALIGN, Scheduler])
def test_a_wrong_config_is_named(network, tmp_path):
    """Some have several, and a base has one for each of its parts."""
    values = {"hidden_size": "x", "block_out_channels": ["x"], "projection_dim": "x", "beta_start": "x"}
    for name in ("config.json", "scheduler_config.json"):
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    refused(lambda: network.from_pretrained(tmp_path), tmp_path, "should be")


def test_refuse(tmp_path):
    fixed = {"act": "silu", "groups": None, "kinds": "A"}
    for values in ({}, {"act": "silu", "kinds": ["A", "A"], "other": 1}, {"act": None, "groups": None}):
        refuse(values, fixed, tmp_path)
    for name, value in (("act", "gelu"), ("groups", 2), ("kinds", ["A", "B"]), ("kinds", "B")):
        refused(lambda name=name, value=value: refuse({name: value}, fixed, tmp_path), tmp_path, name, value)


def test_save_and_read(tmp_path):
    path = tmp_path / "best.safetensors"
    square = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "turned": square.T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "trained": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "count": torch.tensor(3),
    }
    metadata = {"prompt": "a [V] dog, é\n", "step": "40"}
    save_tensors(tensors, path, metadata)
    assert os.listdir(tmp_path) == [path.name]
    assert read_metadata(path) == metadata
    read = read_tensors(path)
    assert read.keys() == tensors.keys() == load_file(path).keys()
    assert all(
        torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype for name, tensor in read.items()
    )
    assert tensors["trained"].requires_grad and not tensors["turned"].is_contiguous()
    save_tensors({"x": square}, path)
    assert read_metadata(path) == {} and read_tensors(path).keys() == {"x"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not the owner's only


def test_save_is_atomic(tmp_path, monkeypatch):
    """A full disk, here a limit on a file's size; then whatever else may go wrong, at each of the two steps."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "best.safetensors"
    save_tensors({"x": torch.ones(3)}, path, {"step": "1"})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(Exception, match="large"):
            save_tensors({"x": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]

    def killed(*_):
        raise KeyboardInterrupt

    for step in (os, "replace"), (write, "save_file"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*step, killed)
            save_tensors({"x": torch.zeros(3)}, path)
        assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), OSError(12, "out of memory")],
)
def test_a_full_memory_is_no_file_that_cannot_be_written(tmp_path, error):
    def half(beside):
        beside.touch()
        raise error

    with pytest.raises(type(error)) as raised:
        write_atomic(tmp_path / "a", half)
    assert raised.value is error and os.listdir(tmp_path) == []


def test_one_size():
    assert one_size("size", {"shortest_edge": 40}, "shortest_edge") == 40
    keys, square = ("height", "width"), {"height": 40, "width": 40}
    assert one_size("size", 40, *keys) == one_size("size", square, *keys) == 40
    others = [{}, {"height": 40}, square | {"width": 41}, square | {"depth": 40}, {"height": "40", "width": "40"}]
    for size in [*others, {"shortest_edge": 40}]:
        refused(lambda size=size: one_size("crop_size", size, *keys), f"crop_size {size}", "height and width")


def as_bin(folder, zipped=True, name="pytorch_model.bin"):
    """The network's file as torch.save writes it: in a zip file, or in the format of before 2020."""
    tensors = saved(folder)
    (folder / NAME).unlink()
    torch.save(tensors, folder / name, _use_new_zipfile_serialization=zipped)
    return folder / name


def any_form(folder, form):
    if form == "safetensors":
        saved(folder)
        return folder / NAME
    return as_bin(folder, zipped=form == "bin")


FORMS = pytest.mark.parametrize("form", ["safetensors", "bin", "bin before 2020"])


@FORMS
def test_a_network_outlives_its_file(tmp_path, form):
    """Tensors are mapped from the file, not copied: another one is renamed over it, it is deleted."""
    path = any_form(tmp_path, form)
    network = load(tmp_path)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
    os.replace(tmp_path / "other", path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    path.unlink()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


@FORMS
def test_training_does_not_reach_the_file(tmp_path, form):
    path = any_form(tmp_path, form)
    before = path.read_bytes()
    network, other = load(tmp_path).train().requires_grad_(True), load(tmp_path)
    network(torch.randn(5, 4)).square().sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    network.norm.num_batches_tracked += 1
    assert not torch.equal(network.linear.weight, other.linear.weight)
    assert torch.equal(load(tmp_path).linear.weight, other.linear.weight)
    del network
    assert path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells a process's memory there")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory(tmp_path, form):
    """Same precision: only mapped, so nothing is in memory before it is used. Another: the cast copy and no more."""
    page, size = os.sysconf("SC_PAGE_SIZE"), 32 * 2**20

    def used():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * page

    class Wide(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(16))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

    tensors = {f"layers.{i}.weight": torch.ones(1024, 1024, dtype=torch.float16) for i in range(16)}
    tensors["count"] = torch.tensor(1)
    if form == "safetensors":
        save_file(tensors, tmp_path / NAME)
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    del tensors
    before = used()
    same = load(Wide, Config(), tmp_path, torch.float16)
    assert used() - before < 0.3 * size
    assert sum(float(parameter.float().sum()) for parameter in same.parameters()) == 2**24
    assert used() - before < 1.3 * size
    del same
    before = used()
    cast = load(Wide, Config(), tmp_path, torch.float32)
    assert used() - before < 1.3 * 2 * size  # the whole number in the file does not hold the mapping
    assert cast.count == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bin_file_is_read_without_running_code(tmp_path):
    tensors = {"weight": torch.randn(2, 3), "bias": nn.Parameter(torch.randn(2)), "turned": torch.randn(3, 2).T}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert find_weights(tmp_path).name == "pytorch_model.bin"
    read = read_tensors(tmp_path / "pytorch_model.bin")
    assert all(torch.equal(read[name], tensors[name]) and not read[name].requires_grad for name in tensors)

    class Trap:
        def __init__(self, function, *args):
            self.call = (function, args)

        def __reduce__(self):
            return self.call

    executed = tmp_path / "executed"
    traps = [
        Trap(open, str(executed), "w"),
        Trap(os.system, f"touch {executed}"),
        Trap(exec, f"open({str(executed)!r}, 'w')"),
    ]
    for i, trap in enumerate(traps):
        torch.save({"weight": trap}, tmp_path / f"trap{i}.bin")
        torch.save({"weight": trap}, tmp_path / f"old{i}.bin", _use_new_zipfile_serialization=False)
        (tmp_path / f"plain{i}.bin").write_bytes(pickle.dumps(trap))
        for name, why in (("trap", "code is not run"), ("old", "code is not run"), ("plain", "not torch's own")):
            refused(lambda path=tmp_path / f"{name}{i}.bin": read_tensors(path), f"{name}{i}.bin", why)
        index = {"weight_map": {"weight": f"trap{i}.bin"}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        refused(lambda: read_tensors(tmp_path / "pytorch_model.bin.index.json"), f"trap{i}.bin", "not run")
    assert not executed.exists()
    pickle.loads((tmp_path / "plain1.bin").read_bytes())
    assert executed.exists()  # the trap is one


def test_a_bin_file_of_something_else(tmp_path):
    as_bin(tmp_path)
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(whole[:200])
    (tmp_path / "shorter.bin").write_bytes(whole[:-1])
    (tmp_path / "empty.bin").touch()
    for name in ("short", "shorter", "empty", "absent"):
        refused(lambda path=tmp_path / f"{name}.bin": read_tensors(path), f"{name}.bin")
    others = {
        "nothing else": [[1, 2], {"x": 1}, {1: torch.ones(1)}, {"state_dict": {"x": torch.ones(1)}}, torch.ones(1)],
        "no numbers: x": [{"x": torch.ones(2, 2).to_sparse()}, {"x": torch.ones(2, device="meta")}],
    }
    for message, values in others.items():
        for value in values:
            torch.save(value, tmp_path / "other.bin")
            refused(lambda: read_tensors(tmp_path / "other.bin"), tmp_path / "other.bin", message)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"weight": torch.randn(3, 5), "bias": torch.randn(5).half(), "count": torch.tensor(7)}
    metadata = {"format": "pt", "noun": 'a "größere" dog\n/\x7f', **{f"key {i}": str(i) for i in range(20)}}
    for i in range(6):  # by chance alone the 22 keys would hardly come in the same order six times
        save_tensors(tensors, tmp_path / f"{i}.safetensors", dict(sorted(metadata.items(), reverse=i % 2)))
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(6)}) == 1
    assert read_metadata(tmp_path / "0.safetensors") == metadata
    read = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
