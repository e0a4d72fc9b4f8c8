"""What the crops of training cost: the same fine-tuning with the smallest crop at all, 0.7 and 0.5 of the
image, evaluated on whole images.

    apt-get download openclipart-png tuxpaint-stamps-default && for p in *.deb; do dpkg -x $p images; done
    python -m benchmarks.crop --images images --base runs/demo --out OUT

Two tasks: `pairs`, retrieval with captions of file names and folders, and `classes`, the folders with at
least 20 images as class names, zero-shot on other images of them. The base is a run of `make demo`. Finished
arms are skipped when the command is repeated.
"""

import csv
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import tyro

from data_prep.tables import markdown_table

SCALES, SEEDS = (1.0, 0.7, 0.5), (0, 1)
EPOCHS, LR = 8, 5e-4
LEAST_IMAGES, TRAIN_SHARE = 20, 3 / 4  # of a class


def tables(images: Path, out: Path) -> None:
    """Write pairs.csv, classes.csv and labelled.csv."""
    rows = []
    for path in sorted(images.rglob("*.png")):
        words = [part.replace("_", " ") for part in path.relative_to(images).parts[:-1]]
        folder = " ".join(words[words.index("png") + 1 :]) if "png" in words else words[-1]
        text = path.with_suffix(".txt")
        stem = re.sub(r"[\d_-]+", " ", path.stem).strip()
        caption = (
            text.read_text(errors="replace").partition("\n")[0] if text.is_file() else f"{stem}, {folder}"
        )
        if stem and "special" not in folder and "stars" not in folder:  # patterns and stars without names
            rows.append((path.absolute(), caption, folder))
    sizes = Counter(folder for *_, folder in rows)
    labelled = [(path, folder) for path, _, folder in rows if sizes[folder] >= LEAST_IMAGES]
    random.Random(0).shuffle(labelled)
    n_train = int(len(labelled) * TRAIN_SHARE)
    for name, header, content in (
        ("pairs", ("image", "caption"), [row[:2] for row in rows]),
        ("classes", ("image", "caption"), labelled[:n_train]),
        ("labelled", ("image", "label"), labelled[n_train:]),
    ):
        with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *content])


def call(*words) -> None:
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def score(task: str, scale: float, seed: int, base: str, out: Path) -> list[float]:
    """Train an arm, or take the finished one: R@1 of both directions, or top-1 and mean per class."""
    run, result = out / f"{task}-{scale}-{seed}", out / f"{task}-{scale}-{seed}.json"
    if not result.is_file():
        flags = ["--epochs", EPOCHS, "--optim.lr", LR, "--augment.scale", scale, 1.0, "--seed", seed]
        call("train", "demo", "--model", base, "--data", out / task, "--run", run, *flags)
        if task == "pairs":
            call("eval", "retrieval", run, "--data", out / task, "--json", result)
        else:
            table = ["--data", out / "labelled.csv", "--images", "/", "--templates", "plain"]
            call("eval", "zeroshot", run, *table, "--json", result)
    metrics = json.loads(result.read_text())
    if task == "pairs":
        return [metrics["metrics"][f"{way}/R@1"] for way in ("image_to_text", "text_to_image")]
    return [metrics["models"][0]["metrics"][name] for name in ("top1", "mean_per_class")]


def main(images: Path, base: str, out: Path) -> None:
    """Train all arms and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "labelled.csv").is_file():
        tables(images, out)
    small = ["--images", "/", "--resize-px", 64]
    for task, splits in (("pairs", []), ("classes", ["--val", 0, "--test", 0])):
        if not (out / task).is_dir():
            call("data_prep", "build", out / f"{task}.csv", "--out", out / task, *small, *splits)
    rows = []
    for task, names in (("pairs", "R@1 image to text, text to image"), ("classes", "top-1, mean per class")):
        for scale in SCALES:
            seeds = [score(task, scale, seed, base, out) for seed in SEEDS]
            cells = [", ".join(f"{100 * value:.1f} %" for value in values) for values in seeds]
            rows.append([f"{task}: {names}", f"{scale} to 1.0", *cells])
    print(markdown_table(["task", "augment.scale", *(f"seed {seed}" for seed in SEEDS)], rows))


if __name__ == "__main__":
    tyro.cli(main)
