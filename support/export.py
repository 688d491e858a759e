"""One file with everything in it, in the layout that ComfyUI, A1111 and others read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from model.files.errors import CheckpointError
from model.files.single_file import CONFIG_KEY, write_single_file
from model.files.tensors import read_metadata
from model.lora import merge
from model.stable_diffusion import StableDiffusion
from support.results import check_writable


def check_export(path: Path, base: Path) -> None:
    """Raise ValueError if the file cannot be written, or would replace anything but an earlier export."""
    check_writable(path)
    path = path.resolve()  # "new/../old" is there before "new" is
    if path.exists():
        with suppress(CheckpointError):
            if CONFIG_KEY in read_metadata(path) and not path.samefile(base):
                return
        raise ValueError(f"--export-single {path} would replace a file that is no export: give another name")


def export_single_file(sd: StableDiffusion, path: Path, header: dict[str, str]) -> None:
    """Write all networks in half precision; a LoRA is merged into the U-Net first, which changes `sd`.

    header: the checkpoint's, which the file gets. Raises ValueError if the file cannot be written.
    """
    merge(sd.unet)
    networks = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.text_encoder}
    parts = {name: (asdict(network.config), network.state_dict()) for name, network in networks.items()}
    write_single_file(path, parts | {"scheduler": asdict(sd.scheduler.config)}, header)
