"""The ways in which the authors' released code differs from their paper, each with a test that fails if we do so.

https://github.com/andrew-miao/RPO; the README lists them in the same order. The runs are those of test_train.py.
"""

import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from string import Template

import pytest
import test_train
import torch
from safetensors.torch import load_file
from test_train import NEGATIVES, RESULT, Watched, history, same, same_files
from tiny import call

import evaluate
import sample
import train

ROOT = Path(train.__file__).parent

world, run, done, first_step = test_train.world, test_train.run, test_train.done, test_train.first_step  # fixtures


# ---------------------------------------------------------------------------------------------- 1: the label
# The release labels every negative of a prompt with the reward of the prompt's first.


def test_each_negative_has_its_own_reward_with_its_own_prompt(run, monkeypatch):
    seen, drawn = [], []
    original = train.preference_probability
    monkeypatch.setattr(train, "preference_probability", lambda *r: seen.append(r[:2]) or original(*r))
    draw = Watched.draw
    monkeypatch.setattr(
        Watched,
        "draw",
        lambda self, prompts, *args: drawn.append((prompts, draw(self, prompts, *args))) or drawn[-1][1],
    )
    assert run("--steps", 1, "--lambda-train", 0.5) == 0
    (r_ref, r_gen), (prompts, negatives), trainer = seen[0], drawn[0], Watched.last
    assert len(seen) == 1 and r_ref.shape == (3, NEGATIVES) and r_gen.shape == (NEGATIVES,)
    assert len(set(r_gen.tolist())) == NEGATIVES
    for j, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        assert r_gen[j].item() == pytest.approx(trainer.reward([negative], [prompt], 0.5).item(), abs=1e-5)
        for i, photo in enumerate(trainer.photos):
            assert r_ref[i, j].item() == pytest.approx(trainer.reward([photo], [prompt], 0.5).item(), abs=1e-5)
    assert torch.equal(trainer.p_ref_wins, torch.sigmoid(r_ref - r_gen))


def test_a_pair_is_of_one_photo_one_negative_its_prompt_and_its_label(done, monkeypatch):
    """With every photo and negative marked by a number, what the step puts together must bear the same marks."""
    _, trainer = done
    monkeypatch.setattr(trainer.args, "batch", 5)
    means, stds = trainer.ref_posterior
    monkeypatch.setattr(trainer, "ref_posterior", (marks(3, means), torch.zeros_like(stds)))
    means, stds = trainer.drawn_posterior
    monkeypatch.setattr(trainer, "drawn_posterior", (100 + marks(NEGATIVES, means), torch.zeros_like(stds)))
    monkeypatch.setattr(trainer, "drawn_context", 100 + marks(NEGATIVES, trainer.drawn_context))
    monkeypatch.setattr(trainer, "ref_context", torch.full_like(trainer.ref_context, -1))
    monkeypatch.setattr(trainer, "p_ref_wins", torch.arange(3)[:, None] / 4 + torch.arange(NEGATIVES) / 100)
    noted = {}
    label, add_noise = train.preference_label, trainer.sd.scheduler.add_noise
    monkeypatch.setattr(train, "preference_label", lambda p, draws: noted.update(p=p) or label(p, draws))

    def note_noise(x_0, eps, t):
        noted.update(x_0=x_0, eps=eps, t=t)
        return add_noise(x_0, eps, t)

    class Stop(Exception):
        pass

    def note_context(x_t, t, context):
        noted.update(context=context)
        raise Stop

    monkeypatch.setattr(trainer.sd.scheduler, "add_noise", note_noise)
    monkeypatch.setattr(trainer.unet, "forward", note_context)
    with pytest.raises(Stop):
        trainer.step(1)
    photo, negative = noted["x_0"][:, 0, 0, 0].chunk(2)
    assert torch.allclose(noted["p"], photo / 4 + (negative - 100) / 100)
    assert torch.equal(noted["context"][:, 0, 0], torch.cat([torch.full((5,), -1.0), negative]))
    assert len(set(negative.tolist())) > 1 and len(set(photo.tolist())) > 1
    for shared in ("eps", "t"):  # within a pair; each pair has its own
        ref, gen = noted[shared].chunk(2)
        assert torch.equal(ref, gen) and len(ref.unique(dim=0)) == 5


def marks(count, like):
    return torch.arange(float(count)).reshape(-1, *[1] * (like.ndim - 1)).expand_as(like).clone()


# ---------------------------------------------------------------------------------------------- 2: the negatives used
# The release's data set is as long as the photos are many, so that about 5 of its 128 negatives are ever seen.


def test_every_negative_and_photo_is_used(done, monkeypatch):
    _, trainer = done
    used = []

    class Stop(Exception):
        pass

    def note(posterior, index, draws):
        used.append(index.item())
        if len(used) % 2 == 0:  # the photo, then the negative
            raise Stop
        return torch.zeros(1)

    monkeypatch.setattr(train, "latents", note)
    for step in range(1, 401):
        with pytest.raises(Stop):
            trainer.step(step)
    photos, negatives = Counter(used[::2]), Counter(used[1::2])
    assert len(photos) == 3 and min(photos.values()) > 90
    assert len(negatives) == NEGATIVES and min(negatives.values()) > 10


# ---------------------------------------------------------------------------------------------- 3: flags
# The release parses --beta and never reads it; λ_train and 16 images a prompt are written into its code.


@pytest.mark.parametrize("option", [("--beta", 5), ("--images-per-prompt", 1)], ids=lambda option: option[0])
def test_the_flag_changes_what_is_learned(run, tmp_path, first_step, option):
    assert run("--steps", 1, *option) == 0
    assert not same(load_file(tmp_path / "best.safetensors"), first_step)


@pytest.mark.parametrize("count", [1, 3])
def test_images_per_prompt_says_how_many_negatives_there_are(run, monkeypatch, count):
    drawn, draw = [], Watched.draw

    def note(self, prompts, *args):
        drawn.append(Counter(prompts))
        return draw(self, prompts, *args)

    monkeypatch.setattr(Watched, "draw", note)
    assert run("--steps", 1, "--images-per-prompt", count) == 0
    prompts = Watched.last.subject.training_prompts
    assert drawn == [dict.fromkeys(prompts, count)] * 3  # the negatives, then two validations
    assert Watched.last.p_ref_wins.shape == (3, 8 * count)


def test_lambda_train_decides_the_labels(run, tmp_path):
    """Made sharp, so that the few labels of a short run do differ."""
    wins, weights = [], []
    for lam in (0, 1):
        assert run("--lambda-train", lam, "--tau", 1e-4, "--validate-every", 4) == 0
        wins.append(Watched.last.p_ref_wins)
        weights.append(load_file(tmp_path / "best.safetensors"))
    trainer = Watched.last
    align_i = trainer.reward.alignments(trainer.photos, ["a dog"] * 3)[0]
    assert torch.equal(
        wins[1][0] > wins[1][1], (align_i[0] > align_i[1]).expand(NEGATIVES) & (wins[1][0] != wins[1][1])
    )
    assert not torch.equal(wins[0], wins[1])
    assert not same(*weights)


# ---------------------------------------------------------------------------------------------- 4: the scored text
# The release means to take [V] out of the text, with a pattern that cannot match.


def test_no_text_that_is_scored_has_the_token(done):
    texts = done[1].texts
    assert len(texts) == 8 and "a green dog" in texts
    assert not any("[" in text or "V]" in text for text in texts)
    assert all("[V]" in prompt for prompt in done[1].draws[0][1])  # but all that are drawn


# ---------------------------------------------------------------------------------------------- 5: seed 0; ALIGN
# The release takes seed 0 for no seed, and loads ALIGN and embeds the photos anew at every validation.


def test_same_command_same_result_other_seed_another(run, done, tmp_path):
    assert run("--seed", 0) == 0  # 0 is a seed, and the default
    assert same_files(tmp_path, done[0])
    assert run("--seed", 1) == 0
    assert not same(load_file(tmp_path / "best.safetensors"), load_file(done[0] / "best.safetensors"))
    assert history(tmp_path)[0] != history(done[0])[0]


def test_align_is_loaded_once_and_sees_no_photo_after_the_preparation(done, world):
    _, trainer = done
    assert trainer.loads == [world / "base" / "reward"]
    start = trainer.draws[1][3]  # how often ALIGN had looked when the first validation began to draw
    assert sum(trainer.embedded[start:]) == 3 * NEGATIVES


# ---------------------------------------------------------------------------------------------- 6: what is on disk
# The release stores negatives as JPEG, and deletes the folder that the user named for them.


def test_negatives_are_encoded_as_they_were_drawn(done):
    _, trainer = done
    assert trainer.encoded[0] is trainer.photos
    assert trainer.encoded[1] is trainer.draws[0][-1]


def test_leaves_what_is_the_users_alone(run, world, tmp_path):
    subject = Path(shutil.copytree(world / "dog", tmp_path / "mine" / "dog"))
    for name in ("mine/dog/notes.txt", "mine/dog/generated/0.jpg", "outputs/a.png", "generated/b.png", "best.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run("--subject", subject, "--steps", 1) == 0
    assert all(path.read_bytes() == data for path, data in before.items())
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() and path not in before} == set(RESULT)


# ---------------------------------------------------------------------------------------------- 7: the commands
# The command in the release's README stops with a TypeError. (.ci/run runs those of ours that take minutes.)


SHELL = {"lambda": "0.3", "resume": "--resume"}  # variables of the job array; the others are paths


def commands():
    """Every call of a script in the README and in the scripts' own first lines: (script, its arguments)."""
    scripts = {module.__name__: module for module in (train, sample, evaluate)}
    texts = [(ROOT / "README.md").read_text(encoding="utf-8"), *(module.__doc__ for module in scripts.values())]
    lines = "\n".join(texts).replace("\\\n", " ")
    found = re.findall(rf"(?:python|torchrun [^\n]*?) ({'|'.join(scripts)})\.py((?: [^`\n&|]+)?)", lines)
    found = [(name, Template(rest).safe_substitute(SHELL)) for name, rest in found]
    return [(scripts[name], shlex.split(rest, comments=True)) for name, rest in dict.fromkeys(found)]


def test_the_readme_shows_every_script():
    assert {module for module, _ in commands()} == {train, sample, evaluate} and len(commands()) >= 10


@pytest.mark.parametrize(
    ("module", "words"), commands(), ids=lambda value: " ".join(value) if isinstance(value, list) else value.__name__
)
def test_a_documented_command_is_understood(module, words, monkeypatch, tmp_path):
    """Up to where the work would begin."""
    begun = []
    monkeypatch.chdir(tmp_path)
    for name in ("run", "run_one", "run_many"):
        monkeypatch.setattr(module, name, lambda *args: begun.append(args) or 0, raising=False)
    assert call(module, monkeypatch, *words) == 0
    assert len(begun) == 1
