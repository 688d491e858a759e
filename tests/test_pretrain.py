"""The training loop of the embedded base: it learns, and a resumed run ends as an unbroken one does."""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import call, error_line
from torch import nn

from model.files.config import config_from
from model.vae import VAE, VAEConfig
from toy import adversary, contrastive, data, loop, pretrain, world
from toy.networks import write_part


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)


def run(steps: int, stop_at: int | None = None, fixed_first: bool = False) -> dict[str, torch.Tensor]:
    """Fit a line of four numbers to its target; `stop_at` breaks off there, after the state was written."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    saved = {}

    def loss_of(step: int):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 4)
        loss = (network(x).float() - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    options = {"minutes_between_saves": 0.0, "fixed": network[:1] if fixed_first else ()}
    loop.fit("line", network, loss_of, steps, 1e-2, "cpu", saved.update, **options)
    return {**saved, "loss": loss_of(-1)[0].detach()}


def test_it_learns_and_the_average_is_what_is_saved():
    assert run(300)["loss"] < 0.05
    assert set(run(300)) == {"0.weight", "0.bias", "1.weight", "1.bias", "loss"}


def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    whole = run(30)
    monkeypatch.setattr(data, "CACHE", tmp_path / "second")
    (tmp_path / "second").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(30, stop_at=17)
    with pytest.raises(ValueError, match="--seed 0"):
        drawn(1)
    resumed = run(30)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole if name != "loss")


@pytest.mark.parametrize("stage", ["vae-refine", "vae-sharpen"])
def test_what_goes_on_with_the_vae_can_be_resumed(stage, tmp_path, monkeypatch):
    """While it runs, weights/toy is replaced by what it has learned: refining, it must not be held to that.

    Sharpening leaves the encoder, and with it the latents that the U-Net knows, as they are to the bit.
    """
    sizes = {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2}
    monkeypatch.setattr(pretrain, "VAE_CONFIG", pretrain.VAE_CONFIG | sizes)
    monkeypatch.setattr(pretrain, "WEIGHTS", weights := tmp_path / "weights")
    monkeypatch.setattr(pretrain, "CACHE", tmp_path)
    np.save(tmp_path / "drawings.npy", np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8))
    (tmp_path / "captions.json").write_text("[]")
    torch.manual_seed(0)
    begin = VAE(config_from(VAEConfig, pretrain.VAE_CONFIG)).state_dict()
    clock = iter(range(0, 100_000, 1000))  # a checkpoint after every step
    monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: next(clock)))
    train, _, _ = pretrain.PARTS[stage]

    def trained(stop_at: int | None = None) -> dict[str, torch.Tensor]:
        if not (tmp_path / f"{stage}.pt").exists():
            write_part(weights / "vae", pretrain.VAE_CONFIG, begin, "diffusion_pytorch_model.safetensors")
        torch.manual_seed(0)  # of the adversary
        with monkeypatch.context() as patch:
            if stop_at:
                pixels = iter(range(100))
                patch.setattr(data.Data, "pixels", stopping(data.Data.pixels, pixels, stop_at))
            train(6, 2, "cpu")
        return load_file(weights / "vae" / "diffusion_pytorch_model.safetensors")

    whole = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(stop_at=4)
    resumed = trained()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not torch.equal(whole["decoder.conv_out.weight"], begin["decoder.conv_out.weight"].half())
    for name in filter(re.compile(r"encoder\.|quant_conv\.").match, whole if stage == "vae-sharpen" else ()):
        assert torch.equal(whole[name], begin[name].half())


def stopping(pixels, calls, stop_at: int):
    """Data.pixels, which is interrupted at its call number `stop_at`."""

    def read(self, *arguments):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        return pixels(self, *arguments)

    return read


def test_what_is_done_is_begun_anew(tmp_path):
    """So that --go-on goes on from weights/toy."""
    once = run(30)
    assert not list(tmp_path.iterdir())
    again = run(30)
    assert all(torch.equal(again[name], once[name]) for name in once)


def drawn(seed: int) -> tuple[list[int], list[float]]:
    """The numbers that three steps' batches are drawn from, and the noise that torch draws in them."""
    network, numbers, noise = nn.Linear(1, 1), [], []

    def loss_of(number: int):
        numbers.append(number)
        noise.append(torch.rand(1).item())
        return network(torch.ones(1, 1)).sum(), {}

    loop.fit("line", network, loss_of, 3, 1e-2, "cpu", lambda tensors: None, seed=seed)
    return numbers, noise


def test_another_seed_draws_other_batches_and_noise():
    first, other = drawn(0), drawn(1)
    assert first[0] == [0, 1, 2] and not {*first[0]} & {*other[0]}
    assert len({*first[1], *other[1]}) == 6 and drawn(1) == other
    assert all(0 <= number < 2**63 for number in drawn(2**63 - 1)[0])


@pytest.mark.parametrize("train", [pretrain.train_dino, pretrain.train_vae])
def test_the_trainings_take_the_seed(train, tmp_path, monkeypatch):
    np.save(tmp_path / "drawings.npy", np.zeros((4, 128, 128, 3), np.uint8))
    (tmp_path / "captions.json").write_text("[]")
    seeds = []
    monkeypatch.setattr(pretrain, "fit", lambda *_, seed, **__: seeds.append(seed))
    train(1, 2, "cpu", seed=3)
    assert seeds == [3]


def test_the_command_passes_on_what_it_is_given(monkeypatch):
    given = []
    monkeypatch.setitem(pretrain.PARTS, "dino", (lambda *arguments: given.append(arguments), 2000, 96))
    assert call(pretrain, monkeypatch, "dino", "--go-on", "--seed", 3, "--batch", 8) == 0
    assert call(pretrain, monkeypatch, "dino", "--steps", 5) == 0
    assert given == [(2000, 8, "cpu", True, 3), (5, 96, "cpu", False, 0)]


def test_without_drawings_the_command_says_how_to_make_them(monkeypatch, capsys):
    assert call(pretrain, monkeypatch, "dino") == 2
    missing = "toy/cache/drawings.npy is missing: run python -m toy.pretrain data first"
    assert error_line(capsys).endswith(missing)


@pytest.mark.parametrize("flag, value", [("--steps", 0), ("--batch", 0), ("--seed", -1)])
def test_a_number_that_cannot_be_is_one_line(flag, value, monkeypatch, capsys):
    assert call(pretrain, monkeypatch, "dino", flag, value) == 2
    assert flag in error_line(capsys)


def test_fixed_modules_stay():
    torch.manual_seed(0)
    before = nn.Linear(4, 8).weight.detach().clone()
    after = run(20, fixed_first=True)
    assert torch.equal(after["0.weight"], before)


def test_contrast_is_lowest_for_partners_and_leaves_out_possible_ones():
    features = torch.eye(4)
    loss, right = contrastive.contrast(features, features, 0.1)
    assert right == 1.0
    worse, wrong = contrastive.contrast(features, features.flip(0), 0.1)
    assert worse > loss
    assert wrong == 0.0
    twins = torch.cat([features[:2], features[:2]])  # rows 0 and 2 are the same, 1 and 3 too
    same = torch.tensor([[i % 2 == j % 2 for j in range(4)] for i in range(4)])
    alone, right = contrastive.contrast(twins, twins, 0.1, same)
    assert alone < contrastive.contrast(twins, twins, 0.1)[0]
    assert right == 1.0


def test_latents_are_kept_only_while_drawings_and_encoder_are_the_same():
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    vae = VAE(VAEConfig(**sizes)).requires_grad_(False)

    class Drawings:
        asked, images = 0, np.zeros((2, 16, 16, 3), np.uint8)

        def pixels(self, indices):
            self.asked += 1
            return torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16).expand(len(indices), -1, -1, -1)

    drawings = Drawings()
    first, _ = data.encoded(drawings, vae, "cpu", 2)
    assert torch.equal(data.encoded(drawings, vae, "cpu", 2)[0], first)
    assert drawings.asked == 1
    vae.decoder.conv_in.bias += 1  # other pictures, the same latents
    data.encoded(drawings, vae, "cpu", 2)
    assert drawings.asked == 1
    vae.quant_conv.bias += 1  # as after another training of the VAE
    assert not torch.equal(data.encoded(drawings, vae, "cpu", 2)[0], first)
    assert drawings.asked == 2
    drawings.images = drawings.images + 1  # drawn anew
    data.encoded(drawings, vae, "cpu", 2)
    assert drawings.asked == 3


def test_the_adversary_pulls_as_strongly_as_is_said_and_each_side_has_its_own_gradient():
    torch.manual_seed(0)
    judge, drawings = adversary.Adversary(4), torch.rand(2, 3, 32, 32) * 2 - 1
    decoded = (drawings + 0.3 * torch.randn_like(drawings)).requires_grad_(True)
    error = 7 * (decoded - drawings).square().mean()
    loss, hinge = adversary.sharpened(error, decoded, drawings, judge)

    def pull(of: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(of, decoded, retain_graph=True, allow_unused=True)[0]

    there = pull(loss - error).norm() / pull(error).norm()
    both = adversary.FOOL + adversary.MATCH
    assert both - 2 * adversary.FOOL - 1e-4 <= there <= both + 1e-4  # the two pulls may go against each other
    assert pull(hinge) is None
    weights = list(judge.parameters())
    assert all(each is None for each in torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))
    assert sum(each.abs().sum() > 0 for each in torch.autograd.grad(hinge, weights)) >= len(weights) - 1


def test_the_adversary_learns_to_tell_a_smear_from_a_drawing():
    torch.manual_seed(0)
    judge = adversary.Adversary(8)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        drawings = (torch.rand(8, 3, 8, 8) > 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
        return drawings, torch.nn.functional.avg_pool2d(drawings, 5, 1, 2).requires_grad_(True)

    for _ in range(60):
        drawings, smeared = pair()
        _, hinge = adversary.sharpened((smeared - drawings).square().mean(), smeared, drawings, judge)
        optimizer.zero_grad()
        hinge.backward()
        optimizer.step()
    drawings, smeared = pair()
    assert judge(drawings)[0].mean() > 0 > judge(smeared)[0].mean()


def test_other_kinds_exchange_the_noun_and_nothing_else():
    """The clothes may name a kind too: "glasses"."""
    texts = ["a dog wearing pink glasses", "a photo of a stuffed animal", "an orange boot with a blue trim on the Moon"]
    rests = [("a ", " wearing pink glasses"), ("a photo of a ", ""), ("an orange ", " with a blue trim on the Moon")]
    for seed in range(20):
        for text, swapped, (before, after) in zip(
            texts, contrastive.other_kinds(texts, random.Random(seed)), rests, strict=True
        ):
            assert swapped != text
            assert swapped.startswith(before) and swapped.endswith(after)
            assert swapped.removeprefix(before).removesuffix(after) in world.KINDS


def test_tell_kinds_is_low_where_the_kind_and_the_caption_are_nearest():
    names = torch.eye(len(world.KINDS))
    texts = ["a cat on the beach", "a boot on the beach"]
    image = names[[world.KINDS.index("cat"), world.KINDS.index("boot")]]
    loss, right = contrastive.tell_kinds(image, image, -image, names, texts, 0.1)
    assert right == 1.0 and loss < 0.01
    other, right = contrastive.tell_kinds(image.flip(0), image, image, names, texts, 0.1)
    assert right == 0.0 and other > 5
