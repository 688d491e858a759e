"""The ways in which the authors' released code differs from their paper, each with a test that fails if we do so.

https://github.com/andrew-miao/RPO; docs/paper-and-release.md marks them with a dagger. The reward of each negative and
the prompts of both losses are in test_train.py, where the loop is written out; the token in scored texts and what is
embedded once in test_reward.py.
"""

import copy
import dataclasses
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from string import Template

import pytest
import torch
from safetensors.torch import load_file
from tiny import call
from trainings import NEGATIVES, RESULT, RPO, contents, same, same_results, watched

import baselines.__main__
import baselines.dreambooth
import evaluate
import sample
import train
from baselines.release import Release
from model.files.tensors import read_metadata
from support import flags

ROOT = Path(train.__file__).parent


def marks(like):
    """0, 1, 2, ... along the first axis."""
    return torch.arange(float(len(like))).reshape(-1, *[1] * (like.ndim - 1)).expand_as(like).clone()


@pytest.fixture
def marked(done):
    """A trainer whose photos, negatives and prompts are marked by numbers, and P by both."""
    trainer = copy.copy(done[1])
    trainer.settings = dataclasses.replace(trainer.settings, batch=5)
    photos, negatives = trainer.photo_latents, trainer.generated_latents
    trainer.photo_latents = marks(photos[0]), torch.zeros_like(photos[1])
    trainer.generated_latents = 100 + marks(negatives[0]), torch.zeros_like(negatives[1])
    trainer.c, trainer.c_mod = torch.full_like(trainer.c, -1), 100 + marks(trainer.c_mod)
    trainer.p = torch.arange(3)[:, None] / 4 + torch.arange(NEGATIVES) / 100
    return trainer


def test_a_pair_is_of_one_photo_one_negative_its_prompt_and_its_label(marked):
    batch = marked.batch(1)
    photo, negative = batch.x_ref[:, 0, 0, 0], batch.x_gen[:, 0, 0, 0]
    assert len(set(photo.tolist())) > 1 and len(set(negative.tolist())) > 1
    assert torch.equal(batch.photo, photo.long())
    assert torch.allclose(batch.p, photo / 4 + (negative - 100) / 100)
    assert torch.equal(batch.c[:, 0, 0], torch.full((5,), -1.0)) and torch.equal(batch.c_mod[:, 0, 0], negative)
    assert len(batch.t.unique()) == len(batch.eps_ref.unique(dim=0)) == len(batch.eps_gen.unique(dim=0)) == 5
    assert not torch.equal(batch.eps_ref, batch.eps_gen)  # each picture its own


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


def test_every_negative_and_photo_is_used(marked):
    """The release's data set is as long as there are photos: about 5 of its 128 negatives are ever used."""
    pairs = [marked.batch(step) for step in range(1, 81)]
    photos = Counter(torch.cat([pair.photo for pair in pairs]).tolist())
    negatives = Counter(torch.cat([pair.x_gen[:, 0, 0, 0] for pair in pairs]).tolist())
    assert len(photos) == 3 and min(photos.values()) > 90  # of 400
    assert len(negatives) == NEGATIVES and min(negatives.values()) > 10


@pytest.mark.parametrize("count", [1, 3])
def test_images_per_prompt_says_how_many_negatives_there_are(run, count):
    """The release has 16 written into its code, and parses --beta without reading it (all flags: test_train.py)."""
    assert run("--steps", 1, "--images-per-prompt", count) == 0
    asked = [Counter(prompts) for _, prompts, _ in RPO.last.drawn]  # of the negatives, then of two validations
    assert asked == [dict.fromkeys(RPO.last.subject.training_prompts, count)] * 3 and RPO.last.p.shape == (3, 8 * count)


def test_same_command_same_result_other_seed_another(run, done, tmp_path):
    """The release takes seed 0 for no seed when it draws; here it is the default."""
    assert run("--seed", 0) == 0
    assert same_results(tmp_path, done[0])
    assert run("--seed", 1) == 0
    assert not same(load_file(tmp_path / "best.safetensors"), load_file(done[0] / "best.safetensors"))


def test_negatives_are_encoded_as_they_were_drawn(done):
    """The release stores them as JPEG."""
    _, trainer = done
    assert all(map(torch.equal, trainer.photo_latents, trainer.sd.encode_images(trainer.photos)))
    assert all(map(torch.equal, trainer.generated_latents, trainer.sd.encode_images(trainer.drawn[0][2])))


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
    return [(SCRIPTS[name], shlex.split(rest, comments=True)) for name, rest in dict.fromkeys(found)]


def test_the_pages_show_every_script():
    assert {module for module, _ in commands()} == set(SCRIPTS.values()) and len(commands()) >= 10


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
