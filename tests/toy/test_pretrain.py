"""toy.pretrain: every training runs, starts where it should and resumes exactly; its losses and its batches."""

import random
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import call, error_line
from torch import nn

from model.files.config import config_from
from model.vae import VAE, VAEConfig
from toy import adversary, contrastive, fast_norm, pretrain, train_vae, world
from toy.data import Data, encoded
from toy.loop import Job, fit
from toy.networks import VAE_CONFIG, write_part


def fit_line(cache, seed=0, stop_at=None):
    """Fit a line of four numbers; returns what is saved, and the numbers of the batches. stop_at: interrupts there."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    saved, numbers = {}, []

    def loss_of(number: int):
        if number == stop_at:
            raise KeyboardInterrupt
        numbers.append(number)
        x = torch.randn(16, 4)
        loss = (network(x).float() - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    fit(Job(200, 16, seed=seed, cache=cache, seconds_between_saves=0), "line", network, loss_of, saved.update, 1e-2)
    return saved, numbers


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole, numbers = fit_line(tmp_path)
    assert torch.allclose(whole["1.weight"] @ whole["0.weight"], torch.ones(1, 4), atol=0.1)
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path, stop_at=117)
    with pytest.raises(ValueError, match="--seed 0"):
        fit_line(tmp_path, seed=1)
    resumed, rest = fit_line(tmp_path)
    assert equal(resumed, whole) and rest == numbers[117:]
    other, others = fit_line(tmp_path, seed=2**63 - 1)  # it is done: the next one starts anew
    assert not equal(other, whole) and len({*others}) == 200 and not {*others} & {*numbers}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """--cache with 32 drawings, and --weights, which the tests below fill in the order of the docstring."""
    folder, patch = tmp_path_factory.mktemp("pretrain"), pytest.MonkeyPatch()
    flags = ("--cache", folder / "cache", "--weights", folder / "weights")
    assert call(pretrain, patch, "data", "--steps", 32, *flags) == 0
    patch.undo()
    return folder, flags


@pytest.mark.parametrize("part", [part for part in pretrain.__doc__.split() if part in pretrain.PARTS][:7])
def test_every_command_trains_its_part(part, folders, monkeypatch):
    folder, flags = folders
    before = {file: file.read_bytes() for file in folder.rglob("*.safetensors")}
    assert call(pretrain, monkeypatch, part, "--steps", 2, "--batch", 2 if "vae" in part else 8, *flags) == 0
    written = [file for file in (folder / "weights").rglob("*.safetensors") if file.read_bytes() != before.get(file)]
    parts = {"clip": {"clip", "text_encoder"}, "clip-pictures": {"clip"}, "align": {"reward"}}
    assert {file.parent.name for file in written} == parts.get(part, {part.partition("-")[0]})
    for tensor in (tensor for file in written for tensor in load_file(file).values()):
        assert tensor.isfinite().all() and tensor.dtype in (torch.half, torch.int64)


def test_go_on_starts_from_the_weights_that_are_there(folders, monkeypatch):
    """At step 0 the learning rate is 0, so a run of one step writes the weights that it began with."""
    folder, flags = folders
    flags, file = ("dino", "--steps", 1, "--batch", 8, *flags), folder / "weights" / "metrics/dino/model.safetensors"
    before = load_file(file)
    assert call(pretrain, monkeypatch, *flags, "--go-on", "--seed", 3) == 0 and equal(load_file(file), before)
    assert call(pretrain, monkeypatch, *flags) == 0 and not equal(load_file(file), before)


def test_sharpening_changes_the_decoder_only(tmp_path):
    config = VAE_CONFIG | {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2}
    np.save(tmp_path / "drawings.npy", np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8))
    (tmp_path / "captions.json").write_text("[]", encoding="utf-8")
    job, file = Job(3, 2, weights=tmp_path, cache=tmp_path), tmp_path / "vae" / train_vae.FILE
    write_part(file.parent, config, VAE(config_from(VAEConfig, config)).state_dict(), file.name)
    before = load_file(file)
    train_vae.sharpen_vae(job)
    after = load_file(file)
    encoder = [name for name in before if re.match(r"encoder\.|quant_conv\.", name)]
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert not torch.equal(before["decoder.conv_in.weight"], after["decoder.conv_in.weight"])


def test_without_drawings_the_command_says_how_to_make_them(tmp_path, monkeypatch, capsys):
    assert call(pretrain, monkeypatch, "dino", "--cache", tmp_path) == 2
    assert error_line(capsys).endswith("drawings.npy is missing: run python -m toy.pretrain data first")


def test_latents_are_encoded_again_only_for_other_drawings_or_another_encoder(tmp_path):
    np.save(tmp_path / "drawings.npy", np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))
    (tmp_path / "captions.json").write_text("[]", encoding="utf-8")
    vae = VAE(VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)).requires_grad_(False)

    def latents():
        return encoded(Data(tmp_path), vae)[0], (tmp_path / "latents.safetensors").stat().st_mtime_ns

    first, written = latents()
    vae.decoder.conv_in.bias += 1  # other pictures, the same latents
    assert latents()[1] == written
    vae.quant_conv.bias += 1
    assert not torch.equal(latents()[0], first)
    np.save(tmp_path / "drawings.npy", np.zeros((2, 16, 16, 3), np.uint8))
    assert latents()[0].unique().numel() < first.unique().numel()


def test_the_masks_are_of_the_crops_and_count_in_the_loss(tmp_path):
    """Drawings whose red channel is their mask."""
    masks = np.random.default_rng(0).integers(0, 2, (4, 64, 64), np.uint8) * 255
    np.save(tmp_path / "masks.npy", masks)
    np.save(tmp_path / "drawings.npy", np.stack([masks, 0 * masks, 0 * masks], 3))
    (tmp_path / "captions.json").write_text("[]", encoding="utf-8")
    pixels, subject = Data(tmp_path).crops(6, 16, random.Random(0))
    assert pixels.shape == (6, 3, 16, 16) and torch.equal(subject[:, 0], pixels[:, 0] / 2 + 0.5)
    assert len({tuple(each.flatten().tolist()) for each in subject}) == 6
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)  # every decoded picture is of one grey
    left = (torch.arange(16) < 8).expand(2, 1, 16, 16).float()
    pictures = [part.expand(2, 3, 16, 16) for part in (left, 1 - left)]
    wrong_at_the_subject, wrong_elsewhere = (train_vae.vae_loss(vae, picture, left)[0] for picture in pictures)
    assert wrong_at_the_subject > wrong_elsewhere + 0.3


def test_the_fast_norm_has_the_same_gradients():
    torch.manual_seed(0)
    vae, x = (
        VAE(VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)),
        torch.randn(2, 3, 16, 16),
    )
    gradients = []
    for _ in range(2):
        vae.zero_grad()
        vae.decode(vae.encode(x)[0]).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in vae.parameters() if weight.grad is not None]))
        fast_norm.speed_up(vae)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6)


def test_the_adversary_pulls_as_strongly_as_is_said_and_each_side_has_its_own_gradient():
    torch.manual_seed(0)
    judge, drawings = adversary.Adversary(4).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    decoded = (drawings + 0.3 * torch.randn_like(drawings)).requires_grad_(True)
    error = 7 * (decoded - drawings).square().mean()
    loss, hinge = adversary.sharpened(error, decoded, drawings, judge)

    def slope(of: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(of, decoded, retain_graph=True, allow_unused=True)[0]

    ratio = slope(loss - error).norm() / slope(error).norm()
    both = adversary.FOOL + adversary.MATCH
    assert both - 2 * adversary.FOOL - 1e-4 <= ratio <= both + 1e-4  # the two terms may have opposite directions
    assert slope(hinge) is None
    verdicts = judge(drawings)[0], judge(decoded)[0]
    assert hinge == (1 - verdicts[0]).relu().mean() + (1 + verdicts[1]).relu().mean()
    weights = list(judge.parameters())
    assert all(each is None for each in torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))
    assert sum(each.abs().sum() > 0 for each in torch.autograd.grad(hinge, weights)) >= len(weights) - 1


def test_contrast_is_lowest_for_partners_and_leaves_out_possible_ones():
    features = torch.eye(4)
    loss, right = contrastive.contrast(features, features, 0.1)
    worse, wrong = contrastive.contrast(features, features.flip(0), 0.1)
    assert worse > loss and (right, wrong) == (1.0, 0.0)
    twins, texts = torch.cat([features[:2], features[:2]]), ["a dog", "a cat", "a dog", "a cat"]
    without, right = contrastive.contrast(twins, twins, 0.1, contrastive.equal_texts(texts, "cpu"))
    assert without < contrastive.contrast(twins, twins, 0.1)[0] and right == 1.0


def test_the_kind_in_a_caption_is_replaced_and_told():
    """The clothes may name a kind too: "glasses"."""
    texts = ["a dog wearing pink glasses", "a photo of a stuffed animal", "an orange boot with a blue trim on the Moon"]
    own = ["dog", "stuffed animal", "boot"]
    for seed in range(20):
        for text, other, kind in zip(texts, contrastive.other_kinds(texts, random.Random(seed)), own, strict=True):
            assert other in {text.replace(kind, another) for another in world.KINDS if another != kind}
    names = torch.eye(len(world.KINDS))
    image = names[[world.KINDS.index(kind) for kind in own]]
    loss, right = contrastive.tell_kinds(image, image, -image, names, texts, 0.1)
    other, wrong = contrastive.tell_kinds(image.roll(1, 0), image, image, names, texts, 0.1)
    assert (right, wrong) == (1.0, 0.0) and loss < 0.01 and other > 5
