"""What each ingredient of the recipe is worth: the same base, pairs and steps with and without it, beside
open_clip_train.

    python -m benchmarks.quality --out OUT           three seeds: an hour and a half on two CPU cores
    python -m benchmarks.quality --out OUT --smoke   with a few icons, in two minutes: figures mean nothing
    python -m benchmarks.quality --out OUT --arms "ours" "ours@1e-3"   some arms; one at another learning rate

The same command continues after an interruption: the model, the result and the score of each query of an arm
are in OUT/arms/ARM-SEED.
"""

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from benchmarks import quality_data, quality_wrong
from benchmarks.quality_data import call, captions_of, is_held_out
from benchmarks.quality_table import SHOWN, page
from data_prep.atomic import atomic_file, write_json
from data_prep.cli import CONFIG
from data_prep.cores import cores
from data_prep.errors import Fault, UserError, exit_on_user_error
from data_prep.rooms import environment
from data_prep.shards import Shards
from eval.compare.wise_ft import mix
from eval.embed import Embedded, embed, embed_images, embed_texts, load_for_eval
from eval.options import Inference
from eval.retrieval.queries import read_queries
from eval.retrieval.ranking import Relevance, query_values, ranks
from eval.retrieval.robustness import degrade
from eval.retrieval.score import ExtraQueries, QueryScores, evaluate_features, evaluate_full, queries_file
from train.bench.peer import their_words
from train.data.order import Order
from train.model.clip import Clip, load
from train.recipe import Recipe, parse
from train.world import World

# What all arms have in common.
MODEL, SEED_RECIPE = "demo-vit:none", "train/recipes/spectrum_icons.yaml"
BATCH, EPOCHS, BASE_EPOCHS = 128, 8, 24
CPU = [
    "--global-batch-size",
    BATCH,
    "--micro-batch-size",
    BATCH,
    "--precision",
    "fp32",
    "--activation-checkpointing",
    "none",
    "--compile",
    "never",
    "--workers",
    0,
]
CPU += ["--save-every-minutes", 1e6, "--keep-checkpoints", 1]
BASE = [
    "--optim.lr",
    1e-3,
    "--optim.weight-decay",
    0.1,
    "--augment.color-jitter-prob",
    0,
    "--augment.gray-scale-prob",
    0,
]
BASE += ["--augment.scale", 0.7, 1, "--captions.tag-dropout", 0.5]

# The recipe: the seed's with these ingredients, named as in quality.md. Words of PLACES, and a domain before
# "=", are replaced by files in OUT.
A, SENTENCES = "A", "A's sentences"
PLACES = {A: "{}/A", "B": "{}/B", SENTENCES: "{}/A.txt"}
PLACES |= {name: "{}/" + name for name in (quality_data.WEIGHTED, *quality_wrong.PLACES)}
OURS = {
    "mates are positives": ["--same-group", "positive"],
    "all captions": ["--captions.sample", "random"],
    "tag dropout": ["--captions.tag-dropout", 0.7],
    "thumbnails": ["--augment.downscale-prob", 0.2],
    "replay": ["--replay", A, "--replay-weight", 4],
}
# What was tried beside them, and is not in the recipe. Options that did not help are deleted; their rows in
# quality.md are of the version that had them.
MORE = {
    "averaged weights": ["--ema", 0.99],
    "pull toward the base": ["--l2-sp", 30],
    "a quarter of the replay": ["--replay-weight", 1],
    "four times the replay": ["--replay-weight", 16],
    # As many pairs of B as without it, and as many of A as replay has.
    "a fifth of each batch from A": ["--data", "B=0.8", "A=0.2"],
    "a fifth of each batch from A instead of replay": ["--data", "B=0.8", "A=0.2", "--replay", ""],
    # for people who have no general pairs, in the place of A's
    "replay of its own images": ["--replay", "own"],
    "replay of its own images and A's sentences": ["--replay", "own", "--replay-texts", SENTENCES],
    "groups of equal weight": ["--data", quality_data.WEIGHTED],
    "half of the patches": ["--patch-dropout", 0.5],
}
MORE |= {
    f"{share} % of wrong captions{reviewed}": ["--data", shards.format(share)]
    for share in quality_wrong.SHARES
    for reviewed, shards in (("", quality_wrong.WRONG), (", reviewed", quality_wrong.REVIEWED))
}
# open_clip_train sees the name alone too
SEED = ["--same-group", "negative", "--captions.sample", "first"]
PEER, PEER_WARM = "open_clip_train", "open_clip_train, warm-up 5 %"
# The seed's published command left open_clip_train's warm-up of 10,000 steps in a run of about 5,700: the
# rate never arrived.
PEER_WARMUP = {PEER: 10_000 / 5_700, PEER_WARM: 0.05}
ARMS = {
    PEER: None,
    PEER_WARM: None,
    "the seed's recipe": SEED,
    "ours": [*SEED, *itertools.chain(*OURS.values())],
    **{
        f"ours without {name}": [*SEED, *itertools.chain(*(OURS[other] for other in OURS if other != name))]
        for name in OURS
    },
    **{
        f"ours with {name}": [*SEED, *itertools.chain(*OURS.values()), *words] for name, words in MORE.items()
    },
}
DEFAULT = tuple(name for name in ARMS if not name.startswith("ours with "))
WITH_CURVE = (
    "the seed's recipe",
    "ours",
    "ours with a quarter of the replay",
    "ours with four times the replay",
    "ours with replay of its own images",
    "ours with replay of its own images and A's sentences",
)
SOUP = "soup of "  # NAME: the mean of the weights of its seeds
# The best on validation of 3e-4 and 1e-3, for ours of 2e-3 too; see --arms "ours@2e-3".
RATES = {PEER: 3e-4, PEER_WARM: 3e-4, "the seed's recipe": 3e-4, "ours": 1e-3}

DEGRADED = (("resample", 4), ("blur", 0.04), ("crop", 0.7))
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # of the tuned weights, in mixtures with the base's
INFERENCE = Inference(batch_size=128, workers=0)


def main(
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: tuple[str, ...] = DEFAULT,
    packages: Path | None = None,
    ground: quality_data.Ground = "icons",
    epochs: int = EPOCHS,
    jobs: int = 0,
    smoke: bool = False,
) -> None:
    """Make the data, train the base, train and evaluate the arms, and write OUT/quality.md.

    Args:
        out: Folder for everything; the same command continues with what is there.
        arms: Of the table at the top of this file; NAME@RATE has another learning rate. Those called "ours
            with" are only trained where they are named. "soup of NAME" is the mean of its seeds' weights.
        packages: Folder of the npm packages with synonyms, and for clipart of Debian's with images; else npm
            and apt-get fetch them to OUT/packages.
        ground: icons, black on white, or clipart, images in colour.
        epochs: Of an arm; another number needs another OUT, whose data and base may be links to those of this
            one.
        jobs: Arms at a time, one thread each; 0 is one per core.
        smoke: A few icons and one epoch.
    """
    for arm in arms:
        if arm.removeprefix(SOUP).partition("@")[0] not in ARMS:
            raise UserError(f"--arms {arm!r}: no such arm; there are {', '.join(map(repr, ARMS))}")
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    quality_data.make(out, packages, limit=1500 if smoke else 0, ground=ground)
    epochs = 1 if smoke else epochs
    trained = dict.fromkeys(arm.removeprefix(SOUP) for arm in arms)
    folders = {arm: [folder_of(out, arm, seed) for seed in seeds] for arm in trained}
    base(out, 1 if smoke else BASE_EPOCHS)
    words = {word for arm in trained for word in ARMS[arm.partition("@")[0]] or ()}
    if quality_data.WEIGHTED in words:
        quality_data.weigh(out, ground)
    if words.intersection(quality_wrong.PLACES):
        quality_wrong.make(out, ground)
    os.environ["OMP_NUM_THREADS"] = "1"  # two arms at once, with a thread each, are faster than one with two
    with concurrent.futures.ProcessPoolExecutor(
        jobs or cores(), multiprocessing.get_context("spawn")
    ) as pool:
        done = {
            pool.submit(one, out, folder_of(out, *key), *key, epochs): key
            for key in itertools.product(trained, seeds)
        }
        for future in concurrent.futures.as_completed(done):
            print(f"{done[future][0]}, seed {done[future][1]}: {future.result()}", flush=True)
    for arm in (arm for arm in arms if arm.startswith(SOUP)):
        seeds_of = folders[name := arm.removeprefix(SOUP)]
        folders[arm] = [soup(out, folder_of(out, arm, *seeds), seeds_of, name in WITH_CURVE)]
    results = {arm: [folder / "result.json" for folder in each] for arm, each in folders.items()}
    found = {arm: [QueryScores.load(queries_file(file)) for file in each] for arm, each in results.items()}
    curves = {arm: [json.loads(file.read_text())["curve"] for file in each] for arm, each in results.items()}
    text = page({"base": [QueryScores.load(queries_file(out / "base" / "result.json"))], **found}, curves)
    (out / "quality.md").write_text(text, encoding="utf-8")
    print(text)


def folder_of(out: Path, arm: str, *seeds: int) -> Path:
    return out / "arms" / "-".join((arm.replace(" ", "_"), *map(str, seeds)))


def base(out: Path, epochs: int) -> None:
    """Train the model that all arms begin with on domain A, to OUT/base/model, and evaluate it.

    OUT/A.txt gets A's captions.
    """
    if not (out / "A.txt").is_file():
        with atomic_file(out / "A.txt") as partial:
            partial.write_text("\n".join(sorted(captions_of(out / "A", "train"))) + "\n", encoding="utf-8")
    folder = out / "base"
    if not (folder / "model").is_dir():
        call(
            "train",
            "--model",
            MODEL,
            "--data",
            out / "A",
            "--run",
            folder / "run",
            "--epochs",
            epochs,
            *CPU,
            *BASE,
        )
        keep(load(str(folder / "run")), folder / "model")
    if not (folder / "result.json").is_file():
        judge(out, folder, with_curve=False)


def one(out: Path, folder: Path, arm: str, seed: int, epochs: int) -> str:
    """Train and evaluate an arm; its figures in a line."""
    name, _, rate = arm.partition("@")
    lr = float(rate) if rate else RATES.get(name, RATES["ours"])
    if not (folder / "model").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        shared = [
            SEED_RECIPE,
            "--model",
            f"local-dir:{out / 'base' / 'model'}",
            "--data",
            out / "B",
            "--run",
            folder / "run",
        ]
        shared += ["--epochs", epochs, "--optim.lr", lr, "--seed", seed, *CPU]
        if ARMS[name] is None:
            theirs(parse(list(map(str, shared))), PEER_WARMUP[name], folder)
        else:
            call("train", *shared, *words_of(name, out))
            if (state := json.loads((folder / "run" / "status.json").read_text())["state"]) != "finished":
                raise Fault(f"{folder / 'run'}: {state} before its end; run the same command again")
            keep(load(str(folder / "run")), folder / "model")
            shutil.rmtree(folder / "run" / "checkpoints")
    if not (folder / "result.json").is_file():
        judge(out, folder, with_curve=name in WITH_CURVE)
    figures = json.loads((folder / "result.json").read_text())["figures"]
    return ", ".join(f"{measure} {100 * value:.1f}" for measure, value in figures.items())


def words_of(arm: str, out: Path) -> list[str]:
    """The flags of an arm, with words of PLACES, alone or before "=", replaced."""
    words = []
    for word in map(str, ARMS[arm]):
        place, equals, share = word.partition("=")
        words.append(f"{PLACES[place].format(out)}{equals}{share}" if place in PLACES else word)
    return words


def soup(out: Path, folder: Path, seeds: list[Path], with_curve: bool) -> Path:
    """Evaluate the mean of an arm's weights over its seeds (a uniform soup, Wortsman et al. 2022,
    arXiv:2203.05482); the folder.
    """
    if not (folder / "model").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        mean, *others = (load(f"local-dir:{each / 'model'}") for each in seeds)
        for count, clip in enumerate(others, 2):
            mean = mix(mean, clip, 1 / count)
        keep(mean, folder / "model")
    if not (folder / "result.json").is_file():
        judge(out, folder, with_curve)
    return folder


def theirs(recipe: Recipe, warmup: float, folder: Path) -> None:
    """Train the base by open_clip_train with the recipe's flags, over as many pairs, to FOLDER/model."""
    order = Order(Shards(recipe.data, "train").shard_sizes, recipe.global_batch_size, recipe.seed)
    words = their_words(recipe, order.steps_per_epoch, torch.device("cpu"))
    more = {
        "epochs": recipe.epochs,
        "warmup": round(warmup * recipe.epochs * order.steps_per_epoch),
        "workers": 0,
    }
    more |= {"logs": folder, "name": "theirs", "save-frequency": recipe.epochs}
    words += [str(word) for flag, value in more.items() for word in (f"--{flag}", value)]
    shutil.rmtree(folder / "theirs", ignore_errors=True)  # it does not write where it wrote before
    done = subprocess.run(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise Fault(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout[-2000:]}")
    checkpoint = folder / "theirs" / "checkpoints" / f"epoch_{recipe.epochs}.pt"
    clip = load(recipe.model)
    clip.towers.model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    keep(clip, folder / "model")
    checkpoint.unlink()


def keep(clip: Clip, folder: Path) -> None:
    """Write a model; its folder gets its name when it is whole."""
    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    clip.save(partial)
    partial.rename(folder)


def judge(out: Path, folder: Path, with_curve: bool) -> None:
    """Evaluate FOLDER/model: FOLDER/result.json, and beside it the score of each query."""
    world, clip = World(), load_for_eval(f"local-dir:{folder / 'model'}", INFERENCE, World())
    learned, known, val = Shards(out / "B", "test"), Shards(out / "A", "test"), Shards(out / "B", "val")
    embedded = embed(clip, learned, world, INFERENCE)
    asked = read_queries(out / "questions.jsonl", learned)
    text_features = embed_texts(clip, asked.texts, world, INFERENCE)
    extra = ExtraQueries(text_features, asked.query_of, asked.image_of)
    found, each = evaluate_full(embedded, learned.groups, world, extra)
    values = {name: each.values[f"{name}/R@1"] for name in each.groups}
    groups = dict(each.groups)
    new = np.array([is_held_out(text) for text in asked.texts])
    values["new_words"], groups["new_words"] = (
        values["queries_to_image"][new],
        groups["queries_to_image"][new],
    )
    values["degraded"], groups["degraded"] = degraded(clip, learned, embedded), learned.groups
    _, old = evaluate_full(embed(clip, known, world, INFERENCE), known.groups, world)
    for name in ("image_to_text", "text_to_image"):
        values[f"A_{name}"], groups[f"A_{name}"] = old.values[f"{name}/R@1"], old.groups[name]
    queries = QueryScores({f"{name}/R@1": one for name, one in values.items()}, groups)
    on_val = evaluate_features(embed(clip, val, world, INFERENCE), val.groups, world)["metrics"]["mean/R@1"]
    figures = {title: float(pooled(queries)[0].mean()) for title, pooled in SHOWN.items()}
    queries.save(queries_file(folder / "result.json"))
    points = curve(out, clip, learned, known) if with_curve else []
    write_json(
        folder / "result.json",
        {"figures": {"B val": on_val, **figures}, "metrics": found["metrics"], "curve": points},
    )


def degraded(clip: Clip, shards: Shards, embedded: Embedded) -> np.ndarray:
    """Of each image, the share of its DEGRADED versions that find an image of its group first: float
    [n_images].
    """
    to_image = Relevance(shards.groups, np.arange(len(shards)), shards.groups)
    hits = []
    for kind, level in DEGRADED:
        features = embed_images(clip, shards, World(), INFERENCE, change=degrade(kind, level))
        hits.append(query_values(ranks(features, embedded.image_features, to_image)[0])["R@1"])
    return np.mean(hits, axis=0)


def curve(out: Path, tuned: Clip, learned: Shards, known: Shards) -> list[dict]:
    """R@1 on B's and A's test splits (the mean of both directions) of mixtures with the base's weights."""
    world, points = World(), []
    first = load_for_eval(f"local-dir:{out / 'base' / 'model'}", INFERENCE, world)
    for share in SHARES:
        clip, on = mix(first, tuned, share), {}
        for name, shards in (("B", learned), ("A", known)):
            on[name] = evaluate_features(embed(clip, shards, world, INFERENCE), shards.groups, world)[
                "metrics"
            ]["mean/R@1"]
        points.append({"share": share, **on})
    return points


if __name__ == "__main__":
    import tyro

    exit_on_user_error(lambda: tyro.cli(main, config=CONFIG))
