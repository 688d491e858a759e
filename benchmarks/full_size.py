"""Loading and outputs of Stable Diffusion 1.5 and 2.1 at full size, compared with diffusers.

    python -m benchmarks.full_size                 # both: 8 GB of memory, 2 GB of disk, 10 minutes on a core
    python -m benchmarks.full_size --model 2.1 --large

diffusers and transformers write random weights of the published sizes, in half precision, to a temporary folder. Each
part is then loaded and run by ours and by theirs, each time in a new process, in which the peak memory is measured:

- loaded in the file's precision. The peak, from before loading until all numbers have been read, must be below 1.3
  times the file: the file is mapped, and there is no second copy.
- loaded in fp32 and run: a U-Net step at 64x64 latents, a prompt of 77 tokens, a VAE decode to 512x512 pixels.

The exit status is 1 if the peak is higher or an output differs by more than 1e-3. Outputs are of order 1. If both
libraries sum in the same order, the difference is 0. Otherwise fp32 gives up to 2e-4 after about sixty layers; a wrong
number of heads or a wrong activation gives at least 1e-2. A wrong norm eps changes too little here; the tests of model/
use smaller weights for that.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import in_new_process, peak, resident
from support import flags

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
    """The class of diffusers or transformers."""
    if part == "text_encoder":
        from transformers import CLIPTextModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        return CLIPTextModel
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return UNet2DConditionModel if part == "unet" else AutoencoderKL


def our_class(part: str) -> type:
    """The class in model/."""
    from model import clip, unet, vae

    return {"unet": unet.UNet, "text_encoder": clip.CLIPTextEncoder, "vae": vae.VAE}[part]


def write(model: str, part: str, folder: Path) -> None:
    """Write a random network in half precision, in the public layout. Its features are of order 1 in every layer."""
    torch.manual_seed(0)
    with torch.device("meta"):  # otherwise the libraries first initialize it in fp32
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
    """The network, and the seconds and the peak bytes of loading all of its numbers."""
    network_class = our_class(part) if ours else their_class(part)
    before, start = resident(), time.perf_counter()
    if ours or part == "text_encoder":
        network = network_class.from_pretrained(folder, dtype=dtype)
    else:
        network = network_class.from_pretrained(folder, torch_dtype=dtype)
    for parameter in network.parameters():
        parameter.detach().flatten()[::512].sum()  # reads one number of each page of the mapped file
    return network, time.perf_counter() - start, peak() - before


def measure(part: str, folder: Path, ours: bool) -> tuple[float, int]:
    """Seconds and peak bytes of loading in the file's precision."""
    return load(part, folder, ours, torch.float16)[1:]


@torch.no_grad()
def run(part: str, folder: Path, ours: bool, side: int) -> tuple[torch.Tensor, float]:
    """The output in fp32, and the seconds of the forward pass. side: of the latents."""
    network, *_ = load(part, folder, ours, torch.float32)
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, side, side, generator=draw)
    start = time.perf_counter()
    if part == "unet":
        width = network.config.cross_attention_dim
        out = network(latents, torch.tensor(601), torch.randn(1, 77, width, generator=draw))
    elif part == "vae":
        out = network.decode(latents)
    else:
        out = network(random_ids(network.config.vocab_size, draw))
    seconds = time.perf_counter() - start
    if not ours:
        out = out.last_hidden_state if part == "text_encoder" else out.sample
    return out.contiguous(), seconds


def random_ids(vocab_size: int, draw: torch.Generator) -> torch.Tensor:
    """(1, 77) ids of a prompt: the start token, 19 random ones, then the end token."""
    ids = torch.randint(0, vocab_size - 2, (1, 77), generator=draw)
    ids[0, 0], ids[0, 20:] = vocab_size - 2, vocab_size - 1
    return ids


def compare(model: str, part: str, folder: Path, side: int) -> bool:
    """Print one row of the table; return True if memory and output are as they should be."""
    file = next(folder.glob("*.safetensors"))
    with open(file, "rb") as data:  # so that both read it from the system's cache
        while data.read(1 << 24):
            pass
    loads = [in_new_process(measure, part, folder, ours) for ours in (True, False)]
    runs = [in_new_process(run, part, folder, ours, side) for ours in (True, False)]
    (our_load, our_peak), (their_load, their_peak) = loads
    (our_out, our_time), (their_out, their_time) = runs
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
    """Write a base of SD 1.5's size, with random weights in half precision; tokenizer and reward are weights/toy's."""
    for part in PARTS:
        write("1.5", part, folder / part)
    for part in ("tokenizer", "scheduler", "reward"):
        shutil.copytree(flags.EMBEDDED_BASE / part, folder / part)
    return folder


def compare_all(models: Sequence[str], place: Path | None, large: bool) -> bool:
    """Print the table; return True if all rows are as they should be. place: where to put the temporary folder."""
    print("ours / diffusers; peaks are above the memory before loading")
    print("| part | file MB | load s | peak MB | our peak / file | max difference | forward s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    good = True
    for model in models:
        for part in PARTS:
            if part == "vae" and model != models[0]:
                continue  # both models have the same VAE
            with tempfile.TemporaryDirectory(prefix="full_size_", dir=place) as folder:
                in_new_process(write, model, part, Path(folder))
                for side in (64, 96) if large and (model, part) == ("2.1", "unet") else (64,):
                    good &= compare(model, part, Path(folder), side)
    return good


def main() -> int:
    """Return 0 if every part loads within the memory and agrees, else 1."""
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all", help="(default: all)")
    parser.add_argument("--folder", type=flags.path, help="for the temporary weights (default: the system's place)")
    parser.add_argument("--large", action="store_true", help="SD 2.1's U-Net also at 96x96 latents, its own size")
    args = parser.parse_args()

    def work() -> int:
        good = compare_all(list(MODELS) if args.model == "all" else [args.model], args.folder, args.large)
        failed = f"FAILED: a peak above {MOST_PEAK} files, or a difference above {MOST_DIFFERENCE}"
        print("all good" if good else failed)
        return 0 if good else 1

    return flags.guarded(work, lambda: "close other programs")


if __name__ == "__main__":
    sys.exit(main())
