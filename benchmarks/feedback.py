"""What marks of search results are worth, and what wrong ones cost: three rounds of simulated users.

    python -m benchmarks.feedback --data data/icons --out OUT

Half of the training groups have captions that say nothing: the names of their files, at weight 0. Users know
what the icons are called. In each round they search the training images with the current model, as the page
does: a sentence is the true caption of an image, and of its results (the first of each group) the first
image of the sentence's group is marked right, and the first other image wrong. `--noise` is the share of
marks that are swapped: of a wrong image as right, of a right one as wrong. Marks go through HTTP to `eval
serve --feedback`, then `data_prep build --feedback` makes shards of all marks so far, and training continues
from the current model on them, with replay. The control trains as much without marks.

The same command continues after an interruption.
"""

import contextlib
import csv
import http.client
import importlib
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import tyro

from benchmarks.serve import started
from data_prep.atomic import write_json
from data_prep.cli import CONFIG
from data_prep.errors import exit_on_user_error
from data_prep.marks import RIGHT, WRONG
from data_prep.progress import progress
from data_prep.shards import Shards
from data_prep.sheets import write_csv
from data_prep.tables import markdown_table
from eval.retrieval.intervals import Difference, paired_difference
from eval.retrieval.score import QueryScores, queries_file
from eval.search.index import open_index
from eval.search.nearest import Nearest
from eval.search.query import text_query

RECIPE, BASE_EPOCHS = "train/recipes/demo.yaml", 8
VAL, TEST, HIDDEN = 0.1, 0.4, 0.5  # of all groups, and of the others
K = 24  # results that the page shows
GUARD = "with --wise-ft 0"
CONTROL, QUERIES = "no marks", "text_to_image"
COLUMNS = ["file_path", "caption", "group", "split", "weight"]
READ = ["--image-column", "file_path", "--caption-column", "caption", "--group-column", "group"]


def main(
    data: Path,
    out: Path,
    noise: tuple[float, ...] = (0.0, 0.1, 1.0),
    guarded: tuple[float, ...] = (1.0,),
    rounds: int = 3,
    sentences: int = 2000,
    epochs: int = 2,
    lr: float = 3e-4,
    seed: int = 0,
) -> None:
    """Print the tables.

    Args:
        data: Folder of `python -m data_prep icons`.
        out: Folder to write.
        noise: Shares of marks that are swapped.
        guarded: Shares that are tried once more, with `--wise-ft 0`: what is worse on val is not taken.
        sentences: Of each round.
        epochs, lr: Of the training of each round.
        seed: Of what is hidden, of sentences and of noise.
    """
    data, out = data.absolute(), out.absolute()
    truth = make(data, out, seed)
    kept = ["--keep-splits", out / "shards"]
    training = ["--epochs", epochs, "--optim.lr", lr]
    arms = {f"{share:.0%} of marks are wrong": share for share in noise}
    arms |= {f"{share:.0%}, {GUARD}": share for share in guarded}
    found = {}
    for name in (CONTROL, *arms):
        model, folder = out / "base", out / re.sub(r"\W+", "-", name)
        guard = ["--wise-ft", 0] if name.endswith(GUARD) else []
        for number in range(rounds):
            place = folder / str(number)
            if not (place / "test.json").is_file():
                feedback: list = []
                if name in arms:
                    feedback = ["--feedback", mark(truth, model, place, arms[name], sentences, number, seed)]
                build = [out / "pairs.csv", "--out", place / "shards", "--images", data, *READ, "--overwrite"]
                call("data_prep", "build", *build, "--weight-column", "weight", *feedback, *kept)
                run = ["--model", model, "--data", place / "shards", "--run", place / "run", "--seed", number]
                call("train", RECIPE, *run, "--replay", "own", "--workers", 1, *training, *guard)
                measure(place / "run", out, place / "test.json")
            model = place / "run"
            found[name, number] = place
    print(results(out, found, rounds))
    print(f"\n{marked(found, arms)}")
    models = {"before": out / "base", **{name: found[name, rounds - 1] / "run" for name in (CONTROL, *arms)}}
    print(f"\n{unasked(truth, models, out, sentences * rounds, seed)}")


def make(data: Path, out: Path, seed: int) -> dict[str, str]:
    """The tables, shards and base model in OUT.

    Returns:
        The group of each training image, by its path.
    """
    with open(data / "icons.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rng, chosen = np.random.default_rng(seed), {}
    for group in sorted({row["group"] for row in rows}):
        drawn = rng.random()
        split = "val" if drawn < VAL else "test" if drawn < VAL + TEST else "train"
        chosen[group] = split, split == "train" and rng.random() < HIDDEN
    if not (out / "base" / "test.json").is_file():
        tables = defaultdict(list)
        for row in rows:
            split, is_hidden = chosen[row["group"]]
            full = [row["file_path"], row["caption"], row["group"], split, 1]
            tables["all"].append(full)
            if is_hidden:
                name = f"image {len(tables['pairs']):05d}"  # as cameras and exports name files
                tables["pairs"].append([row["file_path"], name, row["group"], split, 0])
            else:
                tables["pairs"].append(full)
                tables["known"].append(full)
        out.mkdir(parents=True, exist_ok=True)
        for name, lines in tables.items():
            write_csv(out / f"{name}.csv", COLUMNS, lines)
        for table, shards in (("pairs", "shards"), ("known", "known")):
            build = [out / f"{table}.csv", "--out", out / shards, "--images", data, *READ, "--overwrite"]
            call("data_prep", "build", *build, "--split-column", "split", "--weight-column", "weight")
        base = ["--data", out / "known", "--run", out / "base", "--epochs", BASE_EPOCHS, "--workers", 1]
        call("train", RECIPE, *base)
        measure(out / "base", out, out / "base" / "test.json")
    return {row["file_path"]: row["group"] for row in rows if chosen[row["group"]][0] == "train"}


def call(room: str, *words) -> None:
    """Run a command in this process, which has imported torch; what it prints is above the tables."""
    sys.argv = [room, *map(str, words)]
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(f"{room}.__main__").main()


def measure(run: Path, out: Path, result: Path) -> None:
    call("eval", "retrieval", run, "--data", out / "shards", "--split", "test", "--json", result)


def mark(
    truth: dict[str, str], model: Path, place: Path, noise: float, n: int, number: int, seed: int
) -> Path:
    """Search with n sentences and mark the results.

    Args:
        truth: The group of each training image, by its path.
        model: That searches.
        place: Folder of the round.
        noise: Share of marks that are swapped.

    Returns:
        The file of marks, of this and of earlier rounds.
    """
    out = place.parent.parent
    index, marks = model / "index", place.parent / "marks.jsonl"
    place.mkdir(parents=True, exist_ok=True)
    embed(model, out)
    groups = groups_of_texts(out)
    texts = drawn(groups, seed)[n * number : n * (number + 1)]
    rng, counts = np.random.default_rng([seed, number, round(100 * noise)]), Counter()
    with started(index, "--feedback", marks) as (_, host):
        connection = http.client.HTTPConnection(host, timeout=120)
        for text in progress(texts, desc="searching", unit="sentence"):
            answer = ask(connection, "/api/search", text=text, k=K)
            hits = [hit["number"] for hit in answer["results"][0]]
            is_right = [truth[answer["images"][str(hit)]["path"]] in groups[text] for hit in hits]
            counts["found"] += any(is_right)
            for word, other in ((RIGHT, WRONG), (WRONG, RIGHT)):
                for hit, is_one in zip(hits, is_right, strict=True):
                    if is_one == (word == RIGHT):
                        said = other if rng.random() < noise else word
                        ask(connection, "/api/mark", text=text, number=hit, column=0, mark=said)
                        counts[said, word] += 1
                        break
    write_json(place / "marks.json", {"sentences": len(texts), "found": counts["found"]})
    return marks


def embed(model: Path, out: Path) -> None:
    """Make the index of the training images, in the run, unless it is there."""
    if not (model / "index").is_dir():
        call("eval", "embed", model, "--data", out / "shards", "--out", model / "index", "--split", "train")


def groups_of_texts(out: Path) -> dict[str, set[str]]:
    """The groups of training images that each true caption has."""
    groups = defaultdict(set)
    with open(out / "all.csv", newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            if row["split"] == "train":
                groups[row["caption"]].add(row["group"])
    return groups


def drawn(groups: dict[str, set[str]], seed: int) -> list[str]:
    """All sentences, in the order in which they are asked."""
    return np.random.default_rng(seed).permutation(sorted(groups)).tolist()


def found_of_unasked(truth: dict[str, str], model: Path, out: Path, asked: int, seed: int) -> np.ndarray:
    """Of the sentences that no round asked, in the training images: whether an image of the group is first,
    and among the first ten; float [sentences, 2].
    """
    embed(model, out)
    index, groups = open_index(model / "index"), groups_of_texts(out)
    texts = drawn(groups, seed)[asked:]
    hits = Nearest(index).top(text_query(index.model(), texts), 10)
    is_right = [
        [truth[index.paths[hit.number]] in groups[text] for hit in of_text]
        for text, of_text in zip(texts, hits, strict=True)
    ]
    return np.maximum.accumulate(np.array(is_right, float), axis=1)[:, [0, -1]]


def ask(connection: http.client.HTTPConnection, path: str, **fields) -> dict:
    connection.request("POST", path, json.dumps(fields), {"content-type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status == 200, data
    return json.loads(data)


def results(out: Path, found: dict[tuple[str, int], Path], rounds: int) -> str:
    """R@1, text to image on test, after each round; and the last one's difference from the control."""
    base, lines = scores(out / "base"), []
    for name in dict.fromkeys(name for name, _ in found):
        of_rounds = [scores(found[name, number]) for number in range(rounds)]
        last, control = of_rounds[-1], scores(found[CONTROL, rounds - 1])
        cells = [f"{100 * each.values[f'{QUERIES}/R@1'].mean():.1f}" for each in (base, *of_rounds)]
        for metric in ("R@1", "R@10"):
            key = f"{QUERIES}/{metric}"
            change = paired_difference(control.values[key], last.values[key], last.groups[QUERIES])
            cells.append("" if name == CONTROL else points(change))
        lines.append([name, *cells])
    columns = ["marks", "before", *(f"round {number + 1}" for number in range(rounds))]
    return markdown_table([*columns, "R@1, from no marks", "R@10, from no marks"], lines)


def marked(found: dict[tuple[str, int], Path], arms: dict[str, float]) -> str:
    """What the marks changed: captions of the training images after each round, and how many are true."""
    lines = []
    for name, number in found:
        if name not in arms:
            continue
        place = found[name, number]
        counts = json.loads((place / "marks.json").read_text())
        decisions = json.loads((place / "shards" / "report.json").read_text())["decisions"]
        n_true, n_false = captions_of(place / "shards", place.parent.parent / "all.csv")
        lines.append(
            [
                name,
                str(number + 1),
                f"{100 * counts['found'] / counts['sentences']:.0f}",
                *(str(decisions[action]) for action in ("add", "remove")),
                str(n_true),
                str(n_false),
            ]
        )
    columns = ["marks", "round", f"an image of the group among {K}, %", "captions added", "removed"]
    return markdown_table([*columns, "true captions", "false ones"], lines)


def unasked(truth: dict[str, str], models: dict[str, Path], out: Path, asked: int, seed: int) -> str:
    """R@1 and R@10 in the training images, of the sentences that no round asked."""
    scores = {name: found_of_unasked(truth, model, out, asked, seed) for name, model in models.items()}
    lines, control, groups = [], scores[CONTROL], groups_of_texts(out)
    names = [min(groups[text]) for text in drawn(groups, seed)[asked:]]
    clusters = np.unique(names, return_inverse=True)[1]
    for name, own in scores.items():
        cells = [f"{100 * own[:, 0].mean():.1f}", f"{100 * own[:, 1].mean():.1f}"]
        for metric in (0, 1):
            change = paired_difference(control[:, metric], own[:, metric], clusters)
            cells.append("" if name == CONTROL else points(change))
        lines.append([name, *cells])
    columns = ["marks", "R@1", "R@10", "R@1, from no marks", "R@10, from no marks"]
    return f"{len(control)} sentences\n\n{markdown_table(columns, lines)}"


def points(change: Difference) -> str:
    return f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def captions_of(shards: Path, table: Path) -> tuple[int, int]:
    """The training captions of weight 1 that are one of the image's group, and those that are none."""
    groups, group_of = defaultdict(set), {}
    with open(table, newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            groups[row["group"]].add(row["caption"])
            group_of[row["file_path"]] = row["group"]
    train, counts = Shards(shards, "train"), Counter()
    for number in range(len(train)):
        meta = train.meta(number)
        for caption in meta["captions"]:
            if not caption.startswith("image "):
                counts[caption in groups[group_of[meta["image"]]]] += 1
    return counts[True], counts[False]


def scores(place: Path) -> QueryScores:
    return QueryScores.load(queries_file(place / "test.json"))


if __name__ == "__main__":
    exit_on_user_error(lambda: tyro.cli(main, config=CONFIG))
