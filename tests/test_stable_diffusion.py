"""Stable Diffusion as a whole against diffusers' StableDiffusionPipeline: the same folder, the same initial noise, the
same pictures. First a tiny random base that the library saved, then weights/toy, the base that this project ships.

Tolerances: both sides do the same float32 arithmetic in another order, and round to 256 grey levels, which now and then
tips a pixel by one level. A mistaken detail moves a picture by 0.05 levels (the sampler's last step ends at another
noise level) to 40 (zeros in place of the empty prompt), on average over its pixels.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from safetensors import safe_open
from tokenizers import pre_tokenizers

from model.align import ALIGN
from model.clip import CLIP
from model.dino import DINO
from model.files.errors import CheckpointError
from model.scheduler import randn
from model.stable_diffusion import StableDiffusion, recommended
from model.tokenizer import BertTokenizer, CLIPTokenizer
from toy.networks import WEIGHTS as TOY

# What the public folders' scheduler_config.json say: SD 1.x, SD 2.1 at 768 px, and weights/toy.
COMMON = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SCHEDULERS = {
    "sd1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **COMMON},
    "sd2": {"_class_name": "DDIMScheduler", "skip_prk_steps": True, "prediction_type": "v_prediction", **COMMON},
    "toy": {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "epsilon", **COMMON},
}
SAMPLERS = {"dpm++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler, "ddpm": DDPMScheduler}
ROUNDING = 0.03  # grey levels, on average over a picture
PROMPTS = ["a photo of a dog", "a red hat on the beach", "the cat in the snow, it's a cat"]
LONG = "a dog on the beach and a cat in the snow " * 12


def write_tokenizer(folder):
    """CLIP's files with a vocabulary of 256 bytes and a few words."""
    merges = {}
    for word in ("a", "photo", "of", "the", "dog", "cat", "beach", "snow", "red", "hat", "in", "on"):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[tuple(parts[:2])] = None
            parts = ["".join(parts[:2]), *parts[2:]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)])
    tokens = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": tokens[-2], **dict.fromkeys(("eos_token", "pad_token", "unk_token"), tokens[-1])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)


def randomise(network, gain=1.0):
    """Weights of a trained size, norms away from their defaults."""
    source = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=source)
        if "norm" in name:
            value = 1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise
        elif parameter.ndim > 1 and "embedding" not in name:
            value = gain * noise / parameter[0].numel() ** 0.5
        else:
            value = 0.3 * noise
        parameter.data.copy_(value)
    return network.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder that StableDiffusionPipeline.save_pretrained wrote: tiny random networks, pictures of 32 pixels."""
    folder = tmp_path_factory.mktemp("base")
    size = write_tokenizer(folder / "source")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "source")
    text_config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=size - 1,
        bos_token_id=size - 2,
        pad_token_id=size - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3,  # not the default, which would hide that nobody reads it
    )
    StableDiffusionPipeline(
        randomise(vae),
        randomise(transformers.CLIPTextModel(text_config), 2),
        tokenizer,
        randomise(unet),
        PNDMScheduler(**{name: value for name, value in COMMON.items() if name != "clip_sample"}, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    shutil.copytree(folder / "source", folder / "tokenizer", dirs_exist_ok=True)  # transformers 5 leaves out vocab.json
    shutil.rmtree(folder / "source")
    return folder


def with_scheduler(base, folder, kind):
    """A copy of the base with another scheduler_config.json; None: the library's, every default spelled out."""
    shutil.copytree(base, folder)
    if kind:
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[kind]))
    return folder


def pipeline(folder, sampler="dpm++"):
    scheduler = SAMPLERS[sampler].from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    pipe = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(base):
    return StableDiffusion.from_pretrained(base)


@pytest.fixture(scope="module")
def theirs(base):
    return pipeline(base)


def initial(count, side=8):
    return randn((4, side, side), [torch.Generator().manual_seed(seed) for seed in range(count)], "cpu")


def levels(pictures):
    """PIL pictures, or an array in [0, 1], to whole grey levels (n, height, width, 3)."""
    if isinstance(pictures, np.ndarray):
        return np.round(pictures * 255.0)
    return np.stack([np.asarray(picture, dtype=np.float64) for picture in pictures])


def difference(a, b):
    """The mean difference in grey levels of each picture."""
    return np.abs(levels(a) - levels(b)).mean(axis=(1, 2, 3))


def drawn(pipe, prompts, latents, steps, guidance):
    side = latents.shape[-1] * pipe.vae_scale_factor
    kwargs = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    return pipe(prompts, latents=latents, height=side, width=side, **kwargs).images


def assert_pictures(pictures):
    """They have contrast, do not sit in black and white, and differ: agreement means something."""
    for picture in levels(pictures):
        assert picture.std() > 15 and ((picture > 2) & (picture < 253)).mean() > 0.5
    for i in range(1, len(pictures)):
        assert difference(pictures[:1], pictures[i : i + 1]) > 5


@pytest.mark.parametrize("guidance", [7.5, 1])
@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
@pytest.mark.parametrize("kind", [None, "sd1", "sd2", "toy"])
def test_draws_what_the_pipeline_draws(tmp_path, base, kind, sampler, guidance):
    folder = with_scheduler(base, tmp_path / "base", kind)
    latents = initial(2)
    expected = drawn(pipeline(folder, sampler), PROMPTS[:2], latents, 20, guidance)
    pictures = StableDiffusion.from_pretrained(folder).generate(
        PROMPTS[:2], [0, 1], 20, guidance, sampler, latents=latents
    )
    assert all(picture.size == (32, 32) and picture.mode == "RGB" for picture in pictures)
    assert_pictures(pictures)
    assert difference(pictures, expected).max() < ROUNDING


def test_settings_show(ours):
    """What the test above compares changes the pictures: guidance, sampler, prompt, steps and size."""
    one = ours.generate(PROMPTS[:1], [0])
    for change in ({"guidance": 5}, {"sampler": "ddim"}, {"steps": 10}, {"sampler": "ddpm"}):
        assert difference(one, ours.generate(PROMPTS[:1], [0], **change)) > 1
    assert difference(one, ours.generate(PROMPTS[1:2], [0])) > 1
    assert ours.image_size == 32 and ours.generate(PROMPTS[:1], [0], size=20)[0].size == (20, 20)


@pytest.mark.parametrize("side", [6, 12])
def test_other_sizes(ours, theirs, side):
    latents = initial(1, side)
    expected = drawn(theirs, PROMPTS[:1], latents, 4, 3.0)
    pictures = ours.generate(PROMPTS[:1], [0], 4, 3.0, size=4 * side, latents=latents)
    assert difference(pictures, expected).max() < ROUNDING


def test_encode_prompts(ours, theirs):
    prompts = [*PROMPTS, "", "A DOG\n on the  Beach!", "<|endoftext|> dog", LONG]
    expected = theirs.encode_prompt(prompts, "cpu", 1, False)[0]
    context = ours.encode_prompts(prompts)
    assert context.shape == expected.shape == (len(prompts), 77, 24)
    assert expected.abs().max() > 0.5 and (context - expected).abs().max() <= 1e-4
    assert not context.requires_grad
    assert (context[0] - context[1]).abs().max() > 0.1


def test_a_long_prompt_is_cut_off(ours, theirs):
    """Its first 75 tokens are read, and what follows changes nothing."""
    ids = theirs.tokenizer([LONG], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert ours.tokenizer([LONG]).equal(ids) and ids[0, -1] == ours.tokenizer.last_id != ids[0, -2]
    assert ours.tokenizer.overflow(LONG) and not ours.tokenizer.overflow(PROMPTS[0])
    cut = LONG.removesuffix(ours.tokenizer.overflow(LONG))
    assert ours.encode_prompts([LONG]).equal(ours.encode_prompts([cut + "red hat"]))
    latents = initial(1)
    expected = drawn(theirs, [LONG], latents, 4, 7.5)
    assert difference(ours.generate([LONG], [0], 4, latents=latents), expected) < ROUNDING


def drawings(size=None):
    """Simple pictures, of different sizes unless one is given."""
    pictures = []
    for i, own in enumerate([(96, 64), (64, 64), (70, 133)]):
        picture = Image.new("RGB", own, ["skyblue", "white", "darkgreen"][i])
        pen = ImageDraw.Draw(picture)
        pen.ellipse((10 + 8 * i, 12, 50, 60), fill=["red", "saddlebrown", "yellow"][i], outline="black", width=3)
        pen.polygon([(5, 55), (30, 20 + 5 * i), (60, 58)], fill=["blue", "orange", "white"][i])
        pictures.append(picture.resize(size) if size else picture)
    return pictures


@torch.no_grad()
def test_encode_and_decode_images(ours, theirs):
    pictures = drawings((36, 28))
    posterior = theirs.vae.encode(theirs.image_processor.preprocess(pictures)).latent_dist
    mean, std = ours.encode_images(pictures)
    assert mean.shape == std.shape == (3, 4, 7, 9)
    assert 0.1 < posterior.mean.abs().max() < 30
    assert (mean - 0.3 * posterior.mean).abs().max() <= 1e-4
    assert ((std - 0.3 * posterior.std) / posterior.std).abs().max() <= 1e-4

    expected = theirs.image_processor.postprocess(theirs.vae.decode(mean / 0.3).sample, "np")
    decoded = ours.decode_latents(mean)
    assert [picture.size for picture in decoded] == [(36, 28)] * 3
    assert_pictures(decoded)
    assert np.abs(levels(decoded) - levels(expected)).max() <= 1


def test_the_vae_takes_fewer_large_pictures_at_a_time(ours, monkeypatch):
    """Which changes nothing but the memory it needs."""
    taken, pictures = [], drawings((256, 128))
    alone = [ours.encode_images([picture]) for picture in pictures * 2]
    for name in ("encode", "decode"):
        call = getattr(ours.vae, name)
        monkeypatch.setattr(ours.vae, name, lambda x, call=call: taken.append(len(x)) or call(x))
    mean, std = ours.encode_images(pictures * 2)
    for together, parts in zip((mean, std), zip(*alone, strict=True), strict=True):
        assert (together - torch.cat(parts)).abs().max() <= 1e-4
    decoded = ours.decode_latents(mean)
    assert taken == [4, 2, 4, 2]
    assert np.abs(levels(decoded) - levels([*ours.decode_latents(mean[:3]), *ours.decode_latents(mean[3:])])).max() <= 1
    for side, batch in ((128, 8), (512, 1), (768, 1)):
        assert ours._vae_batch(side**2) == batch


@torch.no_grad()
def test_predict(ours, monkeypatch):
    latents, (context, empty) = initial(2), (ours.encode_prompts(PROMPTS[:2]), ours.encode_prompts(["", ""]))
    asked = []
    forward = ours.unet.forward
    monkeypatch.setattr(ours.unet, "forward", lambda x, t, c: asked.append(len(x)) or forward(x, t, c))
    for t in (torch.tensor(300), torch.tensor([300, 7])):
        conditional, unconditional = ours.unet(latents, t, context), ours.unet(latents, t, empty)
        assert (conditional - unconditional).abs().max() > 1e-2
        for guidance in (0.0, 2.0, 7.5):
            expected = (1 - guidance) * unconditional + guidance * conditional
            assert (ours.predict(latents, t, context, empty, guidance) - expected).abs().max() <= 1e-4
        asked.clear()
        assert ours.predict(latents, t, context, empty, 1).equal(conditional)
        assert asked == [2]  # no unconditional half


def test_predict_carries_gradients(ours):
    context = ours.encode_prompts(PROMPTS[:1]).requires_grad_()
    ours.predict(initial(1), torch.tensor([5]), context, ours.encode_prompts([""]), 7.5).sum().backward()
    assert context.grad.abs().max() > 0


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(ours, sampler):
    """To within a grey level: a batch of another size sums in another order."""
    kwargs = {"steps": 10, "guidance": 3.0, "sampler": sampler}
    alone = ours.generate(PROMPTS, [5, 6, 7], batch_size=1, **kwargs)
    assert_pictures(alone)
    for batch_size in (2, 3, 8):
        finished = []
        together = ours.generate(PROMPTS, [5, 6, 7], batch_size=batch_size, on_batch=finished.append, **kwargs)
        assert np.abs(levels(alone) - levels(together)).max() <= 1
        assert sum(finished) == 3 and finished[0] == min(batch_size, 3)
    assert np.abs(levels(alone)[2:] - levels(ours.generate(PROMPTS[2:], [7], **kwargs))).max() <= 1


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
def test_seeds(ours, sampler):
    """The seed alone decides the noise, and 0 is a seed like others."""
    kwargs = {"steps": 5, "guidance": 2.0, "sampler": sampler}
    first, second, again, zero, big = ours.generate(PROMPTS[:1] * 5, [3, 1, 3, 0, 2**40], **kwargs)
    assert difference([first], [again]) < ROUNDING
    for other in (second, zero, big):
        assert difference([first], [other]) > 5
    assert difference([second], [zero]) > 5
    alone = ours.generate(PROMPTS[:1], [0], **kwargs)
    assert difference([zero], alone) < ROUNDING
    torch.manual_seed(99)  # nobody's seed
    assert (levels(alone) == levels(ours.generate(PROMPTS[:1], [0], **kwargs))).all()  # every bit
    if sampler == "dpm++":
        given = ours.generate(PROMPTS[:1], [8], latents=initial(1), **kwargs)  # made with seed 0
        assert difference([zero], given) < ROUNDING


def test_wrong_numbers(ours):
    for kwargs, words in (
        ({"size": 30}, "multiple of 4"),
        ({"sampler": "euler"}, "euler"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
    ):
        with pytest.raises(ValueError, match=words):
            ours.generate(PROMPTS[:1], [0], **kwargs)
    for seeds in ([], [0], [0, 1, 2]):
        with pytest.raises(ValueError, match="seed"):
            ours.generate(PROMPTS[:2], seeds)


@pytest.mark.parametrize("size", [0, -8])
def test_a_size_below_one(ours, size):
    with pytest.raises(ValueError, match="multiple of 4"):
        ours.generate(PROMPTS[:1], [0], 2, size=size)


@pytest.mark.parametrize("count", [1, 3])
def test_wrong_number_of_latents(ours, count):
    with pytest.raises(ValueError, match="latents"):
        ours.generate(PROMPTS[:2], [0, 1], 2, latents=initial(count))


def test_nothing_to_draw(ours):
    assert ours.generate([], []) == []


def test_training_mode_neither_changes_nor_matters(ours):
    """The U-Net has no dropout and no batch statistics, so train.py may draw in the middle of training."""
    pictures = []
    for training in (True, False):
        ours.unet.train(training)
        pictures += ours.generate(PROMPTS[:1], [0], 2)
        assert ours.unet.training is training
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_the_mode_is_left_as_found_after_an_error(ours):
    try:
        ours.unet.train()
        with pytest.raises(ValueError, match="euler"):
            ours.generate(PROMPTS[:1], [0], 2, sampler="euler")
        assert ours.unet.training
    finally:
        ours.unet.eval()


def test_recommended_settings(tmp_path):
    path = tmp_path / "rpo.json"
    assert recommended(tmp_path) == ({}, path)
    path.write_text('{"lr": 1e-4}')
    (tmp_path / "model.safetensors").touch()
    assert recommended(tmp_path) == recommended(tmp_path / "model.safetensors") == ({"lr": 1e-4}, path)


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        StableDiffusion.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


def test_what_is_no_base(tmp_path, base):
    refused(tmp_path / "none", tmp_path / "none", "not there")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "tokenizer", "vocab.json", "the base it was made from", "1.x: hf download")
    (tmp_path / "v1-5.ckpt").touch()
    refused(tmp_path / "v1-5.ckpt", "pickle", ".safetensors")
    for part, name in (("text_encoder_2", "SDXL"), ("transformer", "SD 3")):
        (tmp_path / name / part).mkdir(parents=True)
        refused(tmp_path / name, name, "only Stable Diffusion 1.x and 2.x")
    refused(tmp_path, tmp_path, "lacks", "unet, vae, text_encoder, tokenizer, scheduler")
    for part, file in {
        "unet": "config.json",
        "vae": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.safetensors",
        "tokenizer": "merges.txt",
        "scheduler": "scheduler_config.json",
    }.items():
        folder = with_scheduler(base, tmp_path / f"base-{part}", "sd1")
        (folder / part / file).unlink()
        refused(folder, folder / part)
        shutil.rmtree(folder / part)
        refused(folder, folder, part)


def test_parts_of_different_bases(tmp_path, base):
    folder = with_scheduler(base, tmp_path / "base", "sd1")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config = transformers.CLIPTextConfig(**{**config, "hidden_size": 32})
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    refused(folder, "24", "32")


@pytest.mark.parametrize("change", [{"in_channels": 9}, {"in_channels": 5}, {"out_channels": 8}], ids=str)
def test_a_unet_for_other_latents(tmp_path, base, change):
    folder = with_scheduler(base, tmp_path / "base", "sd1")
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config, **change).save_pretrained(folder / "unet")
    takes, gives = change.get("in_channels", 4), change.get("out_channels", 4)
    refused(folder, f"takes {takes} channels and gives {gives}", "latents have 4", "inpainting (9)")


@pytest.mark.parametrize("spoil", ["ids", "length"])
def test_a_tokenizer_of_another_text_encoder(tmp_path, base, spoil):
    folder = with_scheduler(base, tmp_path / "base", "sd1")
    file = folder / "tokenizer" / ("vocab.json" if spoil == "ids" else "tokenizer_config.json")
    values = json.loads(file.read_text(encoding="utf-8"))
    more = {"dogs</w>": 49407} if spoil == "ids" else {"model_max_length": 512}
    file.write_text(json.dumps(values | more), encoding="utf-8")
    refused(folder, "the tokenizer has", "49408 ids" if spoil == "ids" else "texts of 512", "text encoder", "77")


def nan(layer):
    return torch.nn.Parameter(torch.full_like(layer.bias, float("nan")), requires_grad=False)


@pytest.mark.parametrize("what", ["text encoder", "VAE's encoder", "VAE's decoder"])
def test_damaged_weights_are_told_with_the_part(base, what):
    sd = StableDiffusion.from_pretrained(base)
    layers = {"text encoder": sd.text_encoder.text_model.final_layer_norm}
    layers |= {f"VAE's {side}": getattr(sd.vae, side).conv_out for side in ("encoder", "decoder")}
    calls = {
        "text encoder": lambda: sd.encode_prompts(["a dog"]),
        "VAE's encoder": lambda: sd.encode_images(drawings((32, 32))),
    }
    calls["VAE's decoder"] = lambda: sd.decode_latents(initial(1))
    layers[what].bias = nan(layers[what])
    for name, call in calls.items():
        if name != what:
            call()
            continue
        for _ in range(2):  # nor is it kept and given out the second time
            message = f"^the output of the {what} is not finite: its weights are damaged$"
            with pytest.raises(FloatingPointError, match=message):
                call()


def test_latents_that_are_no_numbers_are_not_the_decoders_fault(ours):
    """DPG decodes what the U-Net predicts; train.py tells of a loss that is none."""
    assert len(ours.decode_latents(initial(1) * float("nan"))) == 1


# ------------------------------------------------------------------------------------------- weights/toy, as shipped


def test_toy_size():
    files = [path for path in TOY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32 * 2**20
    held = {str(path.parent.relative_to(TOY)) for path in files if path.suffix == ".safetensors"}
    assert held == {"unet", "vae", "text_encoder", "reward", "metrics/clip", "metrics/dino"}
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}  # no pickles, nothing left over


def test_toy_is_half_precision():
    paths = list(TOY.rglob("*.safetensors"))
    assert paths
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        assert any(tensor.is_floating_point() for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert not tensor.is_floating_point() or tensor.dtype == torch.float16, f"{path}: {name}"
            assert tensor.isfinite().all(), f"{path}: {name}"


def test_toy_draws_what_the_pipeline_draws():
    prompts = ["a dog on the beach", "a red backpack in the snow"]
    pipe = StableDiffusionPipeline.from_pretrained(TOY)
    pipe.set_progress_bar_config(disable=True)
    latents = initial(2, 16)
    expected = drawn(pipe, prompts, latents, 20, 7.5)
    pictures = StableDiffusion.from_pretrained(TOY).generate(prompts, [0, 1], 20, 7.5, latents=latents)
    assert all(picture.size == (128, 128) for picture in pictures)
    assert_pictures(pictures)
    assert difference(pictures, expected).max() < 1  # 1/255 of the range


def assert_same_features(ours, theirs):
    """float32 sums in another order, relative to the largest; and pictures and texts do differ."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (theirs[0] - theirs[1]).abs().max() > 0.05 * theirs.abs().max()


TEXTS = ["a dog on the beach", "a photo of a red backpack", "Purple CAT, wearing a rainbow scarf!"]


@torch.no_grad()
def test_toy_reward_is_what_transformers_loads():
    theirs = transformers.AlignModel.from_pretrained(TOY / "reward", dtype=torch.float32)
    processor = transformers.EfficientNetImageProcessorPil.from_pretrained(TOY / "reward")
    tokenizer = transformers.BertTokenizer.from_pretrained(TOY / "reward")
    ours, our_tokenizer = ALIGN.from_pretrained(TOY / "reward"), BertTokenizer.from_pretrained(TOY / "reward")
    pixels = processor(drawings(), return_tensors="pt")
    assert (ours.preprocess(drawings()) - pixels.pixel_values).abs().max() <= 1e-6
    expected = theirs.get_image_features(**pixels).pooler_output
    assert_same_features(ours.image_features(ours.preprocess(drawings())), expected)
    batch = tokenizer(TEXTS, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    ids, mask = our_tokenizer(TEXTS)
    assert ids.equal(batch.input_ids) and mask.equal(batch.attention_mask)
    expected = theirs.get_text_features(batch.input_ids, attention_mask=batch.attention_mask).pooler_output
    assert_same_features(ours.text_features(ids, mask), expected)


@torch.no_grad()
def test_toy_clip_is_what_transformers_loads():
    folder = TOY / "metrics" / "clip"
    theirs = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ours, our_tokenizer = CLIP.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    pixels = processor(drawings(), return_tensors="pt").pixel_values
    assert (ours.preprocess(drawings()) - pixels).abs().max() <= 1e-6
    assert_same_features(
        ours.image_features(ours.preprocess(drawings())), theirs.get_image_features(pixels).pooler_output
    )
    ids = tokenizer(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert our_tokenizer(TEXTS).equal(ids)
    assert_same_features(ours.text_features(our_tokenizer(TEXTS)), theirs.get_text_features(ids).pooler_output)


@torch.no_grad()
def test_toy_dino_is_what_transformers_loads():
    folder = TOY / "metrics" / "dino"
    theirs = transformers.ViTModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    processor = transformers.ViTImageProcessorPil.from_pretrained(folder)
    ours = DINO.from_pretrained(folder)
    pixels = processor(drawings(), return_tensors="pt").pixel_values
    assert (ours.preprocess(drawings()) - pixels).abs().max() <= 1e-6
    assert_same_features(ours(ours.preprocess(drawings())), theirs(pixels).last_hidden_state[:, 0])


def test_toy_tokenizers_agree():
    """The text encoder and the metric read the same words."""
    for name in ("vocab.json", "merges.txt"):
        assert (TOY / "tokenizer" / name).read_bytes() == (TOY / "metrics" / "clip" / name).read_bytes()
    theirs = transformers.CLIPTokenizer.from_pretrained(TOY / "tokenizer")
    ids = theirs(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert CLIPTokenizer.from_pretrained(TOY / "tokenizer")(TEXTS).equal(ids)
