"""Captions are drawn: as often as asked, from one number, and by default as they always were."""

import itertools

import numpy as np
import pytest
from scipy import stats

from train.data.captions import caption, fewer_tags
from train.data.order import random_bits
from train.recipe import Captions

THREE = ["home", "house, building", "start"]
DRAWN = random_bits(6000, 0).tolist()


def test_the_default_is_one_of_them_by_the_samples_first_number():
    for bits in DRAWN[:200]:
        assert caption(THREE, Captions(), bits) == THREE[bits % 3]
        assert caption(THREE, Captions(sample="first"), bits) == "home"


def test_tags_are_left_out_as_often_as_asked_each_alone():
    tags, dropout = ["a", "b c", "d"], 0.4
    shown = [fewer_tags("a, b c,d", dropout, bits).split(", ") for bits in DRAWN]
    counts = {
        subset: 0 for n in (1, 2, 3) for subset in itertools.combinations(tags, n)
    }  # in their order, and never none
    for kept in shown:
        counts[tuple(kept)] += 1
    expected = {subset: dropout ** (3 - len(subset)) * (1 - dropout) ** len(subset) for subset in counts}
    for tag in tags:  # all three left out: one stays, each as often
        expected[tag,] += dropout**3 / 3
    assert sum(expected.values()) == pytest.approx(1)
    assert (
        stats.chisquare(list(counts.values()), [len(DRAWN) * expected[subset] for subset in counts]).pvalue
        > 0.001
    )


def test_what_is_no_list_of_tags_stays_as_it_is():
    for text in ("a house  by the sea", "", ",", " , ,", "home"):
        assert {fewer_tags(text, 0.99, bits) for bits in DRAWN[:100]} == {text}
    assert {fewer_tags("home,", 0.99, bits) for bits in DRAWN[:100]} == {"home"}
    assert {caption(["a,b ,c"], Captions(), bits) for bits in DRAWN[:100]} == {
        "a,b ,c"
    }  # nothing asked, nothing touched


def test_templates_are_drawn_evenly_whatever_the_caption():
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
    assert (
        caption(["{}, a{b"], Captions(templates=("<{}>",)), 1) == "<{}, a{b>"
    )  # braces of a caption are text


def test_one_number_decides_all():
    recipe = Captions(tag_dropout=0.5, templates=("an icon of {}", "{}"))
    first = [caption(["a, b, c", "d, e", "f"], recipe, bits) for bits in DRAWN[:300]]
    assert first == [caption(["a, b, c", "d, e", "f"], recipe, bits) for bits in DRAWN[:300]]
    assert len(set(first)) == 2 * (7 + 3 + 1)
