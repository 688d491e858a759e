"""LAION's improved aesthetic predictor: how much people like a picture, about 1 to 10 (Table 8 of arXiv 2407.12164).

Follows sac+logos+ava1-l14-linearMSE (github.com/christophschuhmann/improved-aesthetic-predictor), which reads the image
features of openai/clip-vit-large-patch14. Other CLIPs give features without meaning for it.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from model.clip import CLIP
from model.files.tensors import build, read_tensors


class AestheticPredictor(nn.Module):
    """Five linear layers without activations. The dropouts between them count in the numbers of the file's tensors."""

    def __init__(self, width: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    @classmethod
    def from_pretrained(cls, path: Path, clip: CLIP) -> AestheticPredictor:
        """Read a .pth or .safetensors file, for the features of `clip`; frozen, in eval mode, on the device of `clip`.

        Raises CheckpointError if the file is missing or broken, or if its width is not that of the features.
        """
        source = f"{path} (for CLIP ViT-L/14)"
        predictor = build(cls, clip.config.projection_dim, read_tensors(path), source)
        return predictor.to(clip.logit_scale.device)

    def forward(self, features: Tensor) -> Tensor:
        """CLIP's image features (n, width), of unit length, fp32 -> scores (n,)."""
        return self.layers(features)[:, 0]
