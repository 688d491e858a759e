"""Files are written whole or not at all, and the same tensors give the same bytes."""

import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from model.files.tensors import read_metadata, read_tensors
from model.files.write import save_tensors, write_atomic


def test_save_and_read(tmp_path):
    path = tmp_path / "new" / "best.safetensors"
    tensors = {
        "turned": torch.arange(12.0).reshape(3, 4).T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "trained": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "count": torch.tensor(3),
    }
    save_tensors(tensors, path, {"prompt": "a [V] dog, é\n"})
    assert os.listdir(path.parent) == [path.name]
    assert read_metadata(path) == {"prompt": "a [V] dog, é\n"}
    read = read_tensors(path)
    assert read.keys() == tensors.keys() == load_file(path).keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
    assert tensors["trained"].requires_grad and not tensors["turned"].is_contiguous()
    save_tensors({"x": torch.ones(1)}, path)
    assert read_metadata(path) == {} and read_tensors(path).keys() == {"x"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # safetensors alone would make it 0600


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"weight": torch.randn(3, 5), "bias": torch.randn(5).half(), "count": torch.tensor(7)}
    metadata = {"format": "pt", "noun": 'a "größere" dog\n/\x7f', **{f"key {i}": str(i) for i in range(20)}}
    for i in range(6):  # by chance alone the 22 keys would hardly come in the same order six times
        save_tensors(tensors, path := tmp_path / f"{i}.safetensors", dict(sorted(metadata.items(), reverse=i % 2)))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert read_metadata(path) == metadata
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """Here a limit on the size of a file: safetensors' own error."""
    save_tensors({"x": torch.ones(3)}, path := tmp_path / "best.safetensors")
    old, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ValueError, match="large"):
            save_tensors({"x": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


FULL = [OSError(28, "full"), RuntimeError("full"), SafetensorError("full")]
OTHERS = [KeyboardInterrupt(), TypeError("a mistake"), torch.OutOfMemoryError(), OSError(12, "Cannot allocate memory")]


@pytest.mark.parametrize("raised", [*FULL, *OTHERS], ids=repr)
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, raised):
    """In writing, or in renaming. A full memory is not reported as a file that cannot be written."""
    path, seen = tmp_path / "a.txt", ValueError if raised in FULL else type(raised)
    path.write_text("old")

    def fail(*_):
        raise raised

    def half(temporary):
        temporary.write_text("ha")
        fail()

    with pytest.raises(seen) as first:
        write_atomic(path, half)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(seen) as second:
        write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert (first.value is raised) == (second.value is raised) == (seen is not ValueError)
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "best.txt", tmp_path / "there" / "kept.txt"
    for _ in range(2):  # a link to nothing, and to a file
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write_atomic(link, lambda path: path.write_text("new"))
        assert link.is_symlink() and target.read_text() == "new" and len(list(target.parent.iterdir())) == 1


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def failing(path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 22")

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="no space left on the disk"):
        write_atomic(tmp_path / "state.pt", failing)
