"""Write a model as transformers' CLIPModel (weights, config, preprocessor, tokenizer), and compare it.

  open_clip  visual.* transformer.* ...  -> CLIPModel  vision_model.* text_model.* ...       model.safetensors
             in_proj (q, k, v in one)    ->            q_proj, k_proj, v_proj
             x @ proj                    ->            Linear, which holds the transpose

transformers is imported inside functions, because training does not need it.
"""

import dataclasses
import math
import re
import shutil
from pathlib import Path

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from PIL.Image import Resampling
from safetensors.torch import save_file

from data_prep.errors import UserError
from train.export.reference import Outputs, Samples, max_difference
from train.model.clip import Clip

# Settings that CLIPModel supports at any value; every other one must have open_clip's default. patch_dropout
# acts in training only, pad_id and eos_id matter only under settings that are not supported, and a norm
# commutes with selecting one token.
SUPPORTED = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"},
    "vision_cfg": (
        {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "pos_embed_type"}
        | {"patch_dropout", "final_ln_after_pool"}
    ),
    "text_cfg": {
        "layers",
        "width",
        "heads",
        "mlp_ratio",
        "context_length",
        "vocab_size",
        "pad_id",
        "eos_id",
        "final_ln_after_pool",
    },
}
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
# The libraries sum in different orders, which costs a few fp32 units in the last place (6e-8). A wrong
# activation or a swapped projection differs by 1e-2 and more, so the bound need not be tight.
FEATURES_BOUND = 1e-5
PIXELS_BOUND = 1e-5  # both resize with Pillow; (x / 255 - mean) / std is rounded at different points


def unsupported_settings(clip: Clip) -> list[str]:
    """Settings that CLIPModel or CLIPProcessor does not support, as "vision_cfg.pool_type = 'avg'"."""
    model_cfg = clip.config["model_cfg"]
    unsupported = [
        f"{name} = {value!r}"
        for name, value in model_cfg.items()
        if name not in SUPPORTED["model_cfg"] and value
    ]
    for tower, schema in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        settings, default = dataclasses.asdict(schema(**model_cfg[tower])), dataclasses.asdict(schema())
        if set(settings["norm_kwargs"] or {}) <= {"eps"}:
            settings["norm_kwargs"] = None
        names = {name for name in default if name not in SUPPORTED[tower] and settings[name] != default[name]}
        # Lists here mean a ResNet, or patches that are not square.
        names |= {name for name in ("layers", "patch_size") if not isinstance(settings.get(name, 1), int)}
        for name in ("hf_model_name", "hf_tokenizer_name"):  # may be folders, and what this says is published
            if settings.get(name):
                settings[name] = Path(settings[name]).name
        unsupported += [f"{tower}.{name} = {settings[name]!r}" for name in default if name in names]
    if len(set(clip.image_size)) > 1:
        unsupported.append(f"image_size = {list(clip.image_size)}")
    if (mode := clip.config["preprocess_cfg"]["resize_mode"]) not in ("shortest", "squash"):
        unsupported.append(f"resize_mode = {mode!r}")
    if type(clip.tokenizer) is not SimpleTokenizer:
        unsupported.append(f"the tokenizer {type(clip.tokenizer).__name__}")
    return unsupported


def unsupported_weights(clip: Clip) -> list[str]:
    """Weights whose name or shape differs from CLIPModel's; for a model without unsupported settings."""
    from transformers import CLIPModel

    with torch.device("meta"):
        target = CLIPModel(config_of(clip, torch.float32)).state_dict()
        ours = renamed(
            {
                name: torch.empty_like(tensor, device="meta")
                for name, tensor in clip.towers.model.state_dict().items()
            }
        )
    shapes = [{name: tuple(tensor.shape) for name, tensor in weights.items()} for weights in (ours, target)]
    return sorted(f"{name} {list(shape)}" for name, shape in shapes[0].items() ^ shapes[1].items())


def write(clip: Clip, folder: Path, dtype: torch.dtype) -> None:
    """Write the files of CLIPModel and CLIPProcessor, for a model without unsupported settings or weights."""
    weights = renamed(clip.weights(dtype))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config_of(clip, dtype).save_pretrained(folder)
    # safetensors makes its files readable by their owner only.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    _image_processor(clip).save_pretrained(folder)
    tokenizer = _tokenizer(clip)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, needed by transformers 4


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's state dict under CLIPModel's names; no two tensors share memory."""
    result = {}
    for name, tensor in weights.items():
        new = _new_name(name)
        if (in_proj := new.rpartition("in_proj_"))[1]:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{in_proj[0]}{part}_proj.{in_proj[2]}"] = piece.clone()
        else:
            result[new] = (
                tensor.T.contiguous()
                if new in ("visual_projection.weight", "text_projection.weight")
                else tensor
            )
    return result


def config_of(clip: Clip, dtype: torch.dtype):
    """transformers' CLIPConfig of this model."""
    from transformers import CLIPConfig

    model_cfg = clip.config["model_cfg"]
    vision, text = CLIPVisionCfg(**model_cfg["vision_cfg"]), CLIPTextCfg(**model_cfg["text_cfg"])

    def shared(tower: CLIPVisionCfg | CLIPTextCfg) -> dict:
        return {
            "hidden_size": tower.width,
            "num_hidden_layers": tower.layers,
            "intermediate_size": int(tower.width * tower.mlp_ratio),
            "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
            "layer_norm_eps": (tower.norm_kwargs or {}).get("eps", 1e-5),
            "projection_dim": model_cfg["embed_dim"],
        }

    return CLIPConfig(
        vision_config={
            **shared(vision),
            "num_attention_heads": vision.width // vision.head_width,
            "image_size": clip.image_size[0],
            "patch_size": vision.patch_size,
        },
        text_config={
            **shared(text),
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": clip.tokenizer.sot_token_id,
            "eos_token_id": clip.tokenizer.eot_token_id,  # where the text feature is taken from
            "pad_token_id": clip.tokenizer.eot_token_id,
        },
        projection_dim=model_cfg["embed_dim"],
        logit_scale_init_value=model_cfg.get("init_logit_scale", math.log(1 / 0.07)),
        architectures=["CLIPModel"],
        dtype=dtype,
    )


def compare(
    folder: Path, clip: Clip, samples: Samples, pixels: torch.Tensor, tokens: torch.Tensor, expected: Outputs
) -> tuple[dict, torch.Tensor]:
    """Load what `write` wrote with transformers, in fp32, and compare it with the original.

    Args:
        samples: images and captions.
        pixels, tokens: the samples as the original's preprocessing and tokenizer make them.
        expected: open_clip's outputs for these.

    Returns:
        image_features, text_features, logits: the largest differences, for the same pixels and each library's
            own tokens.
        pixels, pixels_torchvision: the largest differences of CLIPProcessor's pixels of square images, with
            its Pillow and its default backend. The default backend resizes differently, by a level or two of
            255 where it works on bytes, so no bound holds on all machines.
        from_images, from_images_min_cosine: image features of the original images with the default backend.
            Where an odd number of pixels is cropped away, transformers rounds down and open_clip to even, so
            one crop in four of images that are not square is shifted by one pixel.
        captions_cleaned: captions that open_clip cleans (curly quotes, `&amp;`, full-width letters: ftfy) and
            transformers does not, so their tokens differ. Tokens of cleaned captions are equal.
        And the image features of the original images with the default backend.

    Raises:
        UserError: the tokenizers differ on cleaned captions.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, loading = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model.eval()
    assert not any(loading.values()), loading  # names that are missing, or that CLIPModel does not know
    processor = CLIPProcessor.from_pretrained(folder)
    cleaned = [clip.tokenizer.clean_fn(caption) for caption in samples.captions]
    texts = processor.tokenizer(cleaned, padding=True, truncation=True, return_tensors="pt")
    for caption, ids, reference in zip(
        cleaned, _until_end(texts.input_ids, model), _until_end(tokens, model), strict=True
    ):
        if ids != reference:
            raise UserError(
                f"{clip.name}: CLIPTokenizer reads {caption!r} as {ids}, open_clip as {reference}; nothing"
                " was kept; if the caption contains a special token such as <|endoftext|>, pass other --data"
            )
    raw = processor.tokenizer(samples.captions, padding=True, truncation=True, return_tensors="pt").input_ids
    n_cleaned = sum(
        raw_ids != cleaned_ids
        for raw_ids, cleaned_ids in zip(
            _until_end(raw, model), _until_end(texts.input_ids, model), strict=True
        )
    )
    squares = [image.crop((0, 0, min(image.size), min(image.size))) for image in samples.images]
    square_pixels = torch.stack([clip.preprocess(image) for image in squares])
    by_pillow = CLIPImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        output = model(**texts, pixel_values=pixels)
        own_pixels = processor.image_processor(samples.images, return_tensors="pt").pixel_values
        from_images = model(**texts, pixel_values=own_pixels).image_embeds
    return {
        **Outputs(output.image_embeds, output.text_embeds, output.logits_per_image).differences(expected),
        "pixels": max_difference(by_pillow(squares, return_tensors="pt").pixel_values, square_pixels),
        "pixels_torchvision": max_difference(
            processor.image_processor(squares, return_tensors="pt").pixel_values, square_pixels
        ),
        "from_images": max_difference(from_images, expected.image_features),
        "from_images_min_cosine": (from_images * expected.image_features).sum(dim=1).min().item(),
        "captions_cleaned": n_cleaned,
    }, from_images


def bounds(clip: Clip) -> dict[str, float]:
    """The largest allowed differences; that of logits is scaled by the temperature, as logits are."""
    scale = max(1.0, clip.towers.model.logit_scale.exp().item())
    return {
        "image_features": FEATURES_BOUND,
        "text_features": FEATURES_BOUND,
        "logits": FEATURES_BOUND * scale,
        "pixels": PIXELS_BOUND,
    }


def _new_name(name: str) -> str:
    for old, new in RENAMES:
        name = re.sub(old, new, name)
    return name


def _until_end(tokens: torch.Tensor, model) -> list[list[int]]:
    """Each row up to its end token. Padding follows (0 in open_clip, the end token in transformers), which a
    causal tower does not see.
    """
    end = model.config.text_config.eos_token_id
    return [row[: row.index(end) + 1] for row in tokens.tolist()]


def _image_processor(clip: Clip):
    from transformers import CLIPImageProcessor

    preprocess, side = clip.config["preprocess_cfg"], clip.image_size[0]
    square = {"height": side, "width": side}
    shortest = preprocess["resize_mode"] == "shortest"
    return CLIPImageProcessor(
        size={"shortest_edge": side} if shortest else square,
        do_center_crop=shortest,
        crop_size=square,
        resample=Resampling.BILINEAR if preprocess["interpolation"] == "bilinear" else Resampling.BICUBIC,
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )


def _tokenizer(clip: Clip):
    """CLIPTokenizer with open_clip's vocabulary and transformers' names of the two special tokens.

    It pads with the end token and not with open_clip's 0, because 0 is the token "!" and would be removed
    from captions as padding.
    """
    from transformers import CLIPTokenizer

    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): number for token, number in clip.tokenizer.encoder.items()}
    merges = sorted(clip.tokenizer.bpe_ranks, key=clip.tokenizer.bpe_ranks.get)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=clip.tokenizer.context_length)
