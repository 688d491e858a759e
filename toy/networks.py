"""The networks of weights/toy: their configurations, and how its folders are written in the public layout.

Together they have about 16 million weights, 31 MiB in half precision. The classes are the public models'; only
the numbers in config.json differ.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from model.files.write import save_tensors
from toy import world

WEIGHTS = Path(__file__).parent.parent / "weights" / "toy"

VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 64, 96, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "layers_per_block": 2,
    "norm_num_groups": 16,
    "sample_size": world.SIZE,
    "scaling_factor": 0.18215,
}

UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": [1, 2, 3],  # heads of 64, as in SD 2
    "block_out_channels": [64, 128, 192],
    "center_input_sample": False,
    "cross_attention_dim": 128,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "sample_size": world.SIZE // 8,
}

DINO_CONFIG = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": world.SIZE,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "num_channels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def clip_config(vocab_size: int, eos_token_id: int) -> dict:
    """config.json of metrics/clip. eos_token_id: the last token of the vocabulary."""
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 128,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-05,
            "projection_dim": 128,
            "bos_token_id": eos_token_id - 1,
            "eos_token_id": eos_token_id,
            "pad_token_id": eos_token_id,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": world.SIZE,
            "patch_size": 16,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-05,
            "projection_dim": 128,
        },
    }


def text_encoder_config(clip: dict) -> dict:
    """config.json of text_encoder/, from that of CLIP."""
    # float32: else transformers 5 computes in the half precision of the file, and the U-Net does not
    return {"architectures": ["CLIPTextModel"], "torch_dtype": "float32", **clip["text_config"]}


def align_config(vocab_size: int) -> dict:
    """config.json of reward/."""
    return {
        "architectures": ["AlignModel"],
        "model_type": "align",
        "projection_dim": 128,
        "temperature_init_value": 0.1,
        "text_config": {
            "model_type": "align_text_model",
            "vocab_size": vocab_size,
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 384,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 64,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "align_vision_model",
            "image_size": 64,
            "hidden_dim": 128,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "depth_divisor": 8,
            "kernel_sizes": [3, 3, 5, 3, 5],
            "in_channels": [32, 16, 32, 64, 96],
            "out_channels": [16, 32, 64, 96, 128],
            "depthwise_padding": [],
            "strides": [1, 2, 2, 2, 1],
            "num_block_repeats": [1, 2, 2, 2, 1],
            "expand_ratios": [1, 3, 3, 4, 4],
            "squeeze_expansion_ratio": 0.25,
            "hidden_act": "swish",
            "pooling_type": "mean",
            "batch_norm_eps": 0.001,
            "batch_norm_momentum": 0.05,
            "drop_connect_rate": 0.0,
        },
    }


PREPROCESSORS = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": world.SIZE},
        "crop_size": {"height": world.SIZE, "width": world.SIZE},
        "resample": 3,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "align": {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"height": 64, "width": 64},
        "crop_size": {"height": 64, "width": 64},
        "resample": 2,
        "do_center_crop": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "include_top": False,
        "rescale_factor": 0.00784313725490196,
        "rescale_offset": True,
    },
    "dino": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": world.SIZE, "width": world.SIZE},
        "resample": 2,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_json(path: Path, value: dict) -> None:
    """Write indented JSON; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_part(folder: Path, config: dict, tensors: dict[str, Tensor], name: str, preprocessor: dict | None = None):
    """Write a network's folder: config.json, the weights in half precision, preprocessor_config.json if it has one."""
    write_json(folder / "config.json", config)
    if preprocessor:
        write_json(folder / "preprocessor_config.json", preprocessor)
    half = {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}
    save_tensors(half, folder / name, {"format": "pt"})


def write_scheduler(folder: Path) -> None:
    """Write scheduler/ and model_index.json into a base's folder."""
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", MODEL_INDEX)


def write_clip_tokenizer(captions: list[list[str]], folder: Path) -> None:
    """Write CLIP's byte-level BPE, with merges learned from the captions: every word of the world is one token."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=20, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    words = (t for texts in captions[:8000] for t in texts if not any(w in t for w in world.NONCE_WORDS))
    backend.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(dict.fromkeys(vocabulary))})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>"}
    special |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings | special)


def write_bert_tokenizer(captions: list[list[str]], folder: Path) -> None:
    """Write BERT's WordPiece: the words of the captions as one token each, and letters for all other words."""
    words = {word for texts in captions for text in texts for word in text.lower().split() if word.isalpha()}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    signs = [chr(c) for c in range(33, 127) if not chr(c).isalnum()]
    words -= set(world.NONCE_WORDS) | set(letters)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *letters, *(f"##{c}" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*vocabulary, *sorted(words)]) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 64, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings)
