"""Several models on the same data before training: as they are, and with fitted projections.

train (a part), val -> embed -> evaluate_full                  zero-shot
                             -> projections.fit -> evaluate_full   after the fit
"""

import time
from dataclasses import replace

import numpy as np
import torch

from data_prep.shards import Shards
from data_prep.tables import Table, counted, percent
from eval.bases.projections import Pairs, fit
from eval.embed import embed, embed_images, embed_texts, load_for_eval
from eval.options import Inference
from eval.retrieval.intervals import mean_interval, paired_difference
from eval.retrieval.score import QueryScores, evaluate_full, pooled
from train.metrics import CHANCE, DIRECTIONS
from train.model.clip import Clip
from train.world import World

FASTER = 1.2  # a ratio of rates that is worth a word
SHOWN = ("zero_shot", "fitted")


def evaluate_base(
    model: str, train: Shards, val: Shards, max_images: int, inference: Inference, world: World
) -> tuple[dict, dict[str, QueryScores]]:
    """One model's figures, and what each query scores, both by SHOWN."""
    clip = load_for_eval(model, inference, world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    start = time.perf_counter()
    embedded = embed(clip, val, world, inference)
    pairs, _ = features_of_pairs(clip, train, max_images, world, inference)
    embed_s, start = time.perf_counter() - start, time.perf_counter()
    tuned = fit(pairs)
    fit_s = time.perf_counter() - start
    fitted = replace(
        embedded,
        image_features=tuned.images(embedded.image_features),
        text_features=tuned.texts(embedded.text_features),
    )
    figures, scores = {}, {}
    for name, features in zip(SHOWN, (embedded, fitted), strict=True):
        figures[name], scores[name] = evaluate_full(features, val.groups, world)
    n_images = len(val) + len(pairs.groups)
    result = {
        "model": model,
        "weights_sha256": clip.fingerprint(),
        "n_parameters": sum(parameter.numel() for parameter in clip.towers.parameters()),
        "image_size_px": list(clip.image_size),
        "embed_images_per_s": n_images / embed_s,
        "n_train_images": len(pairs.groups),
        "fit_s": fit_s,
        "fit_steps": tuned.steps,
        **figures,
    }
    if world.device.type == "cuda":
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated(world.device) / 1e9
    return result, scores


def features_of_pairs(
    clip: Clip,
    shards: Shards,
    max_images: int,
    world: World,
    inference: Inference,
    text_clip: Clip | None = None,
) -> tuple[Pairs, np.ndarray]:
    """Features of up to `max_images` images of a split, drawn without regard to their order, and of all their
    captions; and the images' sample numbers, int64 [n_images].

    Args:
        text_clip: the model of the captions, if it is another one.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(shards))[:max_images])
    number_of: dict[str, int] = {}
    texts = [
        [number_of.setdefault(caption, len(number_of)) for caption in shards.captions(number)]
        for number in chosen.tolist()
    ]
    images = embed_images(clip, shards, world, inference, numbers=chosen.tolist())
    text_features = embed_texts(text_clip or clip, list(number_of), world, inference)
    return Pairs(images, text_features, texts, shards.groups[chosen]), chosen


def rank_bases(results: list[dict], scores: list[dict[str, QueryScores]]) -> dict:
    """The models by R@1 after the fit, the best first; each with intervals and its paired difference from the
    best.
    """
    order = sorted(range(len(results)), key=lambda at: -results[at]["fitted"]["metrics"]["mean/R@1"])
    best, bases = pooled(scores[order[0]]["fitted"], *DIRECTIONS), []
    for at in order:
        samples = {name: pooled(scores[at][name], *DIRECTIONS) for name in SHOWN}
        figures = {f"{name}_R@1": list(mean_interval(*sample)) for name, sample in samples.items()}
        difference = list(paired_difference(best[0], *samples["fitted"])) if at != order[0] else None
        bases.append(results[at] | figures | {"from_best": difference})
    return {"bases": bases}


def parts(result: dict) -> list[str | Table]:
    """The table, and what to read from it."""
    bases, rows = result["bases"], []
    with_memory = any("peak_memory_gb" in base for base in bases)
    for base in bases:
        cells = [base["model"], *(interval(base[f"{name}_R@1"]) for name in SHOWN)]
        cells.append(interval(base["from_best"][:3], "+") if base["from_best"] else "")
        cells += [f"{base['n_parameters'] / 1e6:,.1f}", f"{base['embed_images_per_s']:,.0f}"]
        rows.append([*cells, f"{base['peak_memory_gb']:.1f}"] if with_memory else cells)
    titles = ["base", "R@1 %", "R@1 % fitted", "from the best", "million parameters", "images/s"]
    titles += ["peak GB"] * with_memory
    first = bases[0]
    by_chance = np.mean([first["zero_shot"]["metrics"][f"{CHANCE}{name}/R@1"] for name in DIRECTIONS])
    return [
        f"R@1 on {result['data']}, the mean of both directions, with 95 % intervals (chance:"
        f" {percent(by_chance)} %): as it is, and with two matrices fitted to the features of"
        f" {counted(first['n_train_images'], 'training image')}.",
        Table(titles, rows),
        verdict(bases),
    ]


def verdict(bases: list[dict]) -> str:
    """Which base to take: the best, and those that cannot be told from it and are faster."""
    first, *others = bases
    if not others:
        return "One model cannot be ranked: name the others that you consider."
    near = [base for base in others if base["from_best"][2] >= 0]
    text = f"Start with {first['model']}."
    faster = [base for base in near if base["embed_images_per_s"] > FASTER * first["embed_images_per_s"]]
    if faster:
        base = max(faster, key=lambda base: base["embed_images_per_s"])
        ratio = base["embed_images_per_s"] / first["embed_images_per_s"]
        text += f" {base['model']} cannot be told from it on this data, and is {ratio:.1f} times as fast."
    elif near:
        text += f" On this data it cannot be told from {', '.join(base['model'] for base in near)}."
    return text


def interval(values: list[float], sign: str = "") -> str:
    """ "12.3 [10.1, 14.6]", in percent."""
    value, low, high = (f"{100 * each:{sign}.1f}" for each in values)
    return f"{value} [{low}, {high}]"
