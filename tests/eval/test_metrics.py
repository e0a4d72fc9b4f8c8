"""Metrics equal brute force: small matrices, ties, several captions, groups, any tile and any world."""

import itertools

import numpy as np
import pytest
import torch

from data_prep.errors import NotFinite
from eval.retrieval.metrics import chance, instance_upper_bounds
from eval.retrieval.ranking import TIE, Relevance, check_finite, ranks, summarize


def brute_force(scores: np.ndarray, relevant: np.ndarray) -> tuple[list[int], list[int]]:
    """Ranks of each row's best relevant column, ties against and for it, one comparison at a time."""
    pessimistic, optimistic = [], []
    for row, is_relevant in zip(scores, relevant, strict=True):
        best = max(score for score, yes in zip(row, is_relevant, strict=True) if yes)
        others = [score for score, yes in zip(row, is_relevant, strict=True) if not yes]
        pessimistic.append(1 + sum(score >= best - TIE for score in others))
        optimistic.append(1 + sum(score >= best + TIE for score in others))
    return pessimistic, optimistic


def case(seed: int, levels: int | None):
    """Random features, groups and captions; few `levels` make many exact ties."""
    rng = np.random.default_rng(seed)
    n_images, n_texts, width = 23, 31, 6
    if levels:
        image_features, text_features = (
            rng.integers(0, levels, (n, width)).astype(np.float32) for n in (n_images, n_texts)
        )
    else:
        image_features, text_features = (
            rng.standard_normal((n, width)).astype(np.float32) for n in (n_images, n_texts)
        )
    groups = rng.integers(0, 9, n_images)
    # some captions are in several groups
    text_of = np.concatenate([np.arange(n_texts), rng.integers(0, n_texts, 8)])
    group_of = rng.choice(groups, len(text_of))
    text_of, group_of = (
        np.concatenate([text_of, rng.integers(0, n_texts, n_images)]),
        np.concatenate([group_of, groups]),
    )
    relevant = np.zeros((n_images, n_texts), bool)
    for image, (text, group) in itertools.product(range(n_images), zip(text_of, group_of, strict=True)):
        relevant[image, text] |= groups[image] == group
    return (
        torch.from_numpy(image_features),
        torch.from_numpy(text_features),
        Relevance(groups, text_of, group_of),
        relevant,
    )


@pytest.mark.parametrize("levels", [None, 2, 3])
@pytest.mark.parametrize("tile", [1, 5, 23, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_equal_brute_force(seed, levels, tile, monkeypatch):
    monkeypatch.setattr("eval.retrieval.ranking.COLUMNS", 8 if seed % 2 else 8192)
    image_features, text_features, relevance, relevant = case(seed, levels)
    scores = (image_features.double() @ text_features.double().T).numpy()
    image_to_text, text_to_image = ranks(image_features, text_features, relevance, tile=tile)
    for found, expected in (
        (image_to_text, brute_force(scores, relevant)),
        (text_to_image, brute_force(scores.T, relevant.T)),
    ):
        assert found.pessimistic.tolist() == expected[0]
        assert found.optimistic.tolist() == expected[1]
    np.testing.assert_array_equal(relevance.texts_per_image, relevant.sum(1))
    np.testing.assert_array_equal(relevance.images_per_text, relevant.sum(0))


def test_a_hand_made_matrix():
    """Two images of one group and a third; the scores are the features, texts are unit vectors."""
    scores = torch.tensor([[0.9, 0.1, 0.9, 0.0], [0.2, 0.8, 0.3, 0.1], [0.5, 0.0, 0.4, 0.5]])
    # Texts 0 and 1 are captions in the group of images 0 and 1; 2 and 3 are two captions of image 2.
    relevance = Relevance(np.array([7, 7, 5]), np.array([0, 1, 2, 3]), np.array([7, 7, 5, 5]))
    image_to_text, text_to_image = ranks(scores, torch.eye(4), relevance)
    assert image_to_text.matching.tolist() == [1, 1, 1]
    # 0: tied with text 2; 2: its best, text 3, ties with text 0
    assert image_to_text.pessimistic.tolist() == [2, 1, 2]
    assert image_to_text.optimistic.tolist() == [1, 1, 1]
    assert text_to_image.pessimistic.tolist() == [1, 1, 2, 1]
    values = summarize(image_to_text)
    # Two of three tie with one wrong item: half of the time it comes first.
    assert (values["R@1"], values["R@5"], values["mean_rank"], values["median_rank"]) == (
        2 / 3,
        1.0,
        4 / 3,
        1.5,
    )
    assert (values["MRR"], values["tie_rate"], values["R@1_tie_range"]) == (
        pytest.approx((1 + 0.75 + 0.75) / 3),
        2 / 3,
        pytest.approx(2 / 3),
    )


def test_instance_metrics_agree_with_open_clip():
    open_clip_train = pytest.importorskip("open_clip_train.train")
    generator = torch.Generator().manual_seed(0)
    image_features = torch.nn.functional.normalize(torch.randn(101, 12, generator=generator), dim=1)
    text_features = torch.nn.functional.normalize(
        image_features + 0.5 * torch.randn(101, 12, generator=generator), dim=1
    )
    theirs = open_clip_train.get_clip_metrics(image_features, text_features, torch.tensor(100.0))
    for direction, found in zip(
        ("image_to_text", "text_to_image"),
        ranks(image_features, text_features, Relevance.diagonal(101)),
        strict=True,
    ):
        ours = summarize(found)
        for name in ("R@1", "R@5", "R@10", "mean_rank", "median_rank"):
            assert ours[name] == pytest.approx(theirs[f"{direction}_{name}"])


def test_a_collapsed_model_scores_chance_and_look_alikes_cost_the_instance_definition_alone():
    n, mates = 40, 4
    same = torch.ones(n, 3) / 3**0.5
    found, _ = ranks(same, same, Relevance.diagonal(n))
    values, guess = summarize(found), chance(np.ones(n, int), n)
    for name in ("R@1", "R@5", "R@10", "mean_rank"):
        assert values[name] == pytest.approx(guess[name])
    assert (values["tie_rate"], values["R@1_tie_range"]) == (1, 1)
    groups = np.repeat(np.arange(n // mates), mates)
    perfect = torch.eye(n // mates)[groups]
    by_group, _ = ranks(perfect, perfect, Relevance(groups, np.arange(n), groups))
    assert summarize(by_group)["R@1"] == 1.0
    by_instance, _ = ranks(perfect, perfect, Relevance.diagonal(n))
    assert by_instance.pessimistic.tolist() == [mates] * n
    assert by_instance.optimistic.tolist() == [1] * n
    bounds = instance_upper_bounds(groups, groups)
    assert summarize(by_instance)["R@1"] == pytest.approx(1 / mates) == bounds["image_to_text"]


def test_the_upper_bound_by_instance_is_reached_by_a_perfect_model_and_never_exceeded():
    """Images of a group with captions of their own can all be found: the bound is 1, not 1 / group size."""
    assert instance_upper_bounds(np.arange(6), np.arange(6)) == {"image_to_text": 1, "text_to_image": 1}
    captions, images = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 1, 1, 2, 3])
    bounds = instance_upper_bounds(captions, images)
    # Caption 0 is three queries; image 0, twice in the gallery and wanted by two of them, comes first.
    assert bounds["text_to_image"] == pytest.approx((2 / 2 + 1 / 2 + 1) / 6)
    assert bounds["image_to_text"] == pytest.approx((2 / 3 + 1 + 1 / 2 + 1 / 2) / 6)
    rng = np.random.default_rng(0)
    for seed in range(200):
        captions, images = rng.integers(0, 4, (2, 7))
        points = torch.from_numpy(rng.standard_normal((8, 5)).astype("f"))
        directions = torch.nn.functional.normalize(points)
        counts = ranks(directions[images], directions[4 + captions], Relevance.diagonal(7))
        bounds = instance_upper_bounds(captions, images)
        for direction, found in zip(bounds, counts, strict=True):
            assert summarize(found)["R@1"] <= bounds[direction] + 1e-6, (seed, direction)


def test_adding_a_constant_scaling_and_permuting_change_nothing():
    image_features, text_features, relevance, _ = case(5, None)
    expected = ranks(image_features, text_features, relevance)
    order = np.random.default_rng(0).permutation(len(image_features))
    groups_of = [relevance.pairs(image, image + 1)[1] for image in range(relevance.n_images)]
    image_of = np.concatenate([np.full(len(texts), at) for at, texts in enumerate(groups_of)])
    # each image a group of its own
    same = Relevance(np.arange(relevance.n_images), torch.cat(groups_of).numpy(), image_of)
    moved = Relevance(order, torch.cat(groups_of).numpy(), image_of)
    shifted = (
        torch.cat([image_features, torch.ones(len(image_features), 1)], 1),
        torch.cat([text_features, torch.ones(len(text_features), 1)], 1),
    )
    for images, texts, which, places in (
        (image_features, text_features, same, slice(None)),
        (*shifted, same, slice(None)),  # every score one higher
        (image_features * 4, text_features, same, slice(None)),
        (image_features[order], text_features, moved, order),
    ):
        found = ranks(images, texts, which)
        np.testing.assert_array_equal(found[0].pessimistic, expected[0].pessimistic[places])
        np.testing.assert_array_equal(found[1].pessimistic, expected[1].pessimistic)


def test_chance_is_the_mean_over_all_orders_of_the_gallery():
    gallery, relevant = 6, np.array([1, 2, 5, 6])
    expected = {"R@1": [], "R@5": [], "mean_rank": []}
    for m in relevant:
        # places of the m relevant items
        first = [min(order[:m]) for order in itertools.permutations(range(gallery))]
        expected["R@1"].append(np.mean([place < 1 for place in first]))
        expected["R@5"].append(np.mean([place < 5 for place in first]))
        expected["mean_rank"].append(np.mean(first) + 1)
    values = chance(relevant, gallery)
    for name, each in expected.items():
        assert values[name] == pytest.approx(np.mean(each))
    assert values["R@10"] == 1.0  # more places than items


def test_a_row_that_is_not_finite_is_named():
    features = torch.ones(3, 2)
    check_finite(features, "image_features", str)
    features[1, 0] = float("nan")
    with pytest.raises(
        NotFinite, match="1 of 3 image_features are not finite; the first is that of sample 1"
    ):
        check_finite(features, "image_features", lambda row: f"sample {row}")
    with pytest.raises(NotFinite, match="3 of 3"):
        check_finite(torch.full((3, 2), torch.inf), "image_features", str)
