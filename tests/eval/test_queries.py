"""Queries that are no captions, and slices of the data, are scored as by hand."""

import json

import numpy as np
import pytest
from conftest import assert_mistake, build_icons, call_here

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.__main__ import main
from eval.options import Inference
from eval.retrieval.command import retrieval
from eval.retrieval.queries import read_queries


@pytest.fixture(scope="module")
def gallery(icon_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    build_icons(icon_folder, folder / "shards", val=0.9, test=0.0)
    return folder / "shards"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_captions_as_queries_score_what_captions_score(tiny_model, gallery, tmp_path, capsys):
    """The data's own captions, asked as if they were unseen, get the figures of text_to_image; slices sum to
    the whole.
    """
    shards = Shards(gallery, "val")
    keys: dict[str, list] = {}
    for number in range(len(shards)):
        name = shards.key(number) if number % 2 else shards.meta(number)["image"]
        for caption in shards.captions(number):
            keys.setdefault(caption, []).append(name)
    path = write(tmp_path / "queries.jsonl", [{"text": text, "keys": names} for text, names in keys.items()])
    retrieval(
        tiny_model,
        gallery,
        "val",
        json=tmp_path / "out.json",
        queries=path,
        slice="set",
        inference=Inference(workers=0),
    )
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    for name in ("R@1", "R@5", "R@10", "mean_rank", "median_rank", "MRR", "mAP", "nDCG@10", "recall@5"):
        assert result["metrics"][f"queries_to_image/{name}"] == pytest.approx(
            result["metrics"][f"text_to_image/{name}"]
        ), name
    assert "queries to image, by group, among" in printed
    found = result["slices"]
    assert set(found) == {shards.meta(number)["columns"]["set"] for number in range(len(shards))}
    weights = [each["n_images"] for each in found.values()]
    assert sum(weights) == len(shards)
    whole = np.average([each["image_to_text/R@1"] for each in found.values()], weights=weights)
    assert whole == pytest.approx(result["metrics"]["image_to_text/R@1"])
    assert f"| {next(iter(found))} " in printed


def test_all_members_of_a_group_are_relevant(gallery, tmp_path):
    shards = Shards(gallery, "val")
    groups, counts = np.unique(shards.groups, return_counts=True)
    members = np.flatnonzero(shards.groups == groups[counts.argmax()])
    texts, query_of, image_of, missing = read_queries(
        write(tmp_path / "a.jsonl", [{"text": "x", "keys": [shards.key(int(members[0]))]}]), shards
    )
    assert (texts, query_of.tolist(), image_of.tolist(), missing) == (
        ["x"],
        [0] * len(members),
        members.tolist(),
        [],
    )


def test_a_query_without_an_image_is_listed_and_not_scored(tiny_model, gallery, tmp_path, capsys):
    shards = Shards(gallery, "val")
    rows = [{"text": "x", "keys": [shards.key(0), "nowhere.png"]}, {"text": "y", "keys": ["nowhere.png"]}]
    results = []
    for chosen in (rows[:1], rows):
        path = write(tmp_path / "a.jsonl", chosen)
        retrieval(
            tiny_model,
            gallery,
            "val",
            json=tmp_path / "out.json",
            queries=path,
            inference=Inference(workers=0),
        )
        results.append(json.loads((tmp_path / "out.json").read_text()))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert (results[0]["queries_without_images"], results[1]["queries_without_images"]) == (
        [],
        ["line 2: y (nowhere.png)"],
    )
    assert (
        "1 query without an image in this split is not scored: line 2: y (nowhere.png)"
        in capsys.readouterr().out
    )
    retrieval(  # beside a result with a direction that this one lacks
        tiny_model,
        gallery,
        "val",
        json=tmp_path / "b.json",
        against=tmp_path / "out.json",
        page=tmp_path / "b.html",
        inference=Inference(workers=0),
    )
    assert (tmp_path / "b.png").is_file()
    with pytest.raises(UserError, match="none of 1 queries has an image in val"):
        read_queries(write(tmp_path / "b.jsonl", rows[1:]), shards)


def test_mistakes_are_sentences(tiny_model, gallery, tmp_path):
    shards = Shards(gallery, "val")
    path = write(
        tmp_path / "a.jsonl",
        [{"text": "x", "keys": [shards.key(0)]}, {"text": " ", "keys": ["nowhere.png"]}, ["z"]],
    )
    with pytest.raises(UserError, match=r"a\.jsonl:2: an empty text; fix or remove the 2 of 3 lines"):
        read_queries(path, shards)
    with pytest.raises(UserError, match="cannot be read"):
        read_queries(tmp_path / "none.jsonl", shards)
    with pytest.raises(UserError, match="no queries"):
        read_queries(write(tmp_path / "b.jsonl", []), shards)
    options = ["--data", gallery, "--split", "val", "--workers", 0, "--slice", "colour"]
    assert_mistake(
        call_here(main, "retrieval", tiny_model, *options),
        "--slice colour: no sample has this column; they have set",
    )
