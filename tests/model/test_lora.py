"""LoRA: what it leaves alone, what it trains, its files, and the same numbers in diffusers with peft.

Tolerances: two ways to the same float32 sum, W x + s B (A x) and (W + s B A) x, and two libraries' order of it, differ
by 1e-6 of outputs of order 1. A wrong alpha, a missing or a swapped adapter changes them by 3e-3 and more.
"""

import copy
import functools

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from parity import DOWN, UNETS, UP
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from model import lora
from model.files.config import config_from
from model.files.errors import CheckpointError
from model.files.lora_file import is_lora
from model.files.tensors import read_metadata, read_tensors
from model.files.write import save_tensors
from model.unet import UNet, UNetConfig

SMALL = {"block_out_channels": (16, 32), "down_block_types": DOWN, "up_block_types": UP}
KINDS = {
    "sd1": UNETS["sd1"] | SMALL,
    "sd2": UNETS["sd2"] | SMALL | {"attention_head_dim": (2, 4), "layers_per_block": 1},
}
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def network(kind="sd1"):
    """A small random U-Net, always the same."""
    return copy.deepcopy(original(kind))


@functools.cache
def original(kind):
    """Its attention is not uniform, so that q and k matter too."""
    torch.manual_seed(0)
    unet = UNet(config_from(UNetConfig, KINDS[kind])).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter *= 4
    return unet


def inputs():
    draws = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=draws), torch.tensor([3, 700]), torch.randn(2, 7, 24, generator=draws)


@torch.no_grad()
def output(unet):
    return unet(*inputs())


def adapted(kind="sd1", rank=4, trained=True):
    """A U-Net with adapters; `trained`: with numbers in `up` as large as those in `down`."""
    unet = network(kind)
    generator = torch.Generator().manual_seed(2)
    adapters = lora.add_lora(unet, rank, generator=generator)
    if trained:
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.lora_up.weight.normal_(0, 0.2, generator=generator)
    return unet


def save_lora(path, unet, metadata):
    """As train.py does it."""
    save_tensors(lora.lora_tensors(unet), path, {"format": "pt"} | metadata)


def load_lora(unet, path):
    return lora.load_lora(unet, path, read_tensors(path))


def difference(a, b):
    return (a - b).abs().max().item()


def off(unet):
    with lora.without_lora(unet):
        return output(unet)


# ---------------------------------------------------------------------------------------------- the adapters


def test_new_adapters_change_nothing_and_sit_in_every_attention_projection():
    for kind in KINDS:
        assert torch.equal(output(adapted(kind, trained=False)), output(network(kind)))
    names = list(lora.lora_of(adapted()))
    assert len(names) == 8 * (2 + 1 + 3)  # two on the way down, one at the bottom, three on the way up
    assert {name.rpartition("_transformer_blocks_0_")[2] for name in names} == {
        f"{attention}_{projection}"
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out_0")
    }


def test_a_step_trains_the_adapters_alone():
    unet = adapted(trained=False).train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    adapters = lora.lora_of(unet)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=1.0)
    for _ in range(2):  # `down` has no gradient while `up` is zero
        optimizer.zero_grad()
        unet(*inputs()).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora." in name}
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in adapters.parameters()}
    assert torch.equal(off(unet), output(network()))  # θ₀ to the last bit, after training too
    assert difference(output(unet), off(unet)) > 1e-3


def test_autocast():
    unet = adapted().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(*inputs())
    out.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lora.lora_of(unet).parameters())
    assert difference(out, output(unet)) < 0.1 * difference(off(unet), output(unet))  # bf16's rounding, no more


def test_down_comes_from_the_generator_alone():
    first = lora.lora_tensors(adapted(trained=False))
    state = torch.get_rng_state()
    second = lora.lora_tensors(adapted(trained=False))
    other = lora.add_lora(network(), 4, generator=torch.Generator().manual_seed(3)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
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


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_a_plain_network_with_the_same_output(kind):
    unet, plain = adapted(kind), network(kind)
    expected = output(unet)
    lora.merge(unet)
    assert difference(output(unet), expected) < 1e-5
    assert not lora.lora_of(unet)
    plain.load_state_dict(unet.state_dict())
    assert difference(output(plain), expected) < 1e-5 < 0.02 < difference(output(network(kind)), expected)
    lora.merge(unet)  # nothing to do
    lora.add_lora(unet.to(torch.bfloat16), 2, generator=torch.Generator())  # and it can be adapted again
    assert all(parameter.dtype == torch.float32 for parameter in lora.lora_of(unet).parameters())
    lora.merge(unet)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("rank", [4, 50])
def test_round_trip_is_exact(tmp_path, rank):
    """The LoRAs of several subjects can be loaded one after another: without one, the base is there to the last bit."""
    path, unet, base = tmp_path / "l.safetensors", adapted(rank=rank), network().state_dict()
    save_lora(path, unet, {"token": "[V]"})
    written, again = path.read_bytes(), network()
    for _ in range(2):
        adapters = load_lora(again, path)
        assert torch.equal(output(again), output(unet)) and torch.equal(off(again), output(network()))
        assert not any(parameter.requires_grad for parameter in adapters.parameters())
        save_lora(path, again, {"token": "[V]"})
        assert path.read_bytes() == written
        lora.remove_lora(again)
        assert again.state_dict().keys() == base.keys()
        assert all(torch.equal(tensor, base[name]) for name, tensor in again.state_dict().items())


def test_the_file_holds_adapters_and_nothing_else(tmp_path):
    path, unet = tmp_path / "l.safetensors", adapted(rank=4)
    save_lora(path, unet, {"token": "[V]"})
    tensors = load_file(path)
    assert tensors.keys() == {name + part for name in lora.lora_of(unet) for part in (lora.DOWN, lora.UP, lora.ALPHA)}
    shapes = {TO_Q + ".lora_down.weight": (4, 16), TO_Q + ".lora_up.weight": (16, 4), TO_Q + ".alpha": ()}
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes and tensors[TO_Q + ".alpha"] == 4.0
    assert read_metadata(path) == {"token": "[V]", "format": "pt"}
    assert is_lora(tensors) and not is_lora(network().state_dict())


def test_ranks_and_alphas_of_their_own_and_a_part_of_the_projections(tmp_path):
    tensors = {TO_Q + lora.DOWN: torch.ones(3, 16), TO_Q + lora.UP: torch.ones(16, 3)}
    other = TO_Q.replace("attn1", "attn2")
    tensors |= {other + lora.DOWN: torch.ones(2, 16), other + lora.UP: torch.ones(16, 2)}
    save_file(tensors | {other + lora.ALPHA: torch.tensor([1.0])}, tmp_path / "l.safetensors")
    unet, base = network(), network().state_dict()
    adapters = load_lora(unet, tmp_path / "l.safetensors")
    assert [(name, a.rank, a.alpha) for name, a in adapters.items()] == [(TO_Q, 3, 3.0), (other, 2, 1.0)]
    lora.merge(unet)
    for attention, change in (("attn1", 3.0), ("attn2", 1.0)):
        name = f"down_blocks.0.attentions.0.transformer_blocks.0.{attention}.to_q.weight"
        assert torch.allclose(unet.state_dict()[name] - base[name], torch.tensor(change), atol=1e-5)


# ---------------------------------------------------------------------------------------------- diffusers and peft


def theirs(kind="sd1"):
    unet = UNet2DConditionModel(**KINDS[kind]).eval()
    unet.load_state_dict(network(kind).state_dict())
    return unet


@torch.no_grad()
def their_output(unet):
    return unet(*inputs()).sample


def read_by_diffusers(path, kind):
    unet = theirs(kind)
    StableDiffusionPipeline.load_lora_into_unet(*StableDiffusionPipeline.lora_state_dict(path), unet)
    return unet


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_our_file(tmp_path, kind):
    unet = adapted(kind)
    assert difference(their_output(theirs(kind)), output(network(kind))) < 1e-5
    save_lora(tmp_path / "best.safetensors", unet, {"token": "[V]"})
    reference = read_by_diffusers(tmp_path / "best.safetensors", kind)
    loaded = sum(name.endswith("lora_A.default_0.weight") for name in reference.state_dict())
    assert loaded == len(lora.lora_of(unet))
    expected = their_output(reference)
    assert 0.1 < expected.abs().max() < 30
    assert difference(output(unet), expected) < 1e-4 < 0.02 < difference(output(network(kind)), expected)


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL_LAYERS = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv", "time_emb_proj"]
ALL_LAYERS += ["conv_in", "conv_shortcut", "linear_1", "linear_2"]


def with_peft(kind="sd1", targets=ATTENTION, alpha=2):
    """diffusers' U-Net with random adapters of peft, of rank 4."""
    unet = theirs(kind)
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    return unet


def save_as_diffusers(folder, unet, spelling="peft", **settings):
    """What diffusers writes for this U-Net, and where: the layers as peft or as diffusers spells them."""
    layers = get_peft_model_state_dict(unet)
    if spelling == "diffusers":
        layers = convert_state_dict_to_diffusers(layers)
    config = {"r": 4, "lora_alpha": 2, "use_rslora": False, "use_dora": False, "alpha_pattern": {}} | settings
    StableDiffusionPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=config)
    return folder / "pytorch_lora_weights.safetensors"


def assert_reads(path, unet, kind="sd1"):
    expected, ours = their_output(unet), network(kind)
    load_lora(ours, path)
    assert difference(output(ours), expected) < 1e-4 < 0.02 < difference(output(network(kind)), expected)
    lora.merge(ours)
    assert difference(output(ours), expected) < 1e-4


@pytest.mark.parametrize(("kind", "spelling"), [("sd1", "peft"), ("sd1", "diffusers"), ("sd2", "peft")])
def test_we_read_adapters_of_all_layers(tmp_path, kind, spelling):
    """As diffusers writes them, and kohya's tools: proj_in, proj_out and ff by default, convolutions on request."""
    targets = ATTENTION if spelling == "diffusers" else ALL_LAYERS
    unet, path = with_peft(kind, targets), tmp_path / "kohya.safetensors"
    assert_reads(save_as_diffusers(tmp_path, unet, spelling), unet, kind)
    tensors = {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        layer = "lora_unet_" + name.rpartition(".lora_")[0].replace(".", "_")
        half = lora.DOWN if ".lora_A." in name else lora.UP
        tensors |= {layer + half: tensor.contiguous(), layer + lora.ALPHA: torch.tensor(2.0)}
    assert any(tensor.shape[2:] == (3, 3) for tensor in tensors.values()) == (targets is ALL_LAYERS)
    save_file(tensors, path)
    assert_reads(path, unet, kind)
    assert difference(their_output(read_by_diffusers(path, kind)), their_output(unet)) < 1e-4


def processor_names(name):
    name = name.replace(".to_", ".processor.to_").replace(".0.lora_", ".lora_").replace(".lora_", "_lora_")
    return name.replace("_A.", ".down.").replace("_B.", ".up.")


def linear_layer_names(name):
    return name.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize(
    ("rename", "last"),
    [
        (processor_names, "attn2.processor.to_out_lora.up.weight"),
        (linear_layer_names, "attn2.to_out.0.lora_linear_layer.up.weight"),
    ],
)
def test_we_read_files_of_older_diffusers(tmp_path, prefix, rename, last):
    """They have no alpha, which means the rank."""
    unet = with_peft(alpha=4)
    tensors = {prefix + rename(name): each.contiguous() for name, each in get_peft_model_state_dict(unet).items()}
    assert f"{prefix}mid_block.attentions.0.transformer_blocks.0.{last}" in tensors
    save_file(tensors, tmp_path / "l.safetensors")
    assert_reads(tmp_path / "l.safetensors", unet)
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    assert_reads(tmp_path / "pytorch_lora_weights.bin", unet)


def test_we_read_a_file_of_peft(tmp_path):
    """Its alpha stands in adapter_config.json next to it."""
    unet = theirs()
    torch.manual_seed(5)
    unet = get_peft_model(unet, LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, init_lora_weights=False))
    unet.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    assert all(name.startswith("base_model.model.") for name in load_file(path))
    assert_reads(path, unet)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        load_lora(network(), path)


@pytest.mark.parametrize("setting", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"to_q": 3}}], ids=str)
def test_what_diffusers_has_beyond_lora_is_refused(tmp_path, setting):
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        load_lora(network(), save_as_diffusers(tmp_path, with_peft(), **setting))


# ---------------------------------------------------------------------------------------------- bad files


SPOILT = {
    "another format": (lambda t: t | {"unet.x.lora_Q.weight": torch.ones(4)}, "holds unet.x.lora_Q.weight, which fits"),
    "no partner": (lambda t: {n: x for n, x in t.items() if n != TO_Q + lora.UP}, f"lacks {TO_Q}.lora_up.weight"),
    "up of another rank": (lambda t: t | {TO_Q + lora.UP: torch.ones(16, 5)}, r"is \(16, 5\) and should be"),
    "down of a convolution": (lambda t: t | {TO_Q + lora.DOWN: torch.ones(4, 16, 1, 1)}, "other shapes"),
    "a text encoder": (lambda t: t | {"lora_te_text_model_x.alpha": torch.ones(())}, "lora_te_.*not supported"),
    "LoHa": (lambda t: {TO_Q + ".hada_w1_a": torch.ones(4, 4)}, "hada_w1_a.*LyCORIS.*not supported"),
    "LoKr": (lambda t: {"lycoris_down_blocks_0.lokr_w1": torch.ones(4, 4)}, "lokr_w1.*not supported"),
    "DoRA": (lambda t: t | {TO_Q + ".dora_scale": torch.ones(16, 1)}, "dora_scale.*DoRA.*not supported"),
    "LoCon's third factor": (lambda t: t | {TO_Q + ".lora_mid.weight": torch.ones(4, 4, 3, 3)}, "lora_mid.*not supp"),
    "a whole U-Net": (lambda t: network().state_dict(), "is no LoRA but a U-Net"),
    "anything": (lambda t: {"x": torch.ones(2)}, "is no LoRA but something unknown"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_files(tmp_path, case):
    """One line that names the file, and the base if the header knows it, and the U-Net is as it was."""
    path, (spoil, message) = tmp_path / "bad.safetensors", SPOILT[case]
    tensors, unet = {name: tensor.clone() for name, tensor in spoil(lora.lora_tensors(adapted())).items()}, network()
    for header in ({}, {"ss_base_model_version": "a"}, {"ss_base_model_version": "x", "base": "a"}):
        save_file(tensors, path, header)
        with pytest.raises(CheckpointError, match=message) as error:
            load_lora(unet, path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith("; it was made for a") == bool(header)
    assert unet.state_dict().keys() == network().state_dict().keys()
