"""Captions are drawn with the recipe's probabilities, from one number per sample."""

import itertools

import numpy as np
import pytest
from scipy import stats

import train.data.captions
from train.data.captions import draw, drop_tags
from train.data.order import random_bits
from train.recipe import Captions

THREE = ["home", "house, building", "start"]
DRAWN = random_bits(6000, 0).tolist()


def caption(captions: list[str], recipe: Captions, bits: int) -> str:
    """As the loader does it."""
    return train.data.captions.caption(captions[draw(len(captions), recipe, bits)], recipe, bits)


def test_one_caption_is_drawn_by_the_samples_bits():
    for bits in DRAWN[:200]:
        assert caption(THREE, Captions(), bits) == THREE[bits % 3]
        assert caption(THREE, Captions(sample="first"), bits) == "home"


def test_each_tag_is_dropped_independently():
    tags, dropout = ["a", "b c", "d"], 0.4
    # order kept, never none
    subsets = [subset for n in (1, 2, 3) for subset in itertools.combinations(tags, n)]
    counts = dict.fromkeys(subsets, 0)
    for bits in DRAWN:
        counts[tuple(drop_tags("a, b c,d", dropout, bits).split(", "))] += 1
    expected = {subset: dropout ** (3 - len(subset)) * (1 - dropout) ** len(subset) for subset in subsets}
    for tag in tags:  # where all three would be dropped, each is as likely to stay
        expected[tag,] += dropout**3 / 3
    assert sum(expected.values()) == pytest.approx(1)
    frequencies = [len(DRAWN) * expected[subset] for subset in subsets]
    assert stats.chisquare(list(counts.values()), frequencies).pvalue > 0.001


def test_a_caption_without_tags_is_not_changed():
    for text in ("a house  by the sea", "", ",", " , ,", "home"):
        assert {drop_tags(text, 0.99, bits) for bits in DRAWN[:100]} == {text}
    assert {drop_tags("home,", 0.99, bits) for bits in DRAWN[:100]} == {"home"}
    assert {caption(["a,b ,c"], Captions(), bits) for bits in DRAWN[:100]} == {"a,b ,c"}  # no dropout


def test_templates_are_drawn_uniformly_and_independently_of_the_caption():
    templates = ("an icon of {}", "{}", "{} icon")
    recipe = Captions(templates=templates)
    filled = {
        template.replace("{}", text): (row, column)
        for row, text in enumerate(THREE)
        for column, template in enumerate(templates)
    }
    counts = np.zeros((3, 3))
    for bits in DRAWN:
        counts[filled[caption(THREE, recipe, bits)]] += 1
    assert stats.chisquare(counts.flatten()).pvalue > 0.001
    # braces in a caption are text
    assert caption(["{}, a{b"], Captions(templates=("<{}>",)), 1) == "<{}, a{b>"


def test_one_number_decides_everything():
    recipe = Captions(tag_dropout=0.5, templates=("an icon of {}", "{}"))
    first = [caption(["a, b, c", "d, e", "f"], recipe, bits) for bits in DRAWN[:300]]
    assert first == [caption(["a, b, c", "d, e", "f"], recipe, bits) for bits in DRAWN[:300]]
    assert len(set(first)) == 2 * (7 + 3 + 1)
