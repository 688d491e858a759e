"""One file with everything in it, in the layout that ComfyUI, A1111 and others read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from model.files.single_file import write_single_file
from model.lora import merge
from model.stable_diffusion import StableDiffusion


def export_single_file(sd: StableDiffusion, path: Path, metadata: dict[str, str]) -> None:
    """Write all networks in half precision; a LoRA is merged into the U-Net first, which changes `sd`.

    Raises ValueError if the file cannot be written.
    """
    merge(sd.unet)
    networks = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.text_encoder}
    parts = {name: (asdict(network.config), network.state_dict()) for name, network in networks.items()}
    write_single_file(path, parts | {"scheduler": asdict(sd.scheduler.config)}, metadata)
