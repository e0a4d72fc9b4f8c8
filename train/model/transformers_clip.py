"""A folder of transformers' CLIPModel, read as an open_clip model; and how both libraries name weights.

  open_clip  visual.* transformer.* ...  <- CLIPModel  vision_model.* text_model.* ...       model.safetensors
             in_proj (q, k, v in one)    <-            q_proj, k_proj, v_proj
             x @ proj                    <-            Linear, which holds the transpose

transformers is imported inside functions, because training does not need it.
"""

import re
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import nn

from data_prep.errors import UserError
from train.model.foreign import (
    MAX_VOCABULARY_BYTES,
    check_folder,
    check_model_cfg,
    check_preprocessing,
    read_object,
)
from train.model.preprocessing import DEFAULTS, Preprocessing
from train.model.weights import State, read_weights

RENAMES = [
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
]
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]
FILES += ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
# transformers' names of the two special tokens of CLIP's vocabulary
SPECIAL = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
# What to use in place of a model type that is not read.
SIGLIP = "the same weights for open_clip, such as hf-hub:timm/ViT-B-16-SigLIP or hf-hub:timm/ViT-B-16-SigLIP2"
INSTEAD = {"siglip": SIGLIP, "siglip2": SIGLIP}


def is_transformers(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def name_in_transformers(name: str) -> str:
    """The name of a weight of an open_clip.CLIP in CLIPModel; in_proj has three in place of one."""
    for old, new in RENAMES:
        name = re.sub(old, new, name)
    return name


def open_clip_config(folder: Path) -> tuple[dict, Preprocessing]:
    """The model_cfg and preprocessing of a folder of transformers' CLIPModel.

    Raises:
        UserError: it is another model, or has a setting that open_clip's CLIP lacks.
    """
    try:
        from transformers import CLIPConfig
    except ImportError:
        raise UserError(
            f"{folder}: a folder of transformers, which is not installed: pip install transformers"
        ) from None
    check_folder(folder)
    content = read_object(folder / "config.json")
    kind = content.get("model_type")
    if kind != "clip":
        instead = INSTEAD.get(kind, "a folder of transformers' CLIPModel, or of open_clip")
        raise UserError(
            f"{folder}: a model of transformers of the type {kind!r}, which is not read; use {instead}"
        )
    config = CLIPConfig.from_dict(content)
    vision, text = config.vision_config, config.text_config
    activations = {vision.hidden_act, text.hidden_act}
    if len(activations) > 1 or not activations <= set(ACTIVATIONS):
        raise UserError(
            f"{folder}: has the activation {' and '.join(sorted(activations))}; it must be one of"
            f" {', '.join(ACTIVATIONS)} in both towers"
        )
    text_cfg = {
        **_tower(text),
        "heads": text.num_attention_heads,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
    }
    # transformers reads 2, which older files have by mistake, as the highest token; so does open_clip.
    if text.eos_token_id not in (2, text.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    vision_cfg = {
        **_tower(vision),
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
    }
    model_cfg = {"embed_dim": config.projection_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    if ACTIVATIONS[vision.hidden_act]:
        model_cfg["quick_gelu"] = True
    if not _has_clips_vocabulary(folder):
        text_cfg["hf_tokenizer_name"] = "."  # open_clip takes the tokenizer from the folder
    check_model_cfg(folder / "config.json", model_cfg)
    return model_cfg, _preprocessing(folder)


def _tower(config) -> dict:
    tower = {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
    }
    return tower if config.layer_norm_eps == 1e-5 else tower | {"norm_kwargs": {"eps": config.layer_norm_eps}}


def _preprocessing(folder: Path) -> Preprocessing:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preprocessing(DEFAULTS, f"of OpenAI's CLIP, since {file} is missing")
    content = read_object(file)
    crops = content.get("do_center_crop", True)
    config = {
        "mean": content.get("image_mean") or DEFAULTS["mean"],
        "std": content.get("image_std") or DEFAULTS["std"],
        "interpolation": INTERPOLATIONS.get(content.get("resample", 3), "bicubic"),
        "resize_mode": "shortest" if crops else "squash",
    }
    check_preprocessing(file, config)
    return Preprocessing(config, f"of {file}")


def load_transformers(folder: Path, model_cfg: dict) -> nn.Module:
    """open_clip's model with the weights of a folder of transformers' CLIPModel.

    Raises:
        UserError: weights are missing, or have other shapes.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: has no {' or '.join(WEIGHTS)}; it must hold the weights in one file")
    weights, model = read_weights(file), open_clip.CLIP(**model_cfg)
    state: State = {}
    for name, target in model.state_dict().items():
        if name == "attn_mask":
            continue
        tensor = _read(weights, name_in_transformers(name))
        if tensor is None or tensor.shape != target.shape:
            found = "is missing" if tensor is None else f"is {list(tensor.shape)}"
            raise UserError(
                f"{file}: {name_in_transformers(name)} {found}; its config.json says {list(target.shape)}"
            )
        state[name] = tensor
    model.load_state_dict(state, strict=False)
    return model


def _read(weights: State, name: str) -> torch.Tensor | None:
    before, in_proj, part = name.rpartition("in_proj_")
    names = [f"{before}{letter}_proj.{part}" for letter in "qkv"] if in_proj else [name]
    if not all(name in weights for name in names):
        return None
    tensor = torch.cat([weights[name] for name in names]) if in_proj else weights[name]
    return tensor.T.contiguous() if name in TRANSPOSED else tensor


def load_tokenizer(folder: Path, model_cfg: dict) -> SimpleTokenizer | HFTokenizer:
    length = model_cfg["text_cfg"]["context_length"]
    if "hf_tokenizer_name" in model_cfg["text_cfg"]:
        return HFTokenizer(str(folder), context_length=length, trust_remote_code=False)
    return SimpleTokenizer(context_length=length)


def _has_clips_vocabulary(folder: Path) -> bool:
    """Whether captions become the tokens of open_clip's own tokenizer; also where no tokenizer is given."""
    if (folder / "vocab.json").is_file():
        vocabulary = read_object(folder / "vocab.json", MAX_VOCABULARY_BYTES)
    elif (folder / "tokenizer.json").is_file():
        vocabulary = (read_object(folder / "tokenizer.json", MAX_VOCABULARY_BYTES).get("model") or {}).get(
            "vocab", {}
        )
    else:
        return True
    return {
        SPECIAL.get(token, token): number for token, number in vocabulary.items()
    } == SimpleTokenizer().encoder
