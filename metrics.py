"""What DreamBench measures, DINO, CLIP-I and CLIP-T (arXiv 2208.12242, section 4.2), and reward.py's ALIGN-I and -T.

Published numbers are of facebook/dino-vits16, openai/clip-vit-base-patch16 and kakaobrain/align-base; scores of other
networks cannot be compared with them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.align import ALIGN
from model.clip import CLIP
from model.dino import DINO
from model.tokenizer import BertTokenizer, CLIPTokenizer
from reward import Reward, strip_token, unit_features


class Metrics:
    """Scores of pictures of one subject, as RPO's released evaluation means them. The photos are embedded once, here.

    DINO and CLIP-I: the cosine of the picture with each photo, averaged over the photos. CLIP-T: the cosine of the
    picture and its prompt without the token, which the release leaves in, for its pattern cannot match; 0 if negative
    (so does torchmetrics, though only to the mean of a call).
    ALIGN-I and ALIGN-T: reward.py's, cosines mapped to [0, 1].
    Raises ValueError if there are no photos, or if the tokenizer is another CLIP's.
    """

    def __init__(self, clip: CLIP, tokenizer: CLIPTokenizer, dino: DINO, reward: Reward, photos: list[Image.Image]):
        tokenizer.check_fits(clip.config.text_config, "CLIP")
        self.clip, self.tokenizer, self.dino, self.reward = clip, tokenizer, dino, reward
        self.dino_photos, self.clip_photos = self._dino(photos), self._clip(photos)

    @classmethod
    def from_folders(
        cls,
        clip: Path,
        dino: Path,
        align: Path,
        photos: list[Image.Image],
        token: str = "[V]",
        device: torch.device | str = "cpu",
    ) -> Metrics:
        """Load the networks from folders in the public layouts. Raises CheckpointError, naming the file, as they do."""
        tokenizer, bert = CLIPTokenizer.from_pretrained(clip), BertTokenizer.from_pretrained(align)
        reward = Reward(ALIGN.from_pretrained(align).to(device), bert, photos, token)
        eyes, vit = CLIP.from_pretrained(clip).to(device), DINO.from_pretrained(dino).to(device)
        return cls(eyes, tokenizer, vit, reward, photos)

    def of(self, photos: list[Image.Image], token: str) -> Metrics:
        """The same networks for another subject."""
        reward = Reward(self.reward.align, self.reward.tokenizer, photos, token)
        return Metrics(self.clip, self.tokenizer, self.dino, reward, photos)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> dict[str, Tensor]:
        """n RGB pictures, and each one's prompt -> {"dino", "clip_i", "clip_t", "align_i", "align_t"}, each (n,) fp32.

        Raises ValueError if there are no pictures, or not as many prompts.
        """
        if not images:
            raise ValueError("there are no pictures to score")
        align_i, align_t = self.reward.alignments(images, prompts)
        texts = [strip_token(prompt, self.reward.token) for prompt in prompts]
        rows = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        features = unit_features(self.clip.text_features, self.tokenizer, list(rows), self.device)
        text = features[[rows[text] for text in texts]]
        clip, dino = self._clip(images), self._dino(images)
        scores = {"dino": (dino @ self.dino_photos.T).mean(1), "clip_i": (clip @ self.clip_photos.T).mean(1)}
        return scores | {"clip_t": (clip * text).sum(1).clamp(min=0), "align_i": align_i, "align_t": align_t}

    def kinds(self) -> dict[str, str]:
        """What the networks are, such as {"dino": "ViT 12x384/16"}: layers x width / patch."""
        dino, eye, text = self.dino.config, self.clip.config.vision_config, self.clip.config.text_config
        net, bert = self.reward.align.config.vision_config, self.reward.align.config.text_config
        blocks = sum(net.repeats(n) for n in net.num_block_repeats)
        clip = f"ViT {eye.num_hidden_layers}x{eye.hidden_size}/{eye.patch_size}"
        return {
            "clip": f"{clip} + text {text.num_hidden_layers}x{text.hidden_size}",
            "dino": f"ViT {dino.num_hidden_layers}x{dino.hidden_size}/{dino.patch_size}",
            "align": f"EfficientNet of {blocks} blocks + BERT {bert.num_hidden_layers}x{bert.hidden_size}",
        }

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.clip.logit_scale.device

    def _dino(self, images: list[Image.Image]) -> Tensor:
        return unit_features(self.dino, self.dino.preprocess, images, self.device)

    def _clip(self, images: list[Image.Image]) -> Tensor:
        return unit_features(self.clip.image_features, self.clip.preprocess, images, self.device)
