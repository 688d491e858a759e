"""LoRA: what it leaves alone, what it trains, its files, and the same numbers in diffusers with peft.

Tolerances: two ways to the same float32 sum, W x + s B (A x) and (W + s B A) x, and two libraries' order of it, differ
by 1e-6 of outputs of order 1. A wrong alpha, a missing or an interchanged adapter moves them by 3e-3 and more.
"""

import copy
import functools

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import write_base

from model import lora
from model.files.errors import CheckpointError
from model.files.tensors import read_metadata
from model.files.write import save_tensors
from model.stable_diffusion import StableDiffusion
from model.unet import UNet, UNetConfig

WIDTH = 24  # of the context
SMALL = {"cross_attention_dim": WIDTH, "norm_num_groups": 8}
KINDS = {
    "sd1": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": 4,
    },
    "sd2": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
}
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def network(kind="sd1"):
    """A small random U-Net, always the same."""
    return copy.deepcopy(original(kind))


@functools.cache
def original(kind):
    """Its attention is not uniform, so that q and k matter too."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**SMALL | KINDS[kind])).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter *= 4
    return unet


def run(unet, channels_last=False):
    draws = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 8, 8, generator=draws), torch.randn(2, 7, WIDTH, generator=draws)
    if channels_last:
        latents = latents.contiguous(memory_format=torch.channels_last)
    return unet(latents, torch.tensor([3, 700]), context)


@torch.no_grad()
def output(unet, **options):
    return run(unet, **options)


def adapted(kind="sd1", rank=4, alpha=None, trained=True):
    """A U-Net with adapters; `trained`: with numbers in `up` as large as those in `down`."""
    unet = network(kind)
    generator = torch.Generator().manual_seed(2)
    adapters = lora.add_lora(unet, rank, alpha, generator=generator)
    if trained:
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.lora_up.weight.normal_(0, 0.2, generator=generator)
    return unet


def save_lora(path, unet, metadata):
    """As train.py does it."""
    save_tensors(lora.lora_tensors(unet), path, lora.lora_header(unet) | metadata)


def difference(a, b):
    return (a - b).abs().max().item()


def off(unet):
    with lora.without_lora(unet):
        return output(unet)


# ---------------------------------------------------------------------------------------------- the adapters


@pytest.mark.parametrize("kind", KINDS)
def test_changes_nothing_at_first(kind):
    assert torch.equal(output(adapted(kind, trained=False)), output(network(kind)))


def test_adapts_every_attention_projection_and_nothing_else():
    unet = adapted()
    names = list(lora.lora_of(unet))
    assert len(names) == 8 * (2 + 1 + 3)  # two on the way down, one at the bottom, three on the way up
    assert {name.rpartition("_transformer_blocks_0_")[2] for name in names} == {
        f"{attention}_{projection}"
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out_0")
    }
    ours = {name for name, module in unet.named_modules() if isinstance(module, lora.AdaptedLinear)}
    assert len(ours) == len(names)
    plain = {name: tensor for name, tensor in unet.state_dict().items() if ".lora." not in name}
    assert plain.keys() == network().state_dict().keys()  # the base's own weights keep their names


def test_a_step_trains_the_adapters_alone():
    unet = adapted(trained=False).train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    adapters = lora.lora_of(unet)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=1.0)
    for _ in range(2):  # `down` has no gradient while `up` is zero
        optimizer.zero_grad()
        run(unet).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora." in name}
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in adapters.parameters()}
    assert torch.equal(off(unet), output(network()))  # θ₀ to the last bit, after training too
    assert difference(output(unet), off(unet)) > 1e-3


def test_down_is_the_generators_alone():
    state = torch.get_rng_state()
    first = lora.lora_tensors(adapted(trained=False))
    torch.manual_seed(99)
    second = lora.lora_tensors(adapted(trained=False))
    assert all(torch.equal(first[name], second[name]) for name in first)
    unet = network()
    state = torch.get_rng_state()
    other = lora.add_lora(unet, 4, generator=torch.Generator().manual_seed(3)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(other[TO_Q + lora.DOWN], first[TO_Q + lora.DOWN])
    bound = 16**-0.5
    assert 0.9 * bound < first[TO_Q + lora.DOWN].abs().max() <= bound
    assert all(not tensor.any() for name, tensor in first.items() if name.endswith(lora.UP))


def test_without_lora_nests_and_survives_an_error():
    unet, base = adapted(), output(network())
    on = output(unet)
    assert difference(on, base) > 0.05
    with lora.without_lora(unet):
        assert torch.equal(off(unet), base)
        assert torch.equal(output(unet), base)  # the inner one's end does not switch them on
    assert torch.equal(output(unet), on)
    with pytest.raises(KeyError), lora.without_lora(unet):
        raise KeyError
    assert torch.equal(output(unet), on)
    with lora.without_lora(network()):  # a U-Net that has none
        pass


def test_a_deepcopy_is_a_network_of_its_own():
    unet = adapted()
    twin, on = copy.deepcopy(unet), output(unet)
    assert torch.equal(output(twin), on)
    with torch.no_grad():
        next(lora.lora_of(twin).parameters()).add_(1)
    with lora.without_lora(twin):
        assert torch.equal(output(unet), on)
    assert not torch.equal(output(twin), on)


def test_autocast_and_channels_last():
    unet = adapted().train()
    expected = output(unet)
    assert difference(output(unet.to(memory_format=torch.channels_last), channels_last=True), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        out = run(unet)
    out.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lora.lora_of(unet).parameters())
    assert difference(out, expected) < 0.1 * difference(off(unet), expected)  # bf16's rounding, not a missing adapter


def test_alpha_scales_the_change():
    projection = network().mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    changes = []
    for alpha in (None, 1.0, 8.0):
        layer = adapted(alpha=alpha).mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        changes.append((layer(x) - projection(x)).detach())
        by_hand = x @ layer.lora.lora_down.weight.T @ layer.lora.lora_up.weight.T
        assert difference(changes[-1], (1.0 if alpha is None else alpha / 4) * by_hand) < 1e-5
    assert changes[0].abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_a_plain_network_with_the_same_output(kind):
    unet, plain = adapted(kind, alpha=2.0), network(kind)
    expected = output(unet)
    lora.merge(unet)
    assert difference(output(unet), expected) < 1e-5
    assert not lora.lora_of(unet) and all(type(m) is not lora.AdaptedLinear for m in unet.modules())
    plain.load_state_dict(unet.state_dict())
    assert difference(output(plain), expected) < 1e-5 < 0.02 < difference(output(network(kind)), expected)
    lora.merge(unet)  # nothing to do
    lora.add_lora(unet, 2, generator=torch.Generator())  # and it can be adapted again


def test_remove_gives_the_base_back(tmp_path):
    """So that the LoRAs of several subjects can be drawn with, one after another."""
    unet, base = adapted(), network().state_dict()
    save_lora(tmp_path / "l.safetensors", unet, {})
    expected = output(unet)
    for _ in range(2):
        lora.remove_lora(unet)
        assert unet.state_dict().keys() == base.keys()
        assert all(torch.equal(tensor, base[name]) for name, tensor in unet.state_dict().items())
        lora.load_lora(unet, tmp_path / "l.safetensors")
        assert torch.equal(output(unet), expected)


def test_merge_keeps_the_types_of_the_weights():
    unet = network().to(torch.bfloat16)
    lora.add_lora(unet, 2, generator=torch.Generator())
    assert all(parameter.dtype == torch.float32 for parameter in lora.lora_of(unet).parameters())
    lora.merge(unet)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


def test_a_rank_above_the_width_works(tmp_path):
    unet = adapted(rank=50)
    save_lora(tmp_path / "l.safetensors", unet, {})
    again = network()
    lora.load_lora(again, tmp_path / "l.safetensors")
    assert torch.equal(output(again), output(unet))


@pytest.mark.parametrize("rank, alpha", [(0, None), (-1, None), (4, 0), (4, -1), (4, float("nan")), (4, float("inf"))])
def test_impossible_settings(rank, alpha):
    unet = network()
    with pytest.raises(ValueError, match="rank and alpha"):
        lora.add_lora(unet, rank, alpha, generator=torch.Generator())
    assert not lora.lora_of(unet)


def test_adapters_upon_adapters_are_refused(tmp_path):
    unet = adapted()
    save_lora(tmp_path / "l.safetensors", unet, {})
    with pytest.raises(ValueError, match="adapters already"):
        lora.add_lora(unet, 4, generator=torch.Generator())
    with pytest.raises(ValueError, match="adapters already"):
        lora.load_lora(unet, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match="no adapters"):
        save_lora(tmp_path / "none.safetensors", network(), {})


# ---------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_round_trip_is_exact(tmp_path, alpha):
    path, unet = tmp_path / "l.safetensors", adapted(alpha=alpha)
    save_lora(path, unet, {"token": "[V]"})
    again = network()
    adapters = lora.load_lora(again, path)
    assert torch.equal(output(again), output(unet)) and torch.equal(off(again), output(network()))
    assert not any(parameter.requires_grad for parameter in adapters.parameters())
    written = path.read_bytes()
    save_lora(path, again, {"token": "[V]"})
    assert path.read_bytes() == written


def test_the_file_holds_adapters_and_nothing_else(tmp_path):
    path, unet = tmp_path / "l.safetensors", adapted(rank=4, alpha=2.0)
    save_lora(path, unet, {"token": "[V]", "ss_v2": "told"})
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = list(lora.lora_of(unet))
    assert tensors.keys() == {name + part for name in names for part in (lora.DOWN, lora.UP, lora.ALPHA)}
    assert tensors[TO_Q + ".lora_down.weight"].shape == (4, 16)
    assert tensors[TO_Q + ".lora_up.weight"].shape == (16, 4)
    assert tensors[TO_Q + ".alpha"].shape == () and tensors[TO_Q + ".alpha"] == 2.0
    numbers = sum(parameter.numel() for parameter in lora.lora_of(unet).parameters())
    assert path.stat().st_size < 4 * numbers + 500 * len(names) + 1000  # the rest is the header
    told = {"token": "[V]", "ss_v2": "told", "format": "pt"}
    kohya = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0"}
    assert read_metadata(path) == told | kohya


def test_size_at_sd_15():
    """Rank 4 of the real U-Net: 3.2 MB."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    width = {name: (m.in_features, m.out_features) for name, m in unet.named_modules() if lora.PROJECTION.match(name)}
    assert len(width) == 16 * 8
    assert 4 * sum(4 * (i + o) for i, o in width.values()) == 3_188_736


@pytest.mark.parametrize("width, version, v2", [(768, "sd_v1", "False"), (1024, "sd_v2", "True")])
def test_header_names_the_base(width, version, v2):
    with torch.device("meta"):
        unet = UNet(UNetConfig(**SMALL | KINDS["sd1"] | {"cross_attention_dim": width}))
    lora.add_lora(unet, 1, generator=torch.Generator())
    header = lora.lora_header(unet)
    assert (header["ss_base_model_version"], header["ss_v2"]) == (version, v2)


def test_ranks_and_alphas_of_their_own_and_a_part_of_the_projections(tmp_path):
    tensors = {TO_Q + lora.DOWN: torch.ones(3, 16), TO_Q + lora.UP: torch.ones(16, 3)}
    other = TO_Q.replace("attn1", "attn2")
    tensors |= {other + lora.DOWN: torch.ones(2, 16), other + lora.UP: torch.ones(16, 2)}
    save_file(tensors | {other + lora.ALPHA: torch.tensor([1.0])}, tmp_path / "l.safetensors")
    unet, base = network(), network().state_dict()
    adapters = lora.load_lora(unet, tmp_path / "l.safetensors")
    assert [(name, a.rank, a.alpha) for name, a in adapters.items()] == [(TO_Q, 3, 3.0), (other, 2, 1.0)]
    lora.merge(unet)
    place = "down_blocks.0.attentions.0.transformer_blocks.0.{}.to_q.weight"
    for attention, change in (("attn1", 3.0), ("attn2", 1.0)):
        name = place.format(attention)
        assert torch.allclose(unet.state_dict()[name] - base[name], torch.tensor(change), atol=1e-5)


# ---------------------------------------------------------------------------------------------- diffusers and peft


def theirs(kind="sd1"):
    unet = UNet2DConditionModel(**SMALL | KINDS[kind]).eval()
    unet.load_state_dict(network(kind).state_dict())
    return unet


def their_output(unet):
    draws = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 8, 8, generator=draws), torch.randn(2, 7, WIDTH, generator=draws)
    with torch.no_grad():
        return unet(latents, torch.tensor([3, 700]), context).sample


@pytest.mark.parametrize("kind, alpha", [("sd1", None), ("sd1", 1.0), ("sd2", 8.0)])
def test_diffusers_reads_our_file(tmp_path, kind, alpha):
    unet, reference = adapted(kind, alpha=alpha), theirs(kind)
    assert difference(their_output(reference), output(network(kind))) < 1e-5
    save_lora(tmp_path / "best.safetensors", unet, {"token": "[V]"})
    StableDiffusionPipeline.load_lora_into_unet(
        *StableDiffusionPipeline.lora_state_dict(tmp_path / "best.safetensors"), reference
    )
    loaded = sum(name.endswith("lora_A.default_0.weight") for name in reference.state_dict())
    assert loaded == len(lora.lora_of(unet))
    expected = their_output(reference)
    assert 0.1 < expected.abs().max() < 30
    assert difference(output(unet), expected) < 1e-4 < 0.02 < difference(output(network(kind)), expected)


@pytest.fixture
def peft_unet():
    """diffusers' U-Net with random adapters of peft, alpha half the rank."""
    unet = theirs()
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    return unet


def save_as_diffusers(folder, unet, spelling, **settings):
    """What diffusers writes for this U-Net, and where: the layers as peft or as diffusers spells them."""
    layers = get_peft_model_state_dict(unet)
    if spelling == "diffusers":
        layers = convert_state_dict_to_diffusers(layers)
    config = {"r": 4, "lora_alpha": 2, "use_rslora": False, "use_dora": False, "alpha_pattern": {}} | settings
    StableDiffusionPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=config)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
def test_we_read_a_file_of_diffusers(tmp_path, peft_unet, spelling):
    expected, unet = their_output(peft_unet), network()
    lora.load_lora(unet, save_as_diffusers(tmp_path, peft_unet, spelling))
    assert difference(output(unet), expected) < 1e-4 < 0.02 < difference(output(network()), expected)


@pytest.mark.parametrize("setting", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"to_q": 3}}], ids=str)
def test_what_diffusers_has_beyond_lora_is_refused(tmp_path, peft_unet, setting):
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        lora.load_lora(network(), save_as_diffusers(tmp_path, peft_unet, "peft", **setting))


def test_diffusers_draws_the_same_picture(tmp_path):
    """The whole pipeline, load_lora_weights and all, against `generate`: now and then a grey level differs by one."""
    base, path = write_base(tmp_path / "base"), tmp_path / "best.safetensors"
    sd = StableDiffusion.from_pretrained(base)
    plain = StableDiffusion.from_pretrained(base).unet
    generator = torch.Generator().manual_seed(0)
    for adapter in lora.add_lora(sd.unet, 4, 2.0, generator=generator).values():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.5, generator=generator)
    save_lora(path, sd.unet, {"token": "[V]"})
    pipe = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(base / "vae"),
        transformers.CLIPTextModel.from_pretrained(base / "text_encoder"),
        transformers.CLIPTokenizer.from_pretrained(base / "tokenizer"),
        UNet2DConditionModel.from_pretrained(base / "unet"),
        DPMSolverMultistepScheduler.from_pretrained(base / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    expected = np.round(255.0 * pipe("a dog in the snow", latents=latents, **options).images[0])

    def drawn():
        return np.asarray(sd.generate(["a dog in the snow"], [0], 4, 3.0, latents=latents)[0], dtype=np.float64)

    adapted_picture = drawn()
    lora.merge(sd.unet)
    merged_picture = drawn()
    sd.unet = plain
    assert np.abs(adapted_picture - expected).mean() < 0.03 and np.abs(merged_picture - expected).mean() < 0.03
    assert np.abs(drawn() - expected).mean() > 1


# ---------------------------------------------------------------------------------------------- bad files


def dropped(tensors, *endings):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


def renamed(tensors, old, new, shape=None):
    """The adapter of TO_Q under another name; `shape`: of its `down`."""
    found = {name.replace(old, new): tensor for name, tensor in tensors.items() if name.startswith(TO_Q + ".")}
    return {n: torch.ones(shape) if shape and n.endswith(lora.DOWN) else tensor for n, tensor in found.items()}


SPOILT = {
    "a module of another network": (lambda t: t | renamed(t, "attn1_to_q", "attn3_to_q"), "attn3_to_q, .*no attention"),
    "a convolution": (lambda t: t | renamed(t, "attn1_to_q", "conv", (4, 16, 3, 3)), "no attention projection"),
    "the feed-forward layers": (lambda t: t | renamed(t, "attn1_to_q", "ff_net_2"), "ff_net_2, which is no attention"),
    "no partner": (lambda t: dropped(t, TO_Q + lora.UP), f"lacks {TO_Q}.lora_up.weight"),
    "no partner, the other": (lambda t: dropped(t, TO_Q + lora.DOWN), f"lacks {TO_Q}.lora_down.weight"),
    "alpha alone": (lambda t: dropped(t, TO_Q + lora.UP, TO_Q + lora.DOWN), f"lacks {TO_Q}.lora_down.weight"),
    "down of another width": (lambda t: t | {TO_Q + lora.DOWN: torch.ones(4, 15)}, r"is \(4, 15\) and should be"),
    "up of another rank": (lambda t: t | {TO_Q + lora.UP: torch.ones(16, 5)}, r"is \(16, 5\) and should be"),
    "a number for down": (lambda t: t | {TO_Q + lora.DOWN: torch.ones(())}, r"should be \(1, 16\)"),
    "an empty down": (lambda t: t | {TO_Q + lora.DOWN: torch.ones(0, 16)}, r"should be \(1, 16\)"),
    "down of a convolution": (lambda t: t | {TO_Q + lora.DOWN: torch.ones(4, 16, 1, 1)}, "other shapes"),
    "whole numbers": (lambda t: t | {TO_Q + lora.DOWN: torch.ones(4, 16, dtype=torch.int8)}, "kinds of numbers"),
    "a tensor more": (lambda t: t | {TO_Q + ".bias": torch.ones(16)}, "unexpected .*to_q.bias"),
    "two alphas": (lambda t: t | {TO_Q + lora.ALPHA: torch.ones(2)}, "alpha should be one number"),
    "an alpha that is none": (lambda t: t | {TO_Q + lora.ALPHA: torch.tensor(float("nan"))}, "alpha should be one"),
    "a text encoder": (lambda t: t | renamed(t, "lora_unet", "lora_te_text_model"), "lora_te_.*not supported"),
    "LoHa": (lambda t: {TO_Q + ".hada_w1_a": torch.ones(4, 4)}, "hada_w1_a.*LyCORIS.*not supported"),
    "LoKr": (lambda t: {"lycoris_down_blocks_0.lokr_w1": torch.ones(4, 4)}, "lokr_w1.*not supported"),
    "DoRA": (lambda t: t | {TO_Q + ".dora_scale": torch.ones(16, 1)}, "dora_scale.*DoRA.*not supported"),
    "LoCon": (lambda t: t | {TO_Q + ".lora_mid.weight": torch.ones(4, 4, 3, 3)}, "lora_mid.*not supported"),
    "peft's own": (lambda t: {"base_model.model.to_q.lora_A.weight": torch.ones(4, 4)}, "no attention projection"),
    "a whole U-Net": (lambda t: network().state_dict(), "is no LoRA but a U-Net"),
    "anything": (lambda t: {"x": torch.ones(2)}, "is no LoRA but something unknown"),
    "nothing": (lambda t: {}, "is no LoRA"),
    "a LoRA of another base": (lambda t: lora.lora_tensors(adapted("sd2")), "no attention projection of this U-Net"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_files(tmp_path, case):
    path, (spoil, message) = tmp_path / "bad.safetensors", SPOILT[case]
    save_file({name: tensor.clone() for name, tensor in spoil(lora.lora_tensors(adapted())).items()}, path)
    unet = network()
    with pytest.raises(CheckpointError, match=message) as error:
        lora.load_lora(unet, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert unet.state_dict().keys() == network().state_dict().keys()  # as it was


def test_is_lora():
    assert lora.is_lora(lora.lora_tensors(adapted()))
    assert lora.is_lora(["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight"])
    assert not lora.is_lora(network().state_dict())
