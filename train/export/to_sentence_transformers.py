"""Four small files with which sentence-transformers loads the transformers files, and L2-norms features.

modules.json -> CLIP (config.json, model.safetensors, ... of transformers) -> 1_Normalize

Without them SentenceTransformer opens the folder as well, but its features are as long as CLIP leaves them,
so that dot products rank wrongly. The module names are those that versions 2 to 6 read.
"""

import json
from pathlib import Path

import torch

from train.export.reference import Outputs, max_difference

BOUND = 1e-5
_FEATURES = {
    modality: {"method": f"get_{modality}_features", "method_output_name": "pooler_output"}
    for modality in ("text", "image")
}
FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.CLIPModel"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": _FEATURES,
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
    "1_Normalize/config.json": {},
}


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def compare(
    folder: Path, images: list, captions: list[str], from_images: torch.Tensor, expected: Outputs
) -> dict[str, float]:
    """Load the folder with sentence-transformers, in fp32 on the CPU, and compare it.

    Args:
        images, captions: PIL images, and captions as open_clip cleans them.
        from_images: image_features of these by transformers, whose image processor is used here as well.
        expected: open_clip's outputs.

    Returns:
        image_features, text_features: the largest differences from transformers and from open_clip. norm: the
        largest difference of a feature's length from 1.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    image_features, text_features = (
        torch.from_numpy(model.encode(inputs, show_progress_bar=False)) for inputs in (images, captions)
    )
    lengths = torch.cat([image_features, text_features]).norm(dim=1)
    return {
        "image_features": max_difference(image_features, from_images),
        "text_features": max_difference(text_features, expected.text_features),
        "norm": max_difference(lengths, torch.ones_like(lengths)),
    }
