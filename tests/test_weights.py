"""Reading checkpoints strictly: what does not fit is named in one line, and no file, however broken, gives another
error than CheckpointError. Writing them: whole or not at all."""

import json
import os
import random
import struct
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model import weights
from model.weights import CheckpointError


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


NAME = "model.safetensors"


def saved(folder, **changes):
    """A network's folder; `changes` replace tensors, None leaves one out. Dots in names are written as __."""
    torch.manual_seed(0)
    tensors = Network(Config()).state_dict()
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / NAME)
    return tensors


def load(folder, **kwargs):
    return weights.load(Network, Config(), folder, **kwargs)


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
    refused(lambda: weights.load(Network, Config(width=-2), tmp_path), tmp_path / "config.json", "no possible network")


def test_find_weights(tmp_path):
    refused(lambda: weights.find_weights(tmp_path), tmp_path, "diffusion_pytorch_model.safetensors", NAME)
    (tmp_path / "model.fp16.safetensors").touch()
    (tmp_path / "diffusion_pytorch_model.safetensors").mkdir()
    refused(lambda: weights.find_weights(tmp_path), tmp_path)
    (tmp_path / NAME).touch()
    assert weights.find_weights(tmp_path) == tmp_path / NAME


def file_of(header, body=b""):
    """A safetensors file's bytes: the header's length, the header, the numbers."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "empty": b"",
    "garbage": random.Random(0).randbytes(300),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
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


def test_a_file_cut_short(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / NAME).write_bytes(whole[:length])
        for call in (lambda: load(tmp_path), lambda: weights.read_metadata(tmp_path / NAME)):
            refused(call, tmp_path / NAME, "not a whole safetensors file")


def test_no_file(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        refused(lambda path=path: weights.read_tensors(path), path, "missing")
        refused(lambda path=path: weights.read_metadata(path), path, "missing")


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


def test_fuzz(tmp_path):
    """Flipped bytes, cuts and insertions, most of them in the header: success or CheckpointError."""
    saved(tmp_path)
    path, source = tmp_path / NAME, random.Random(0)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    outcomes = {"whole": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(source.choice([1, 1, 1, 2, 8])):
            place = source.randrange(source.choice([8, header, len(whole)]))
            kind = source.randrange(8)
            if kind == 0:
                del data[place:]
            elif kind == 1:
                data[place:place] = source.randbytes(source.randrange(1, 9))
            elif kind < 5 and place < len(data):
                data[place] = source.choice(b'0129-.,:"[]{}FIa')
            elif place < len(data):
                data[place] ^= 1 << source.randrange(8)
        path.write_bytes(data)
        try:
            weights.read_metadata(path)
            load(tmp_path)
            outcomes["whole"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    refused(lambda: weights.read_json(path), path, "missing")
    for text in (b"", b"{", b"\xff", b"[" * 100_000, b"{'a': 1}", b'{"a":' + b"1" * 5000 + b"}"):
        path.write_bytes(text)
        refused(lambda: weights.read_json(path), path, "cannot be read as JSON")
    for text, kind in (("[]", "list"), ("null", "NoneType"), ("3", "int")):
        path.write_text(text)
        refused(lambda: weights.read_json(path), path, kind)
    path.write_text('{"é": [1]}', encoding="utf-8")
    assert weights.read_json(path) == {"é": [1]}


def test_config_from():
    assert weights.config_from(Config, {}) == Config()
    values = {"width": 8, "layers": [3], "eps": 1, "heads": [1, 2], "act": None, "linear": True, "_class_name": "X"}
    before = dict(values)
    assert weights.config_from(Config, values) == Config(8, (3,), 1, (1, 2), "silu", True)
    assert values == before
    assert isinstance(weights.config_from(Config, {"layers": [1]}).layers, tuple)


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
        lambda: weights.config_from(Config, {name: value}),
        "Config",
        name,
        repr(value),
        Config.__dataclass_fields__[name].type,
    )


def test_config_that_cannot_be():
    refused(lambda: weights.config_from(Config, {"heads": 0}), "Config")


def test_refuse(tmp_path):
    fixed = {"act": "silu", "groups": None, "kinds": "A"}
    for values in ({}, {"act": "silu", "kinds": ["A", "A"], "other": 1}, {"act": None, "groups": None}):
        weights.refuse(values, fixed, tmp_path)
    for name, value in (("act", "gelu"), ("groups", 2), ("kinds", ["A", "B"]), ("kinds", "B")):
        refused(lambda name=name, value=value: weights.refuse({name: value}, fixed, tmp_path), tmp_path, name, value)


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
    weights.save_tensors(tensors, path, metadata)
    assert os.listdir(tmp_path) == [path.name]
    assert weights.read_metadata(path) == metadata
    read = weights.read_tensors(path)
    assert read.keys() == tensors.keys() == load_file(path).keys()
    assert all(
        torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype for name, tensor in read.items()
    )
    assert tensors["trained"].requires_grad and not tensors["turned"].is_contiguous()
    weights.save_tensors({"x": square}, path)
    assert weights.read_metadata(path) == {} and weights.read_tensors(path).keys() == {"x"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not the owner's only


def test_save_is_atomic(tmp_path, monkeypatch):
    """A full disk, here a limit on a file's size; then whatever else may go wrong, at each of the two steps."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "best.safetensors"
    weights.save_tensors({"x": torch.ones(3)}, path, {"step": "1"})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(Exception, match="large"):
            weights.save_tensors({"x": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]

    def killed(*_):
        raise KeyboardInterrupt

    for step in (os, "replace"), (weights, "save_file"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*step, killed)
            weights.save_tensors({"x": torch.zeros(3)}, path)
        assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


def test_a_reader_keeps_the_file_it_opened(tmp_path):
    path = tmp_path / "best.safetensors"
    weights.save_tensors({"x": torch.ones(3)}, path)
    before = weights.read_tensors(path)["x"]  # may be mapped from the file, not copied
    weights.save_tensors({"x": torch.zeros(3)}, path)
    assert before.tolist() == [1, 1, 1]


def test_a_bin_file_is_read_without_running_code(tmp_path):
    tensors = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert weights.find_weights(tmp_path).name == "pytorch_model.bin"
    read = weights.read_tensors(tmp_path / "pytorch_model.bin")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"weight": Trap()}, tmp_path / "trap.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    (tmp_path / "short.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:200])
    (tmp_path / "empty.bin").touch()
    for name in ("trap", "list", "short", "empty", "absent"):
        with pytest.raises(weights.CheckpointError) as caught:
            weights.read_tensors(tmp_path / f"{name}.bin")
        assert f"{name}.bin" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"weight": torch.randn(3, 5), "bias": torch.randn(5).half(), "count": torch.tensor(7)}
    metadata = {"format": "pt", "noun": 'a "größere" dog\n/\x7f', **{f"key {i}": str(i) for i in range(20)}}
    for i in range(6):  # by chance alone the 22 keys would hardly come in the same order six times
        weights.save_tensors(tensors, tmp_path / f"{i}.safetensors", dict(sorted(metadata.items(), reverse=i % 2)))
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(6)}) == 1
    assert weights.read_metadata(tmp_path / "0.safetensors") == metadata
    read = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
