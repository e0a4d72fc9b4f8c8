"""What int8 weights cost: R@k with the onnxruntime files in fp32 and in int8, on images of the user's own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from train.export import to_onnx
from train.export.reference import decoded_samples, evenly, first_split
from train.metrics import DIRECTIONS
from train.model.clip import Clip

N_IMAGES = 500  # on a core, ViT-B/32 takes a minute for them, ViT-L/14 twenty
BATCH_SIZE = 32
NAMES = [f"{direction}/R@{k}" for direction in DIRECTIONS for k in (1, 5, 10)]

# (image_features [n, d], text_features [t, d], caption and group of each image) -> metrics; the texts are the
# distinct captions in order of appearance. It is eval's, which this room cannot import.
Recall = Callable[[torch.Tensor, torch.Tensor, list[str], np.ndarray], dict[str, float]]


def compare(clip: Clip, folder: Path, data: Path, recall: Recall) -> dict:
    """R@k of both files of each tower, among the same images.

    Args:
        folder: with the files of to_onnx.write().
        data: shards.

    Returns:
        n_images, fp32 and int8 ({name: value} of NAMES), and min_cosine, the smallest between the features of
        an image or a text.
    """
    shards = first_split(data)
    numbers = evenly(len(shards), N_IMAGES)
    samples = [shards.read(number) for number in numbers]
    captions = [sample.captions[0] for sample in samples]
    images = torch.stack([clip.preprocess(image) for image in decoded_samples(shards, numbers)])
    images = images.split(BATCH_SIZE)
    texts = clip.tokenizer(list(dict.fromkeys(captions))).split(BATCH_SIZE)
    result, features = {"n_images": len(samples)}, []
    for name, suffix in (("fp32", ""), ("int8", to_onnx.QUANTIZED)):
        features.append(to_onnx.features(folder, images, texts, suffix))
        metrics = recall(*features[-1], captions, shards.groups[numbers])
        result[name] = {metric: metrics[metric] for metric in NAMES}
    cosines = [(one * other).sum(dim=1).min().item() for one, other in zip(*features, strict=True)]
    return {**result, "min_cosine": min(cosines)}


def sentence(measured: dict) -> str:
    """The loss in R@k, both directions."""
    changes = []
    for direction in DIRECTIONS:
        losses = [
            f"{100 * (measured['int8'][f'{direction}/R@{k}'] - measured['fp32'][f'{direction}/R@{k}']):+.1f}"
            for k in (1, 5, 10)
        ]
        changes.append(f"{direction.replace('_', ' ')} R@1, 5, 10 {', '.join(losses)} points")
    return (
        f"int8 weights (onnx/*_quantized.onnx) change {'; '.join(changes)} among {measured['n_images']}"
        f" images; the cosine to fp32 is at least {measured['min_cosine']:.4f}"
    )
