"""The ways in which the authors' released code differs from their paper, each with a test that fails if we do so.

https://github.com/andrew-miao/RPO; docs/paper-and-release.md marks them with a dagger. test_train.py, where the loop is
written out, has the reward of each negative, the prompts of both losses, what a pair is, how many negatives there are,
and that they are encoded as they were drawn (the release stores them as JPEG); it has the seed too, which for the
release is none where it is 0. The token in scored texts and what is embedded once are in test_reward.py.
"""

import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from string import Template

import pytest
import torch
from tiny import call
from trainings import NEGATIVES, RESULT, contents, watched

import baselines.__main__
import baselines.dreambooth
import evaluate
import sample
import train
from baselines.release import Release
from model.files.tensors import read_metadata
from support import flags

ROOT = Path(train.__file__).parent


def test_the_release_can_be_run_for_comparison(run, tmp_path):
    """Its loss is RPO's formula with L_sim's photo in L_pref, and a t for each picture."""
    watched_release = watched(Release)
    assert run("--batch", 3, "--ckpt", "release.safetensors", method=watched_release) == 0
    trainer = watched_release.last
    batch, again = trainer.batch(1), trainer.batch(1)
    assert all(map(torch.equal, batch, again)) and not torch.equal(*batch.t.unbind(1))
    assert not torch.equal(batch.eps_ref, batch.eps_gen)
    asked = []
    trainer.theta = lambda x_t, t, context: asked.append((t, context)) or x_t
    similarity, ref, *_ = trainer.losses(batch)
    assert torch.equal(similarity, ref) and torch.equal(asked[0][0], torch.cat(batch.t.unbind(1)))
    assert torch.equal(asked[0][1], torch.cat([batch.c, batch.c_mod]))
    assert read_metadata(tmp_path / "release.safetensors")["method"] == "release"


def test_every_negative_and_photo_is_used(done):
    """The release's data set is as long as there are photos: about 5 of its 128 negatives are ever used."""
    pairs = [done[1].batch(step) for step in range(1, 401)]
    photos = Counter(int(pair.photo) for pair in pairs)
    negatives = Counter(int(pair.negative) for pair in pairs)
    assert len(photos) == 3 and min(photos.values()) > 90
    assert len(negatives) == NEGATIVES and min(negatives.values()) > 10


def test_leaves_what_is_the_users_alone(run, world, tmp_path):
    """The release deletes the folder that the user named for the negatives."""
    subject = Path(shutil.copytree(world / "dog", tmp_path / "mine" / "dog"))
    for name in ("mine/dog/notes.txt", "mine/dog/generated/0.jpg", "outputs/a.png", "generated/b.png", "best.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    assert run("--subject", subject, "--steps", 1) == 0
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert {path.name for path in after.keys() - before.keys()} == set(RESULT)


# The command in the release's README stops with a TypeError. (.ci/run runs those of ours that take minutes.)
SCRIPTS = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate, "-m baselines": baselines.__main__}
SHELL = {"lambda": "0.3", "resume": "--resume"}  # variables of the job array; the others are paths


def commands():
    """Every call of a script in the README, in docs/ and in the scripts' own first lines: (script, its arguments)."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    texts += [module.__doc__ for module in (train, sample, evaluate, baselines.dreambooth, baselines)]
    lines = "\n".join(texts).replace("\\\n", " ")
    found = re.findall(rf"(?:python|torchrun [^\n]*?) ({'|'.join(map(re.escape, SCRIPTS))})((?: [^`\n&|]+)?)", lines)
    found = [(name, Template(rest).safe_substitute(SHELL)) for name, rest in found if "--" in rest]
    assert {name for name, _ in found} == SCRIPTS.keys()
    return [(SCRIPTS[name], shlex.split(rest, comments=True)) for name, rest in dict.fromkeys(found)]


@pytest.mark.parametrize(
    ("module", "words"), commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else value.__name__
)
def test_a_documented_command_is_understood(module, words, monkeypatch, tmp_path):
    """Up to where the work would begin."""
    begun = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "guarded", lambda *args, **options: begun.append(args) or 0)
    assert call(module, monkeypatch, *words) == 0
    assert len(begun) == 1
