"""One figure, one value: commands that can print the same figure of one model and data set agree."""

import json

import pytest
from labelled_formats import as_folder, labelled_images

from eval.classify.command import linear_probe, zeroshot
from eval.compare.command import compare
from eval.options import Inference
from eval.retrieval.command import retrieval

CLASSES = ["Acura_Integra", "BMW_M3", "Fiat_500"]  # underscores are read as spaces, by every command
INFERENCE = Inference(batch_size=16, workers=0)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for split, seed in (("train", 1), ("test", 2)):
        as_folder(folder, labelled_images(seed), CLASSES, split)
    return folder


def test_zero_shot_accuracy(tiny_model, icon_shards, labelled, tmp_path, capsys):
    zeroshot((tiny_model,), labelled, "test", json=tmp_path / "zeroshot.json", inference=INFERENCE)
    files = {"cache": tmp_path / "cache", "json": tmp_path / "probe.json"}
    linear_probe(tiny_model, labelled, **files, inference=INFERENCE)
    more = {"labelled": labelled, "labelled_split": "test", "out": tmp_path / "comparison"}
    compare((tiny_model, tiny_model), icon_shards, "val", inference=INFERENCE, **more)
    by_zeroshot = json.loads((tmp_path / "zeroshot.json").read_text())
    by_probe = json.loads((tmp_path / "probe.json").read_text())
    by_compare = json.loads((tmp_path / "comparison" / "compare.json").read_text())
    metrics = by_zeroshot["models"][0]["metrics"]
    assert by_probe["heads"]["zero-shot"]["metrics"].items() <= metrics.items()
    assert by_compare["models"][0]["zeroshot"]["metrics"] == metrics


def test_retrieval(tiny_model, icon_shards, tmp_path):
    retrieval(tiny_model, icon_shards, "val", json=tmp_path / "retrieval.json", inference=INFERENCE)
    compare((tiny_model, tiny_model), icon_shards, "val", out=tmp_path / "comparison", inference=INFERENCE)
    alone = json.loads((tmp_path / "retrieval.json").read_text())
    compared = json.loads((tmp_path / "comparison" / "compare.json").read_text())["models"][0]
    for name, value in alone["metrics"].items():
        assert compared["metrics"][name] == value, name
    assert alone["intervals"] == compared["intervals"]
