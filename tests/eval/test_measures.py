"""Metrics of a query equal the mean over all orders of its ties, and an established library where there are
none.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import call
from counts_script import counts

from eval.retrieval.metrics import all_relevant, expected_hit, expected_rank, expected_reciprocal_rank
from eval.retrieval.ranking import TIE, positions
from train.world import World


@pytest.mark.parametrize("counts", itertools.product((0, 2), (0, 1, 3), (1, 2)))
def test_expectations_over_the_orders_of_ties(counts):
    above, tied, matching = counts
    firsts = [
        1 + above + order.index(True) for order in itertools.permutations([False] * tied + [True] * matching)
    ]
    given = [np.array([count]) for count in counts]
    assert expected_rank(*given) == pytest.approx(np.mean(firsts))
    assert expected_reciprocal_rank(*given) == pytest.approx(np.mean(1 / np.array(firsts)))
    for k in range(1, 8):
        assert expected_hit(*given, k) == pytest.approx(np.mean(np.array(firsts) <= k))


def brute_force(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Average precision, nDCG@10 and recall@k of one query over all orders of its ties."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        ordered = list(order)
        if any(scores[a] < scores[b] - TIE for a, b in itertools.pairwise(ordered)):
            continue
        hits = relevant[ordered].astype(float)
        places = np.arange(1, len(hits) + 1)
        ideal = (1 / np.log2(np.arange(2, 2 + min(10, int(hits.sum()))))).sum()
        one = {
            "mAP": (hits * np.cumsum(hits) / places).sum() / hits.sum(),
            "nDCG@10": (hits / np.log2(places + 1))[:10].sum() / ideal,
        }
        values.append(one | {f"recall@{k}": hits[:k].sum() / hits.sum() for k in (1, 5, 10)})
    return {name: np.mean([one[name] for one in values]) for name in values[0]}


@pytest.mark.parametrize("levels", [2, 3, 50])
def test_metrics_of_all_relevant_items_equal_brute_force_with_ties(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (6, 7)).astype(np.float32)
    relevant = rng.random((6, 7)) < 0.4
    relevant[np.arange(6), rng.integers(0, 7, 6)] = True
    query_of, item_of = np.nonzero(relevant)
    for tile in (1, 4, 100):
        above, tied = positions(torch.from_numpy(scores), torch.eye(7), query_of, item_of, tile=tile)
        found = all_relevant(above, tied, query_of, 6)
        for query in range(6):
            for name, expected in brute_force(scores[query], relevant[query]).items():
                assert found[name][query] == pytest.approx(expected), (name, query)


def test_agreement_with_trec_eval_where_nothing_ties():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((40, 60)).astype(np.float32)
    relevant = rng.random((40, 60)) < 0.1
    relevant[:, 0] = True
    judged = {str(q): {str(item): int(relevant[q, item]) for item in range(60)} for q in range(40)}
    run = {str(q): {str(item): float(scores[q, item]) for item in range(60)} for q in range(40)}
    theirs = pytrec_eval.RelevanceEvaluator(
        judged, {"map", "ndcg_cut.10", "recall.5,10", "recip_rank"}
    ).evaluate(run)
    query_of, item_of = np.nonzero(relevant)
    found = all_relevant(*positions(torch.from_numpy(scores), torch.eye(60), query_of, item_of), query_of, 40)
    for ours, name in (
        ("mAP", "map"),
        ("nDCG@10", "ndcg_cut_10"),
        ("recall@5", "recall_5"),
        ("recall@10", "recall_10"),
    ):
        np.testing.assert_allclose(found[ours], [theirs[str(q)][name] for q in range(40)], atol=1e-6)


def test_nothing_is_its_own_neighbor():
    features = torch.nn.functional.normalize(
        torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    groups = np.arange(12) // 3
    query_of, item_of = np.nonzero((groups[:, None] == groups[None]) & ~np.eye(12, dtype=bool))
    above, tied = positions(features, features, query_of, item_of, exclude_self=True, tile=5)
    scores = (features @ features.T).numpy().astype(float)
    np.fill_diagonal(scores, -np.inf)
    assert above.tolist() == [
        (scores[q] > scores[q, item] + TIE).sum() for q, item in zip(query_of, item_of, strict=True)
    ]
    assert (tied == 1).all()


def test_three_ranks_and_any_tiles_give_the_same_integers(tmp_path):
    call("tests.counts_script", tmp_path / "counts.json", ranks=3)  # 10 tiles: not the same number for each
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found == counts(World(), 5) == counts(World(), 1000)
