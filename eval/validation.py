"""What training and export measure with: retrieval as eval computes it, on the val split and the retention
set.
"""

import numpy as np
import torch

from data_prep.shards import Shards, read_manifest
from data_prep.store.remote import place_of
from eval.embed import Captions, Embedded, embed, load_for_eval
from eval.options import Inference
from eval.retrieval.robustness import center_crop_gain
from eval.retrieval.score import evaluate_features, evaluate_full, metric_names, pooled
from train.data.shares import first_of
from train.device import own_device
from train.metrics import CROP_GAIN, CROP_GAIN_LOW, DIRECTIONS
from train.model.activation_memory import uncompiled
from train.model.clip import Clip
from train.recipe import Recipe
from train.retain.select import Validate, check_best_metric
from train.world import World

BATCH_SIZE = 64  # images at once where the recipe's micro_batch_size is auto


def validator(recipe: Recipe, world: World) -> Validate:
    """A function that gives val/... and retention/... metrics of a model; none of shards without a val split.

    Shards without a hash per sample are hashed here, by each rank its part.

    Raises:
        UserError: shards were altered, or best_metric is not computed.
    """
    splits, data = {}, first_of(recipe.data)
    if has_split(data, "val"):
        splits["val"] = Shards(data, "val")
        if recipe.retention_set:
            name = "val" if has_split(recipe.retention_set, "val") else "test"
            splits["retention"] = Shards(recipe.retention_set, name)
    for shards in splits.values():
        shards.verify(world.rank, world.world_size)
    check_best_metric(recipe, [f"{name}/{metric}" for name in splits for metric in metric_names()])

    @uncompiled()
    def validate(clip: Clip, world: World) -> dict[str, float]:
        size = BATCH_SIZE if recipe.micro_batch_size == "auto" else recipe.micro_batch_size
        inference, metrics = Inference(size, recipe.workers), {}
        for name, shards in splits.items():
            embedded = embed(clip, shards, world, inference)
            result = evaluate_features(embedded, shards.groups, world)["metrics"]
            if name == "val":
                gain = center_crop_gain(clip, shards, embedded, world, inference)
                result |= {CROP_GAIN: gain.value, CROP_GAIN_LOW: gain.low}
            metrics |= {
                f"{name}/{metric}": value
                for metric, value in result.items()
                if not metric.startswith("chance/")
            }
        return metrics

    return validate


def val_hits(run: str, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """What each query of the val split scores with a run's best weights, float [n], so weighted that the mean
    is val/mean/R@1; and its group, int64 [n].
    """
    world = World(device=own_device())
    size = BATCH_SIZE if recipe.micro_batch_size == "auto" else recipe.micro_batch_size
    inference = Inference(size, recipe.workers, recipe.precision)
    shards = Shards(first_of(recipe.data), "val")
    clip = load_for_eval(run, inference, world)
    _, queries = evaluate_full(embed(clip, shards, world, inference), shards.groups, world)
    return pooled(queries, *DIRECTIONS)


def has_split(data: str, split: str) -> bool:
    return bool(read_manifest(place_of(data))["splits"].get(split, {}).get("samples"))


def features_metrics(
    images: torch.Tensor, texts: torch.Tensor, captions: list[str], groups: np.ndarray
) -> dict[str, float]:
    """evaluate()'s metrics for features that were computed elsewhere, as an export's are.

    Args:
        images: image_features [n, d], L2-normed.
        texts: text_features of the distinct captions, in order of appearance.
        captions, groups: of each image.
    """
    number_of = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    text_of = np.array([number_of[caption] for caption in captions])
    numbered = Captions(list(number_of), text_of, text_of, groups, np.arange(len(images)))
    return evaluate_features(Embedded(images, texts, numbered), groups, World())["metrics"]
