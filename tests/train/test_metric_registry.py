"""One registry of metrics: its words, and that it needs nothing heavy."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, environment

from eval.retrieval.metrics import FIRST_RELEVANT, all_relevant
from eval.retrieval.score import metric_names
from train.metrics import COMPARE, METRICS, metric_of, metrics_in, show, show_difference, show_of, title_of


def test_every_computed_metric_has_an_entry():
    one = np.array([0])
    computed = {*FIRST_RELEVANT, *all_relevant(one, one + 1, one, 1), *map(last, metric_names())}
    assert computed <= METRICS.keys()


def last(name: str) -> str:
    return name.rpartition("/")[2]


def test_a_compared_metric_is_one_of_each_query():
    """Paired differences need what each query scores."""
    one = np.array([0])
    assert set(metrics_in(COMPARE)) <= {*FIRST_RELEVANT, *all_relevant(one, one + 1, one, 1)}


def test_words():
    assert title_of("image_to_text/mean_rank") == "image to text, mean rank"
    assert title_of("instance/text_to_image/R@1") == "text to image, R@1, by instance"
    assert title_of("calibration_error") == "calibration error (ECE)"
    assert not metric_of("val/image_to_text/median_rank").higher_is_better
    assert metric_of("val/mean/R@1").higher_is_better
    assert show("image_to_text/R@1", 0.119, [0.082, 0.15]) == "11.9 % [8.2, 15.0]"
    assert show("mean_rank", 2.24) == "2.2"
    assert show("R@1", None) == ""
    assert show_of({"metrics": {"a/R@1": 0.5}, "intervals": {}}, "a/R@1") == "50.0 %"
    assert show_difference("a/R@1", [-0.042, -0.3, 0.1, 0.5]) == "-4.2 [-30.0, +10.0], p = 0.5"
    assert show_difference("a/mean_rank", [1, 0.5, 2, 0.01]) == "+1.0 [+0.5, +2.0], p = 0.01"
    assert show_difference("a/R@1", [0.1, 0, 0.2, 0.5], p_value=False) == "+10.0 [+0.0, +20.0]"
    assert show_difference("a/R@1", None) == ""
    with pytest.raises(KeyError):
        metric_of("val/image_to_text/R@2")


def test_it_imports_nothing_heavy():
    code = "import sys, train.metrics; assert not {'torch', 'numpy', 'eval'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)
