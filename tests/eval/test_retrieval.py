"""From shards to metrics: the printed and written values equal brute force over the captions and groups."""

import json
import re
import shutil

import numpy as np
import open_clip
import pytest
import torch
from conftest import assert_mistake, build_icons, call, call_here, save_tiny
from damage import flip
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep.build.pipeline import Parallelism, Reading, Splitting, build
from data_prep.shards import Shards
from eval.__main__ import main
from eval.embed import embed
from eval.options import Inference
from eval.retrieval.command import retrieval
from eval.retrieval.score import QueryScores, differences, evaluate, evaluate_full
from train.data.decode import decode
from train.model.clip import load
from train.world import World


@pytest.fixture(scope="module")
def gallery(icon_folder, tmp_path_factory):
    """One large split, and some images with captions of their own and of others."""
    folder = tmp_path_factory.mktemp("gallery")
    build_icons(icon_folder, folder / "shards", val=0.9, test=0.0)
    return folder / "shards"


def by_hand(model_name: str, shards: Shards) -> dict[str, float]:
    """Group and instance ranks with open_clip alone, one query at a time."""
    model, _, preprocess = open_clip.create_model_and_transforms(model_name)
    tokenizer = open_clip.get_tokenizer(model_name)
    model.eval()
    samples = [shards.read(number) for number in range(len(shards))]
    texts = list(dict.fromkeys(caption for sample in samples for caption in sample.captions))
    with torch.no_grad():
        images = model.encode_image(
            torch.stack([preprocess(decode(sample.image)) for sample in samples]), normalize=True
        )
        captions = model.encode_text(tokenizer(texts), normalize=True)
    scores = (images.double() @ captions.double().T).numpy()
    groups = [sample.meta["group"] for sample in samples]
    texts_of_group = {
        group: {c for s in samples if s.meta["group"] == group for c in s.captions} for group in groups
    }
    relevant = np.array([[text in texts_of_group[group] for text in texts] for group in groups])
    first = np.array([texts.index(sample.captions[0]) for sample in samples])
    diagonal = scores[:, first]

    def rank(row, yes):
        best = row[yes].max()
        tied, matching = ((np.abs(row[which] - best) <= 1e-6).sum() for which in (~yes, yes))
        return 1 + (row[~yes] > best + 1e-6).sum() + tied / (matching + 1)

    eye = np.eye(len(samples), dtype=bool)
    return {
        "image_to_text": [rank(row, yes) for row, yes in zip(scores, relevant, strict=True)],
        "text_to_image": [rank(row, yes) for row, yes in zip(scores.T, relevant.T, strict=True)],
        "instance/image_to_text": [rank(row, yes) for row, yes in zip(diagonal, eye, strict=True)],
        "instance/text_to_image": [rank(row, yes) for row, yes in zip(diagonal.T, eye, strict=True)],
    }


def test_the_numbers_are_those_of_brute_force(tiny_model, gallery):
    shards = Shards(gallery, "val")
    assert any(len(shards.captions(number)) > 1 for number in range(len(shards)))
    result = evaluate(load(tiny_model), shards, World(), Inference(13, 0))
    for name, expected in by_hand(tiny_model, shards).items():
        for k in (1, 5, 10):
            ties = np.array(expected) % 1 != 0
            assert (
                abs(result["metrics"][f"{name}/R@{k}"] - np.mean(np.array(expected) <= k)) <= ties.mean()
            ), name
        assert result["metrics"][f"{name}/mean_rank"] == pytest.approx(np.mean(expected))
    assert result["n_images"] == len(shards)
    assert result["metrics"]["chance/text_to_image/R@1"] < 0.1


def test_what_the_examination_adds_is_that_of_brute_force(tiny_model, gallery):
    shards = Shards(gallery, "val")
    embedded = embed(load(tiny_model), shards, World(), Inference(16, 0))
    result, queries = evaluate_full(embedded, shards.groups, World())
    metrics = result["metrics"]
    assert metrics.items() >= evaluate(load(tiny_model), shards, World()).get("metrics").items()
    scores = (embedded.image_features.double() @ embedded.image_features.double().T).numpy()
    np.fill_diagonal(scores, -np.inf)
    precisions, ranks = [], []
    for number, group in enumerate(shards.groups):
        mates = np.flatnonzero((shards.groups == group) & (np.arange(len(shards)) != number))
        if len(mates):
            places = np.sort([1 + (scores[number] > scores[number, mate]).sum() for mate in mates])
            precisions.append(np.mean(np.arange(1, len(places) + 1) / places))
            ranks.append(places[0])
    assert metrics["image_to_image/mAP"] == pytest.approx(np.mean(precisions), abs=2e-3)
    assert metrics["image_to_image/mean_rank"] == pytest.approx(np.mean(ranks), abs=0.1)
    assert len(queries.values["image_to_image/mean_rank"]) == len(ranks)
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert queries.values[f"{direction}/R@{k}"].mean() == pytest.approx(metrics[f"{direction}/R@{k}"])
        assert metrics[f"{direction}/mAP"] <= metrics[f"{direction}/MRR"] + 1e-9
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[f"instance/{direction}/R@1"] <= metrics[f"instance/{direction}/R@1_upper_bound"] <= 1
    assert all(value[0] == 0 and value[3] == 1 for value in differences(queries, queries).values())


def test_any_number_of_ranks_and_workers_gives_the_same_json(
    tiny_model, gallery, tmp_path, one_thread, capsys
):
    retrieval(tiny_model, gallery, "val", json=tmp_path / "0.json", inference=Inference(8, 0))
    printed = [capsys.readouterr().out]
    options = ["--data", gallery, "--split", "val", "--json", tmp_path / "2.json", "--batch-size", 8]
    printed.append(call("eval", "retrieval", tiny_model, *options, "--workers", 1, ranks=2).stdout)
    results = [json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (0, 2)]
    for text, result in zip(printed, results, strict=True):
        assert "| chance |" in text
        assert f"{result['n_images']} images, {result['n_texts']} distinct captions" in text
    assert results[0] == results[1]
    assert results[0].keys() == {
        "model",
        "weights_sha256",
        "precision",
        "data",
        "data_sha256",
        "n_images",
        "n_texts",
        "metrics",
        "intervals",
        "n_groups",
    }
    for name, (low, high) in results[0]["intervals"].items():
        assert low <= results[0]["metrics"][name] <= high, name
    arrays = [QueryScores.load(tmp_path / f"{ranks}.queries.npz") for ranks in (0, 2)]
    first, second = ({name: each.tolist() for name, each in one.values.items()} for one in arrays)
    assert first == second
    assert results[0]["model"] == tiny_model
    for direction in ("image_to_text", "text_to_image"):
        for name in ("R@1", "R@5", "R@10", "mean_rank", "median_rank"):
            assert isinstance(results[0]["metrics"][f"{direction}/{name}"], float)
            assert isinstance(results[0]["metrics"][f"instance/{direction}/{name}"], float)
        assert 0 < results[0]["metrics"][f"chance/{direction}/R@1"] < 1
    retrieval("demo-vit:none", gallery, "val", against=tmp_path / "0.json", inference=Inference(workers=0))
    against = capsys.readouterr().out
    assert tiny_model in against
    assert "| image to text, R@1 " in against
    assert f"difference from {tiny_model}" in against
    assert re.search(r"image to text, R@1 .* [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\] \| +[\d.e-]+ \|", against)


def test_a_black_icon_on_transparency_reaches_the_model_black_on_white(tmp_path):
    """All the way: file, CSV, shard, and the pixels that the image tower is given, normalised."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 16))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("file,caption\na.png,half\n")
    split = Splitting(val=0.0, test=0.0)
    build(
        [str(tmp_path / "a.csv")],
        tmp_path / "shards",
        Reading("file"),
        split=split,
        parallelism=Parallelism(1),
    )
    (tmp_path / "model").mkdir()
    clip = load(f"local-dir:{save_tiny(tmp_path / 'model')}")
    pixels = clip.preprocess(decode(Shards(tmp_path / "shards", "train").read(0).image))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.25, 0.2])
    torch.testing.assert_close(pixels[:, 8, 2], (0 - mean) / std)
    torch.testing.assert_close(pixels[:, 8, 13], (1 - mean) / std)


def test_features_that_are_not_finite_are_an_error_that_names_a_sample(gallery, tmp_path):
    save_tiny(tmp_path)
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    save_file(
        {**weights, "visual.ln_post.weight": torch.full_like(weights["visual.ln_post.weight"], 3e38)},
        tmp_path / "open_clip_model.safetensors",
    )
    result = call_here(
        main,
        "retrieval",
        f"local-dir:{tmp_path}",
        "--data",
        gallery,
        "--split",
        "val",
        "--workers",
        0,
        expect=3,
    )
    first = Shards(gallery, "val").key(0)
    assert_mistake(result, "image_features are not finite", f"sample {first}")


def test_mistakes_are_sentences(tiny_model, gallery, icon_shards, tmp_path):
    assert_mistake(
        call_here(main, "retrieval", tmp_path, "--data", gallery, "--split", "val"),
        "a MODEL is NAME:PRETRAINED",
    )
    assert_mistake(
        call_here(main, "retrieval", tiny_model, "--data", gallery, "--split", "dev"), "it has train"
    )
    altered = shutil.copytree(gallery, tmp_path / "altered")
    key = Shards(altered, "val").key(5)
    flip(Shards(altered, "val"), 5)
    for workers in (0, 1):
        words = "retrieval", tiny_model, "--data", altered, "--split", "val", "--workers", workers
        assert_mistake(call_here(main, *words), f"val-000000.tar: sample {key}: altered since it was built")
    other = {"model": "x", "weights_sha256": "0", "data": "b, val", "data_sha256": "0"}
    other |= {"n_images": 3, "n_texts": 3, "metrics": {}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    options = ["--data", gallery, "--split", "val", "--workers", 0, "--against", tmp_path / "other.json"]
    assert_mistake(call_here(main, "retrieval", tiny_model, *options), "other data (b, val, 3 images)")
