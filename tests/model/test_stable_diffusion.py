"""Stable Diffusion as a whole against diffusers' StableDiffusionPipeline: the same folder, the same initial noise, the
same pictures. First a tiny random base, then weights/toy, the base that this project ships.

Tolerances: both sides do the same float32 arithmetic in another order, and round to 256 grey levels, so that a few
pixels differ by one level. A mistaken detail moves a picture by 0.05 levels (the sampler's last step ends at another
noise level) to 40 (zeros in place of the empty prompt), on average over its pixels.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from parity import randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import write_base

from model.align import ALIGN
from model.clip import CLIP, CLIPTextEncoder
from model.dino import DINO
from model.files.errors import CheckpointError
from model.scheduler import randn
from model.stable_diffusion import PRECISIONS, StableDiffusion, guided
from model.tokenizer import BertTokenizer, CLIPTokenizer
from model.unet import UNet
from model.vae import VAE
from toy.networks import SCHEDULER
from toy.networks import WEIGHTS as TOY

# What the public folders' scheduler_config.json say: SD 1.x, and SD 2.1 at 768 px.
SCHEDULERS = {
    "sd1": SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "sd2": SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
}
SAMPLERS = {"dpm++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}
ROUNDING = 0.03  # grey levels, on average over a picture
PROMPTS = ["a photo of a dog", "a red hat on the beach", "the cat in the snow, it's a cat"]
TEXTS = [*PROMPTS[:2], "Purple CAT, wearing a rainbow scarf!"]
LONG = "a dog on the beach and a cat in the snow " * 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of tiny random networks, for pictures of 16 pixels."""
    folder = write_base(tmp_path_factory.mktemp("base") / "base")
    for part, kind in (("unet", UNet), ("vae", VAE), ("text_encoder", CLIPTextEncoder)):
        (file,) = (folder / part).glob("*.safetensors")
        save_file(randomise(kind.from_pretrained(folder / part)).state_dict(), file)
    change(folder / "vae" / "config.json", scaling_factor=0.3)  # not the default, which would hide that nobody reads it
    change(folder / "scheduler" / "scheduler_config.json", **SCHEDULERS["sd1"])
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def copied(base, folder, kind="sd1"):
    """A copy of the base with another scheduler; "saved": as the library saves it, with every default spelled out."""
    shutil.copytree(base, folder)
    if kind == "saved":
        PNDMScheduler.from_config(SCHEDULER).save_pretrained(folder / "scheduler")
    else:
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[kind]))
    return folder


def pipeline(folder, sampler="dpm++"):
    scheduler = SAMPLERS[sampler].from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    pipe = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(base):
    return StableDiffusion.from_pretrained(base)


def initial(count, side=8, channels=4):
    return randn((channels, side, side), [torch.Generator().manual_seed(seed) for seed in range(count)], "cpu")


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
    """They have contrast, are not mostly black or white, and differ, so that agreement means something."""
    for picture in levels(pictures):
        assert picture.std() > 15 and ((picture > 2) & (picture < 253)).mean() > 0.5
    for i in range(1, len(pictures)):
        assert difference(pictures[:1], pictures[i : i + 1]) > 5


@pytest.mark.parametrize("guidance", [7.5, 1])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", [*SCHEDULERS, "saved"])
def test_draws_what_the_pipeline_draws(tmp_path, base, kind, sampler, guidance):
    folder = copied(base, tmp_path / "base", kind)
    latents = initial(2)
    expected = drawn(pipeline(folder, sampler), PROMPTS[:2], latents, 20, guidance)
    sd = StableDiffusion.from_pretrained(folder)
    pictures = sd.generate(PROMPTS[:2], [0, 1], 20, guidance, sampler, latents=latents)
    assert all(picture.size == (16, 16) and picture.mode == "RGB" for picture in pictures)
    assert_pictures(pictures)
    assert difference(pictures, expected).max() < ROUNDING


def test_encode_prompts(base, ours):
    """A long prompt is cut off: its first 75 tokens are read, and what follows changes nothing."""
    prompts = [*PROMPTS, "", "A DOG\n on the  Beach!", "<|endoftext|> dog", LONG]
    expected = pipeline(base).encode_prompt(prompts, "cpu", 1, False)[0]
    context = ours.encode_prompts(prompts)
    assert context.shape == expected.shape == (len(prompts), 77, 32)
    assert expected.abs().max() > 0.5 and (context - expected).abs().max() <= 1e-4
    assert not context.requires_grad
    assert (context[0] - context[1]).abs().max() > 0.1
    assert ours.tokenizer.overflow(LONG) and not ours.tokenizer.overflow(PROMPTS[0])
    cut = LONG.removesuffix(ours.tokenizer.overflow(LONG))
    assert context[-1:].equal(ours.encode_prompts([cut + "red hat"]))


def drawings(*sizes):
    """Smooth random pictures of these sizes."""
    draws = np.random.default_rng(0)
    small = [Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in sizes]
    return [picture.resize(size) for picture, size in zip(small, sizes, strict=True)]


@torch.no_grad()
def test_encode_and_decode_images(base, ours):
    theirs, pictures = pipeline(base), drawings(*[(36, 28)] * 3)
    posterior = theirs.vae.encode(theirs.image_processor.preprocess(pictures)).latent_dist
    mean, std = ours.encode_images(pictures)
    assert mean.shape == std.shape == (3, 4, 14, 18)
    assert 0.1 < posterior.mean.abs().max() < 30
    assert (mean - 0.3 * posterior.mean).abs().max() <= 1e-4
    assert ((std - 0.3 * posterior.std) / posterior.std).abs().max() <= 1e-4

    expected = theirs.image_processor.postprocess(theirs.vae.decode(mean / 0.3).sample, "np")
    decoded = ours.decode_latents(mean)
    assert [picture.size for picture in decoded] == [(36, 28)] * 3
    assert_pictures(decoded)
    assert np.abs(levels(decoded) - levels(expected)).max() <= 1


def test_the_vae_takes_fewer_large_pictures_at_a_time(ours):
    """This changes nothing but the memory it needs."""
    pictures, taken = drawings(*[(256, 128)] * 6), []
    hook = ours.vae.encoder.register_forward_pre_hook(lambda layer, inputs: taken.append(len(inputs[0])))
    posterior, alone = ours.encode_images(pictures), ours.encode_images(pictures[-1:])
    hook.remove()
    assert taken == [4, 2, 1] and len(ours.decode_latents(posterior[0])) == 6
    for together, single in zip(posterior, alone, strict=True):
        assert (together[-1:] - single).abs().max() <= 1e-4


def test_guided():
    """Against the formula; at guidance 1 the unconditional half is not computed."""
    latents, context, empty, batches = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), torch.randn(77, 32), []

    def unet(x, t, c):
        batches.append(len(x))
        return x * t + c.mean((1, 2))[:, None, None, None]

    conditional, unconditional = unet(latents, 300, context), unet(latents, 300, empty.expand(2, -1, -1))
    for guidance in (0.0, 1.0, 2.0):
        expected = (1 - guidance) * unconditional + guidance * conditional
        torch.testing.assert_close(guided(unet, context, empty, guidance)(latents, 300), expected, rtol=1e-5, atol=1e-4)
    assert batches[2:] == [4, 2, 4]


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(ours, sampler):
    """To within a grey level: a batch of another size sums in another order."""
    kwargs = {"steps": 10, "guidance": 3.0, "sampler": sampler}
    alone = ours.generate(PROMPTS, [5, 6, 7], batch_size=1, **kwargs)
    assert_pictures(alone)
    for batch_size in (2, 8):
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
    for one, other in ((first, second), (first, zero), (first, big), (second, zero)):
        assert difference([one], [other]) > 5
    alone = ours.generate(PROMPTS[:1], [0], **kwargs)
    torch.manual_seed(99)  # changes nothing
    assert (levels(alone) == levels(ours.generate(PROMPTS[:1], [0], **kwargs))).all()


def test_an_impossible_size_and_no_prompts(ours):
    with pytest.raises(ValueError, match="multiple of 2"):
        ours.generate(PROMPTS[:1], [0], size=31)
    assert ours.generate([], []) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_draws_other_numbers_and_the_same_picture(base, ours, precision):
    """The decoder stays in fp32 under fp16, which would overflow in that of a real VAE."""
    sd, dtypes = StableDiffusion.from_pretrained(base), []
    sd.precision = PRECISIONS[precision]
    sd.vae.decoder.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    pictures, expected = (each.generate(PROMPTS[:1], [0], 2) for each in (sd, ours))
    assert dtypes == [torch.bfloat16 if precision == "bf16" else torch.float32]
    assert 0 < difference(pictures, expected) < 4  # chance would give some 80


def test_drawing_batch_follows_free_memory(base, monkeypatch):
    sd = StableDiffusion.from_pretrained(base)
    assert sd.drawing_batch() == 8
    sd.device, sd.precision, free = torch.device("cuda"), torch.bfloat16, {}
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["GB"] * 1e9 - 1e9, 80e9))
    cases = [(0.1, {}, 1), (1, {}, 2), (2, {}, 4), (4, {}, 8), (80, {}, 16)]
    for gigabytes, less, expected in (*cases, (24, {"reserve": 23 * 10**9}, 2), (24, {"size": 2048}, 4)):
        free["GB"] = gigabytes
        assert sd.drawing_batch(**{"size": 512} | less) == expected
    free["GB"], sd.precision = 4, torch.float32
    assert sd.drawing_batch(512) == 4


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
    for name in ("v1-5.ckpt", "v1-5.CKPT", "x.pt", "x.bin"):
        (tmp_path / name).touch()
        refused(tmp_path / name, name, "pickle", ".safetensors")
    for part in ("text_encoder_2", "transformer"):
        (tmp_path / f"with-{part}" / part).mkdir(parents=True)
        refused(tmp_path / f"with-{part}", f"has {part}/, as SDXL, SD 3 or Flux", "only Stable Diffusion 1.x and 2.x")
    (tmp_path / "models--org--name" / "snapshots").mkdir(parents=True)
    refused(tmp_path / "models--org--name", "snapshots/HASH")
    refused(tmp_path, tmp_path, "lacks", "unet, vae, text_encoder, tokenizer, scheduler")
    folder = copied(base, tmp_path / "base")
    shutil.rmtree(folder / "vae")
    refused(folder, folder, "lacks the folder vae")
    folder = copied(base, tmp_path / "words")
    change(folder / "tokenizer" / "vocab.json", **{"dogs</w>": 49407})
    refused(folder, "the tokenizer has 49408 ids", "text encoder")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        *[({"in_channels": n}, rf"takes {n} channels and gives 4.*latents have 4.*inpainting \(9\)") for n in (5, 9)],
        ({"out_channels": 8}, "takes 4 channels and gives 8"),
        ({"cross_attention_dim": 24}, "width 24, .* gives 32: they are of different base models"),
    ],
)
def test_a_unet_of_another_base(ours, values, words):
    unet = UNet(replace(ours.unet.config, **values))
    with pytest.raises(CheckpointError, match=words):
        StableDiffusion(unet, ours.vae, ours.text_encoder, ours.tokenizer, ours.scheduler)


@pytest.mark.parametrize("damaged", range(3))
def test_damaged_weights_are_reported_with_the_part(base, damaged):
    sd = StableDiffusion.from_pretrained(base)
    parts = [
        ("text encoder", sd.text_encoder.text_model.final_layer_norm, lambda: sd.encode_prompts(["a dog"])),
        ("VAE's encoder", sd.vae.encoder.conv_out, lambda: sd.encode_images(drawings((32, 32)))),
        ("VAE's decoder", sd.vae.decoder.conv_out, lambda: sd.decode_latents(initial(1))),
    ]
    name, layer, work = parts.pop(damaged)
    layer.bias.detach().fill_(float("nan"))
    for _ in range(2):  # the result is not kept for the second time
        with pytest.raises(FloatingPointError, match=f"^the output of the {name} is not finite: its weights are"):
            work()
    for _, _, unharmed in parts:
        unharmed()


def test_latents_that_are_not_finite_are_not_the_decoders_fault(ours):
    """DPG decodes what the U-Net predicts; its loss then ends the run."""
    assert len(ours.decode_latents(initial(1) * float("nan"))) == 1


# ------------------------------------------------------------------------------------------- weights/toy, as shipped


def test_toy_is_small_and_in_half_precision():
    files = [path for path in TOY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    held = {str(path.parent.relative_to(TOY)) for path in weights}
    assert held == {"unet", "vae", "text_encoder", "reward", "metrics/clip", "metrics/dino"}
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}  # no pickles, nothing left over
    for path in weights:
        tensors = [tensor for tensor in load_file(path).values() if tensor.is_floating_point()]
        assert tensors and all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors), path


def test_toy_draws_what_the_pipeline_draws():
    prompts = ["a dog on the beach", "a red backpack in the snow"]
    pipe, latents = pipeline(TOY), initial(2, 16, 8)
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


@torch.no_grad()
@pytest.mark.parametrize(
    ("part", "kind", "theirs", "processor"),
    [
        ("reward", ALIGN, transformers.AlignModel, transformers.EfficientNetImageProcessorPil),
        ("metrics/clip", CLIP, transformers.CLIPModel, transformers.CLIPImageProcessorPil),
        ("metrics/dino", DINO, transformers.ViTModel, transformers.ViTImageProcessorPil),
    ],
)
def test_toy_networks_are_what_transformers_loads(part, kind, theirs, processor):
    ours, theirs = kind.from_pretrained(TOY / part), theirs.from_pretrained(TOY / part, dtype=torch.float32)
    pictures = drawings((96, 64), (64, 64), (70, 133))
    pixels = processor.from_pretrained(TOY / part)(pictures, return_tensors="pt").pixel_values
    if kind is DINO:
        assert_same_features(ours(ours.preprocess(pictures)), theirs(pixels).last_hidden_state[:, 0])
        return
    images = ours.image_features(ours.preprocess(pictures))
    assert_same_features(images, theirs.get_image_features(pixels).pooler_output)
    tokenizer, length = (BertTokenizer, 64) if kind is ALIGN else (CLIPTokenizer, 77)
    ids = tokenizer.from_pretrained(TOY / part)(TEXTS)
    tokens = getattr(transformers, tokenizer.__name__).from_pretrained(TOY / part)
    expected = tokens(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    texts = ours.text_features(*ids) if kind is ALIGN else ours.text_features(ids)
    assert_same_features(texts, theirs.get_text_features(expected.input_ids, expected.attention_mask).pooler_output)


def test_toy_has_one_tokenizer():
    """The U-Net's text encoder and the metric read the same words."""
    for name in ("vocab.json", "merges.txt"):
        assert (TOY / "tokenizer" / name).read_bytes() == (TOY / "metrics" / "clip" / name).read_bytes()
