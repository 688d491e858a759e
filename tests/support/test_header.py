"""header.py: which base a checkpoint belongs to and how to read it. test_train.py has what --resume accepts."""

import argparse
import os
from pathlib import Path

import pytest

from support import header
from support.flags import EMBEDDED_BASE


def test_base_names(tmp_path, monkeypatch):
    assert header.base_name(EMBEDDED_BASE) == "weights/toy"
    monkeypatch.chdir(EMBEDDED_BASE.parent)
    assert header.base_name(Path("toy")) == "weights/toy"
    assert header.base_folder("weights/toy") == EMBEDDED_BASE
    assert header.base_folder(header.base_name(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    Path("link.safetensors").symlink_to(tmp_path / "store")  # its tokenizer/ is next to the link
    assert header.base_name(Path("link.safetensors")) == str(tmp_path / "link.safetensors")


def test_digest_is_of_names_and_contents_wherever_they_are(tmp_path):
    digests, name = [], os.fsdecode(b"caf\xe9.png")  # not UTF-8
    for folder, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text, encoding="utf-8")
        digests.append(header.digest([tmp_path / folder]))
    assert digests[0] == digests[1] != digests[2]


def flags(**given):
    return argparse.Namespace(**{"base": None, "variant": None, "prediction_type": None} | given)


def test_base_of_a_checkpoint(tmp_path):
    """Flags win. A whole U-Net has its own prediction type on any base; a LoRA has that of the base."""
    ckpt, whole = tmp_path / "best.safetensors", {"base": str(tmp_path), "prediction_type": "v_prediction"}
    lora, half = whole | {"lora_rank": "4"}, whole | {"variant": "fp16"}
    for base, read, expected in (
        *[(None, read, "v_prediction") for read in (whole, lora)],
        *[(tmp_path, whole, "v_prediction"), (tmp_path, lora, None), (tmp_path, {}, None)],
    ):
        assert header.resolve_base(flags(base=base), ckpt, read) == (tmp_path, None, expected)
        assert header.resolve_base(flags(base=base, prediction_type="epsilon"), ckpt, read)[2] == "epsilon"
    assert header.resolve_base(flags(), None, {}) == (EMBEDDED_BASE, None, None)
    for given, expected in ((None, "fp16"), ("ema", "ema")):
        assert header.resolve_base(flags(variant=given), ckpt, half)[1] == expected
    for read, words in (({}, "names no base model"), ({"base": str(tmp_path / "gone")}, "gone, which is not there")):
        with pytest.raises(ValueError, match=words):
            header.resolve_base(flags(), ckpt, read)


def test_drawing_options(tmp_path):
    """A flag wins, then the header (guidance alone), then the base's recommendation, then the default."""

    def of(read=None, **given):
        args = argparse.Namespace(**{"solver_steps": None, "guidance": None, "sampler": None} | given)
        options = header.drawing_options(args, Path("best.safetensors"), read or {}, tmp_path)
        return options["steps"], options["guidance"], options["sampler"]

    assert of() == (20, 7.5, "dpm++")
    (tmp_path / "rpo.json").write_text('{"solver_steps": 10, "guidance": 4, "sampler": "ddpm"}', encoding="utf-8")
    trained = {"guidance": "3", "solver_steps": "5", "sampler": "dpm++"}
    assert of() == (10, 4, "ddpm") and of(trained) == (10, 3, "ddpm")
    assert of(trained, solver_steps=7, guidance=2.0, sampler="ddim") == (7, 2, "ddim")
    with pytest.raises(ValueError, match=r"best\.safetensors is wrong about guidance"):
        of({"guidance": "-1"})
    (tmp_path / "rpo.json").write_text('{"solver_steps": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rpo\.json is wrong about solver_steps"):
        of()
