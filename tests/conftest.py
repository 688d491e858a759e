"""Every test runs offline on the CPU with one thread (two threads beside another job run several times slower)."""

import os
import shutil
from functools import partial

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny random base model, `base`, and a subject's photos, `dog`. Not to be changed."""
    from tiny import write_base, write_photos

    folder = tmp_path_factory.mktemp("world")
    write_base(folder / "base")
    write_photos(folder / "dog")
    return folder


@pytest.fixture
def base(world, tmp_path_factory):
    """A copy of the base, which a test may change."""
    return shutil.copytree(world / "base", tmp_path_factory.mktemp("copy") / "base")


@pytest.fixture(scope="session")
def measured(world, tmp_path_factory):
    """The base with networks for evaluate.py. Not to be changed."""
    from tiny import write_metrics

    folder = shutil.copytree(world / "base", tmp_path_factory.mktemp("measured") / "base")
    write_metrics(folder / "metrics", folder / "tokenizer")
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Call `train_tiny` in an empty folder."""
    from trainings import train_tiny

    monkeypatch.chdir(tmp_path)
    return partial(train_tiny, world, monkeypatch)


@pytest.fixture(scope="session")
def done(world, tmp_path_factory):
    """An uninterrupted run: its folder and its RPO."""
    from trainings import RPO, train_tiny

    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_tiny(world, patch) == 0
    return folder, RPO.last
