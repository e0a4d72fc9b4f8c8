"""`eval suspects`: planted errors come first, and what is right stays where it is."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.suspects import COLUMNS, read_suspects
from eval.bases.projections import Pairs
from eval.options import Inference
from eval.suspects.command import suspects
from eval.suspects.find import remarks
from eval.suspects.score import (
    PairFeatures,
    distances_of,
    features_of,
    hub_counts,
    knowledge,
    lemon,
    neighbours,
    numbers_of,
    same_things,
)
from train.run.records import run_trained_on

WIDTH, GROUPS, MATES = 16, 40, 4


def data_set(seed: int = 0) -> Pairs:
    """GROUPS things, MATES images of each near its caption."""
    generator = torch.Generator().manual_seed(seed)
    texts = F.normalize(torch.randn(GROUPS, WIDTH, generator=generator), dim=1)
    groups = np.repeat(np.arange(GROUPS), MATES)
    noise = torch.randn(len(groups), WIDTH, generator=generator)
    images = F.normalize(texts[torch.from_numpy(groups)] + 0.1 * noise, dim=1)
    return Pairs(images, texts, [[group] for group in groups.tolist()], groups)


def test_swapped_captions_are_the_worst():
    pairs, swapped = data_set(), [3, 50, 97, 120]
    texts = list(pairs.texts)
    for at, number in enumerate(swapped):
        texts[number] = pairs.texts[swapped[at - 1]]
    pairs = pairs._replace(texts=texts)
    numbers = numbers_of(pairs)
    features = features_of(pairs, numbers)
    worst = lemon(features, numbers.image, distances_of(features)).argsort(descending=True)[: len(swapped)]
    assert sorted(worst.tolist()) == swapped


def test_a_pair_is_scored_as_the_formula_says():
    """Brute force, one pair at a time, from the equations."""
    pairs = data_set(1)
    numbers = numbers_of(pairs)
    images, texts = pairs.image_features, pairs.text_features[torch.from_numpy(numbers.text)]
    distances = 1 - (images * texts).sum(1)
    scores = lemon(PairFeatures(images, texts), numbers.image, distances)
    for row in (0, 77, 159):
        expected = distances[row].item()
        for near, other in ((images, texts), (texts, images)):
            close = near @ near[row]
            close[row] = -2
            parts = []
            for number in close.argsort(descending=True, stable=True)[:30].tolist():
                weight = np.exp(-0.1 * (1 - close[number].item())) * np.exp(-5 * distances[number].item())
                parts.append((1 - (other[number] @ other[row]).item()) * weight)
            if near is images:
                expected += 5 * np.mean(parts)
                continue
            # captions tie by group; the set of the thirty nearest is not one set then, the means agree nearly
            assert abs(scores[row].item() - expected - 5 * np.mean(parts)) < 0.3
    one = neighbours(images, numbers.image, 3)
    _, cosines, found = next(one)
    assert not (found == torch.arange(len(found))[:, None]).any(), "none is its own neighbour"
    assert (cosines[:, :-1] >= cosines[:, 1:]).all()


def test_hubs_and_things_in_two_groups():
    pairs = data_set()
    hub = F.normalize(pairs.text_features.mean(0, keepdim=True), dim=1)
    texts = torch.cat([pairs.text_features, hub])
    # image 0's caption is near to all: move all images a little towards it
    images = F.normalize(pairs.image_features + 2 * hub, dim=1)
    vague = pairs._replace(image_features=images, text_features=texts, texts=[[GROUPS], *pairs.texts[1:]])
    counts = hub_counts(vague, numbers_of(vague))
    assert counts.argmax() == GROUPS
    assert counts[GROUPS] > GROUPS / 2
    assert same_things(pairs, numbers_of(pairs)) == [] or all(
        cosine < 0.95 for *_, cosine in same_things(pairs, numbers_of(pairs))
    )
    double = pairs._replace(
        image_features=torch.cat([pairs.image_features, pairs.image_features[:1]]),
        text_features=torch.cat([pairs.text_features, pairs.text_features[:1] + 1e-4]),
        texts=[*pairs.texts, [GROUPS]],
        groups=np.append(pairs.groups, GROUPS),
    )
    one, other, cosine = same_things(double, numbers_of(double))[0]
    assert (one, other) == (0, len(double.texts) - 1)
    assert cosine > 0.99


def test_the_list_names_samples_of_the_shards(tiny_model, icon_shards, tmp_path, capsys):
    out = tmp_path / "suspects.csv"
    suspects(tiny_model, icon_shards, out, most=7, inference=Inference(workers=0))
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert sum(map(len, read_suspects(out).values())) == len(rows)
    shards = Shards(icon_shards, "train")
    captions = {shards.key(number): shards.captions(number) for number in range(len(shards))}
    assert sum(row["reason"] == "does not fit" for row in rows) == 7
    assert all(row["caption"] in captions[row["key"]] for row in rows)
    assert all(row["other_key"] in captions for row in rows if row["reason"] == "same thing")
    scores = [float(row["score"]) for row in rows if row["reason"] == "does not fit"]
    assert scores == sorted(scores, reverse=True)
    assert str(out) in capsys.readouterr().out


def test_what_the_model_knows_is_said(tiny_model, icon_shards, tmp_path, capsys):
    pairs = data_set()
    numbers = numbers_of(pairs)
    assert knowledge(features_of(pairs, numbers), numbers) > 0.99
    shuffled = np.random.default_rng(0).permutation(len(pairs.texts))
    by_chance = pairs._replace(texts=[pairs.texts[number] for number in shuffled])
    assert abs(knowledge(features_of(by_chance, numbers_of(by_chance)), numbers) - 0.5) < 0.15
    alone = pairs._replace(groups=np.zeros_like(pairs.groups))
    assert knowledge(features_of(alone, numbers_of(alone)), numbers_of(alone)) is None
    assert not any("%" in line for line in remarks(5, None))
    suspects(tiny_model, icon_shards, tmp_path / "list.csv", most=1, inference=Inference(workers=0))
    printed = capsys.readouterr().out
    assert "another one's in" in printed
    assert "it hardly knows such images" in printed  # its weights are random


def test_a_file_of_the_user_is_not_replaced(tiny_model, icon_shards, tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("file,caption\na.png,bell\n")
    with pytest.raises(UserError, match="did not write"):
        suspects(tiny_model, icon_shards, table)
    assert table.read_text().startswith("file,caption")
    (tmp_path / "list.csv").touch()  # an empty one loses nothing, and a list is written anew
    for _ in range(2):
        suspects(tiny_model, icon_shards, tmp_path / "list.csv", most=1, inference=Inference(workers=0))
    with pytest.raises(UserError, match="--max-images 1: must be at least 2"):
        suspects(tiny_model, icon_shards, tmp_path / "list.csv", max_images=1)


def test_a_model_that_has_learned_the_errors_is_named(tiny_model, icon_shards, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_model.removeprefix("local-dir:"), run / "checkpoints" / "best")
    (run / "recipe.yaml").touch()
    sha256 = Shards(icon_shards, "train").fingerprint
    (run / "environment.json").write_text(json.dumps({"data_fingerprint": f"{'1' * 64} {sha256}"}))
    suspects(str(run), icon_shards, tmp_path / "list.csv", most=1, inference=Inference(workers=0))
    assert f"{run} was trained on {icon_shards}" in capsys.readouterr().err
    for model in (f"local-dir:{run / 'checkpoints' / 'best'}", f"ViT-B-32:{run / 'recipe.yaml'}"):
        assert run_trained_on(model, sha256) == run
        assert run_trained_on(model, "0" * 64) is None
    assert run_trained_on("ViT-B-32:openai", sha256) is None
