"""Do Stable Diffusion 1.5 and 2.1 at full size load and compute as in diffusers? Run by hand; needs no download.

    python -m benchmarks.full_size                 # both: 8 GB of memory, 2 GB of disk, 10 minutes on a core
    python -m benchmarks.full_size --model 2.1 --large

Random weights are written with diffusers and transformers at the published configurations, in half precision, to a
temporary folder. Every part is then loaded and run by ours and by theirs, each time in a process of its own, so that
its peak memory is its own:

- loaded in the file's precision. The peak counts from just before the load until every number has been touched, and
  must stay under 1.3 times the file: the file is mapped, and there is no second copy.
- loaded in fp32 and run: a U-Net step at 64x64 latents, a prompt of 77 tokens, a VAE decode to 512x512 pixels.

Exit status 1 if the peak is above that or if an output differs by more than 1e-3. Outputs are of order 1. Where the
libraries sum in the same order the difference is 0; in another order, as with channels_last or another torch, float32
gives up to 2e-4 after some sixty layers, and a wrong head count or activation 1e-2 and more. (A wrong norm eps is too
faint for random weights of this size: the tests have quiet ones for it.)
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.common import alone, peak, resident
from support.flags import EMBEDDED_BASE

MOST_PEAK = 1.3  # times the file, for a load in the file's precision
MOST_DIFFERENCE = 1e-3  # of outputs of order 1, in fp32

MODELS = {
    "1.5": {
        "unet": {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "hidden_act": "quick_gelu",
        },
    },
    "2.1": {
        "unet": {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "hidden_act": "gelu",
        },
    },
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
PARTS = ("unet", "text_encoder", "vae")


def their_class(part: str) -> type:
    if part == "text_encoder":
        from transformers import CLIPTextModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would run into the table
        return CLIPTextModel
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return UNet2DConditionModel if part == "unet" else AutoencoderKL


def our_class(part: str) -> type:
    from model import clip, unet, vae

    return {"unet": unet.UNet, "text_encoder": clip.CLIPTextEncoder, "vae": vae.VAE}[part]


def write(model: str, part: str, folder: Path) -> None:
    """A random network in half precision, in the public layout: norms near 1, what they feed of order 1."""
    torch.manual_seed(0)
    with torch.device("meta"):  # else the libraries would first draw their own random numbers, in fp32
        if part == "text_encoder":
            from transformers import CLIPTextConfig

            network = their_class(part)(CLIPTextConfig(**MODELS[model][part]))
        else:
            network = their_class(part)(**(VAE if part == "vae" else MODELS[model][part]))
    tensors = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1:
            values = 0.1 * torch.randn(tensor.shape) + (1 if name.endswith("weight") else 0)
        else:
            values = torch.randn(tensor.shape) * (1 if "embedding.weight" in name else tensor[0].numel() ** -0.5)
        tensors[name] = values.half()
    network.load_state_dict(tensors, assign=True)
    network.save_pretrained(folder)


def load(part: str, folder: Path, ours: bool, dtype: torch.dtype) -> tuple[torch.nn.Module, float, int]:
    """The network, the seconds and the peak of bytes that it took to have all its numbers in memory."""
    network_class = our_class(part) if ours else their_class(part)
    before, start = resident(), time.perf_counter()
    if ours or part == "text_encoder":
        network = network_class.from_pretrained(folder, dtype=dtype)
    else:
        network = network_class.from_pretrained(folder, torch_dtype=dtype)
    for parameter in network.parameters():
        parameter.detach().flatten()[::512].sum()  # one number in each page of memory: a mapped file is read now
    return network, time.perf_counter() - start, peak() - before


def measure(part: str, folder: Path, ours: bool) -> tuple[float, int]:
    """Seconds and peak of a load in the file's own precision."""
    return load(part, folder, ours, torch.float16)[1:]


@torch.no_grad()
def run(part: str, folder: Path, ours: bool, side: int) -> tuple[torch.Tensor, float]:
    """The output in fp32, and the seconds of the forward pass."""
    network, *_ = load(part, folder, ours, torch.float32)
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, side, side, generator=draw)
    ids = torch.randint(0, 49406, (1, 77), generator=draw)
    ids[0, 0], ids[0, 20:] = 49406, 49407
    start = time.perf_counter()
    if part == "unet":
        width = network.config.cross_attention_dim
        out = network(latents, torch.tensor(601), torch.randn(1, 77, width, generator=draw))
    else:
        out = network.decode(latents) if part == "vae" else network(ids)
    seconds = time.perf_counter() - start
    if not ours:
        out = out.last_hidden_state if part == "text_encoder" else out.sample
    return out.contiguous(), seconds


def compare(model: str, part: str, folder: Path, side: int) -> bool:
    """Print one row of the table. Is all as it should be?"""
    file = next(folder.glob("*.safetensors"))
    with open(file, "rb") as data:  # into the system's cache, so that nobody has to wait for the disk
        while data.read(1 << 24):
            pass
    (our_load, our_peak), (their_load, their_peak) = (alone(measure, part, folder, ours) for ours in (True, False))
    (our_out, our_time), (their_out, their_time) = (alone(run, part, folder, ours, side) for ours in (True, False))
    ratio = our_peak / file.stat().st_size
    difference = (our_out - their_out).abs().max().item()
    name = f"{part} {side}x{side}" if part == "unet" else part
    megabytes = [f"{number / 1e6:.0f}" for number in (file.stat().st_size, our_peak, their_peak)]
    print(
        f"| SD {model} {name} | {megabytes[0]} | {our_load:.1f} / {their_load:.1f} | {megabytes[1]} / {megabytes[2]} "
        f"| {ratio:.2f} | {difference:.1e} of {their_out.abs().max():.1f} | {our_time:.1f} / {their_time:.1f} |",
        flush=True,
    )
    ordinary = our_out.shape == their_out.shape and 0.1 < their_out.abs().max() < 100
    return ordinary and ratio < MOST_PEAK and difference <= MOST_DIFFERENCE


def write_sd15(folder: Path) -> Path:
    """A base of SD 1.5's size with random weights in half precision; tokenizer and reward are weights/toy's."""
    for part in PARTS:
        write("1.5", part, folder / part)
    for part in ("tokenizer", "scheduler", "reward"):
        shutil.copytree(EMBEDDED_BASE / part, folder / part)
    return folder


def main() -> int:
    """Exit status 0 if every part loads within the memory and agrees, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder (default: the system's place)")
    parser.add_argument("--large", action="store_true", help="SD 2.1's U-Net also at 96x96 latents, its own size")
    args = parser.parse_args()

    print("ours / diffusers; peaks are above what the process held before the load")
    print("| part | file MB | load s | peak MB | our peak / file | max difference | forward s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the folder goes
    good = True
    with tempfile.TemporaryDirectory(prefix="full_size_", dir=args.folder) as temporary:
        for model in MODELS if args.model == "all" else [args.model]:
            for part in PARTS:
                if part == "vae" and model != "1.5" and args.model == "all":
                    continue  # the same network in both
                folder = Path(temporary) / part
                alone(write, model, part, folder)
                for side in (64, 96) if args.large and (model, part) == ("2.1", "unet") else (64,):
                    good &= compare(model, part, folder, side)
                for path in folder.iterdir():  # room for the next
                    path.unlink()
    print("all is well" if good else f"FAILED: a peak above {MOST_PEAK} files or a difference above {MOST_DIFFERENCE}")
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenProcessPool:
        sys.exit("a process was killed: too little memory?")
    except KeyboardInterrupt:
        sys.exit(130)
