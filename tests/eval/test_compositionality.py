"""Drawings show what their captions say, and a collapsed model is exactly at chance."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import noise_images

from data_prep.build.pipeline import Parallelism, Reading, Splitting, build
from data_prep.errors import NotFinite, UserError
from data_prep.shards import Shards
from eval.compositionality.command import compositionality
from eval.compositionality.drawings import (
    COLORS,
    NUMBERS,
    PAIR_AREA,
    RELATIONS,
    TOTAL_AREA,
    binding,
    counting,
    relations,
    render,
)
from eval.compositionality.page import PAIR_CHANCE
from eval.compositionality.score import score_counting, score_pairs, score_swaps, wins
from eval.compositionality.swaps import swap_words, swaps_of
from eval.options import Inference
from train.model.clip import load


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, each as coordinates [m, 2] (y, x), by flood fill."""
    left, found = {tuple(place) for place in np.argwhere(mask).tolist()}, []
    while left:
        edge = [left.pop()]
        part = list(edge)
        while edge:
            y, x = edge.pop()
            for place in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if place in left:
                    left.remove(place)
                    edge.append(place)
                    part.append(place)
        found.append(np.array(part))
    return found


def ink(scene) -> float:
    """Pixels covered, those at edges in part."""
    return (255 - np.asarray(render(scene)).astype(float).min(2)).sum() / (255 - min(COLORS[scene[0].color]))


def test_as_many_shapes_as_said_and_the_constant_area():
    drawings = counting(3, seed=5)
    assert len(drawings) == 60
    for drawing in drawings:
        assert len(components((np.asarray(render(drawing.scene)) < 250).any(2))) == drawing.n
        expected = TOTAL_AREA if drawing.constant == "total area" else TOTAL_AREA / 10 * drawing.n
        assert ink(drawing.scene) == pytest.approx(expected, rel=0.03)
        kinds = {shape.kind for shape in drawing.scene}
        assert (
            drawing.captions[drawing.n - 1]
            == f"{NUMBERS[drawing.n - 1]} {kinds.pop()}{'s' if drawing.n > 1 else ''}"
        )
        assert not kinds
    for constant in ("total area", "shape area"):
        by_number = [
            [
                (one.scene[0].kind, one.scene[0].color)
                for one in drawings
                if one.n == n and one.constant == constant
            ]
            for n in range(1, 11)
        ]
        assert by_number == by_number[:1] * 10  # kind and color say nothing of the number


def test_drawings_depend_on_the_seed_alone():
    for make in (counting, binding, relations):
        assert make(2, 7) == make(2, 7)
        assert make(2, 7) == make(3, 7)[:2] or make is counting
        assert make(2, 7) != make(2, 8)
    assert render(binding(1, 0)[0].scenes[0]).tobytes() == render(binding(1, 0)[0].scenes[0]).tobytes()


def test_a_pair_swaps_colors_and_nothing_else():
    for pair in binding(30, 1):
        for scene, caption in zip(pair.scenes, pair.captions, strict=True):
            assert caption == " and ".join(f"a {shape.color} {shape.kind}" for shape in scene)
            pixels = np.asarray(render(scene)).astype(int)
            assert len(components((pixels < 250).any(2))) == 2
            for shape in scene:
                here = (abs(pixels - COLORS[shape.color]) <= 1).all(2)
                assert here.sum() == pytest.approx(PAIR_AREA, rel=0.1)  # without its edge
                assert np.argwhere(here).mean(0) == pytest.approx([shape.y, shape.x], abs=1.5)
        ours, theirs = pair.scenes
        assert [(a.kind, a.x, a.y) for a in ours] == [(b.kind, b.x, b.y) for b in theirs]
        assert [a.color for a in ours] == [b.color for b in theirs][::-1]
        assert sorted(pair.captions[0].split()) == sorted(pair.captions[1].split())


def test_relations_are_true_of_their_drawings():
    seen = set()
    for pair in relations(40, 2):
        for scene, caption in zip(pair.scenes, pair.captions, strict=True):
            first, relation, second = re.fullmatch(r"a (\w+) (.*) a (\w+)", caption).groups()
            seen.add(relation)
            places = {shape.kind: shape for shape in scene}
            dx, dy = places[first].x - places[second].x, places[first].y - places[second].y
            assert {
                "to the left of": dx < -70,
                "to the right of": dx > 70,
                "above": dy < -70,
                "below": dy > 70,
            }[relation]
            assert min(abs(dx), abs(dy)) < 1e-9
            assert len(components((np.asarray(render(scene)) < 250).any(2))) == 2
            assert (
                np.asarray(render(scene))[[0, -1]].min() == np.asarray(render(scene))[:, [0, -1]].min() == 255
            )
    assert len(seen) == 4


def test_counting_is_exactly_at_chance_without_sight_and_right_with_it():
    drawings = counting(2, 0)
    numbers = np.array([drawing.n for drawing in drawings])
    for scores, accuracy, error in (
        (np.zeros((40, 10)), 0.1, 3.3),  # collapsed
        (np.tile(np.arange(10) == 4, (40, 1)).astype(float), 0.1, 2.5),  # always five
        (np.eye(10)[numbers - 1], 1.0, 0.0),
        (np.eye(10)[numbers % 10], 0.0, 1.8),  # one too many, and one for ten
    ):
        for found in score_counting(scores, drawings).values():
            assert found["accuracy"]["value"] == pytest.approx(accuracy, abs=1e-14)
            assert found["mean_absolute_error"]["value"] == pytest.approx(error)
            np.testing.assert_allclose(np.sum(found["confusion"], 1), 1)
            assert np.trace(found["confusion"]) / 10 == pytest.approx(accuracy)


def test_pairs_are_scored_as_winoground_scores_them():
    perfect = np.tile(np.eye(2), (6, 1, 1))
    assert {name: at["value"] for name, at in score_pairs(perfect).items()} == dict.fromkeys(PAIR_CHANCE, 1.0)
    blind = np.tile([0.3, 0.2], (6, 2, 1))  # one caption for both drawings
    for nothing in (np.ones((6, 2, 2)), blind, blind.transpose(0, 2, 1)):
        found = {name: at["value"] for name, at in score_pairs(nothing).items()}
        assert found == {"text": 0, "image": 0, "group": 0, "text_accuracy": 0.5, "image_accuracy": 0.5}
    guesses = np.random.default_rng(0).random((8_000, 2, 2))
    for name, at in score_pairs(guesses).items():
        assert at["value"] == pytest.approx(PAIR_CHANCE[name], abs=4.5 * 0.5 / math.sqrt(8_000))
    # The drawings tell the captions apart, and the captions do not tell the drawings apart.
    found = score_pairs(np.array([[[0.9, 0.8], [0.2, 0.3]]]))
    assert {name: at["value"] for name, at in found.items()} == {
        "text": 1,
        "image": 0,
        "group": 0,
        "text_accuracy": 1,
        "image_accuracy": 0.5,
    }
    assert wins(np.array([1, 0, 1e-7, -1])).tolist() == [1, 0.5, 0.5, 0]


def test_a_swap_exchanges_two_words_and_is_no_caption_of_the_group():
    assert swap_words("arrow to the right", set(), b"") == "right to the arrow"
    assert swap_words("red, blue", set(), b"") == "blue, red"
    assert {swap_words("bell alarm off clock", set(), bytes([at])) for at in range(30)} == {
        "alarm bell off clock",
        "bell clock off alarm",
    }
    assert swap_words("bell alarm", {"Alarm bell"}, b"") is None
    for caption in ("bell", "the bell", "bell Bell", "", "to the of", "42"):
        assert swap_words(caption, set(), b"") is None
    assert swap_words("bell bell clock", set(), b"") == "bell clock bell"


def test_swaps_of_a_collapsed_model_are_a_coin():
    features = torch.nn.functional.normalize(
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    found = score_swaps(features, features, features.roll(1, 0), np.arange(5))
    assert (found["accuracy"]["value"], found["tie_rate"], found["n"]) == (1.0, 0.0, 5)
    same = features[:1].expand(5, 8)
    accuracy = score_swaps(features, same, same, np.arange(5))["accuracy"]
    assert accuracy["low"] < accuracy["value"] == 0.5 < accuracy["high"]


def test_the_command(tiny_model, icon_shards, tmp_path, capsys):
    options = {"data": icon_shards, "split": "val", "n": 1}
    for name, batch in (("a", 64), ("b", 7)):
        compositionality(
            tiny_model,
            json=tmp_path / f"{name}.json",
            page=tmp_path / f"{name}.html",
            inference=Inference(batch, 0),
            **options,
        )
    result = json.loads((tmp_path / "a.json").read_text())
    assert result == json.loads((tmp_path / "b.json").read_text())
    assert result["model"] == tiny_model
    assert set(result["relations"]) == {"all", *RELATIONS}
    shards = Shards(icon_shards, "val")
    assert result["swaps"]["n"] == len(swaps_of(shards, 0)) <= result["swaps"]["n_images"] == len(shards)
    printed, page = capsys.readouterr().out, (tmp_path / "a.html").read_text()
    for words in (
        "| counting 1 to 10, total area constant, 10 drawings: accuracy ",
        "25.0 %",
        "16.7 %",
        "3.3",
        "own caption preferred",
    ):
        assert words in printed
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import|<script", page)
    assert page.count("<img") == 2 * 10 + 2 * 8


def test_a_collapsed_model_is_at_chance_from_drawing_to_table(tiny_model, icon_shards, monkeypatch, tmp_path):
    def collapsed(name, *_):
        clip = load(name)
        clip.towers.image_features = lambda images: torch.ones(len(images), 4) / 2
        clip.towers.text_features = lambda tokens: torch.ones(len(tokens), 4) / 2
        return clip

    monkeypatch.setattr("eval.embed.load_for_eval", collapsed)
    compositionality(
        tiny_model, icon_shards, "val", n=1, inference=Inference(workers=0), json=tmp_path / "a.json"
    )
    result = json.loads((tmp_path / "a.json").read_text())
    for found in result["counting"].values():
        assert found["accuracy"]["value"] == pytest.approx(0.1, abs=1e-14)
    for name in ("binding", "relations"):
        for found in result[name].values():
            assert [at["value"] for at in found.values()] == [0, 0, 0, 0.5, 0.5]
    assert result["swaps"]["accuracy"]["value"] == 0.5


def test_mistakes_are_sentences(tiny_model, tmp_path, monkeypatch):
    noise_images(tmp_path, 3)
    build(
        [str(tmp_path / "pairs.csv")],
        tmp_path / "out",
        Reading(),
        split=Splitting(val=0.0, test=0.0),
        parallelism=Parallelism(1),
    )
    with pytest.raises(UserError, match="--n 0: must be at least 1"):
        compositionality(tiny_model, n=0)
    monkeypatch.setattr("eval.compositionality.swaps.FUNCTION_WORDS", {"caption"})
    with pytest.raises(UserError, match="no caption of train has two words to swap"):
        compositionality(tiny_model, tmp_path / "out", split="train")

    def broken(name, *_):
        clip = load(name)
        clip.towers.model.visual.proj.data[:] = torch.nan
        return clip

    monkeypatch.setattr("eval.embed.load_for_eval", broken)
    with pytest.raises(NotFinite, match="that of the drawing of 'one circle'"):
        compositionality(tiny_model, n=1)
