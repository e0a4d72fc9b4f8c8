"""Clusters of an index's images: k-means on their features, and how many clusters there are.

features -> k-means on a sample -> each image to its nearest centre -> names from captions
"""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from data_prep.progress import progress
from eval.cluster.names import MAX_TERMS, distinct_names, terms_of
from eval.search.index import Index

SEED, INITS = 0, 3
SILHOUETTE_ROWS, FIT_ROWS, CHUNK_ROWS = 5_000, 32_768, 8_192
MAX_AUTO_K, STEPS_PER_DOUBLING = 64, 4
TOLERANCE = 0.05  # of the best silhouette; a smaller difference does not distinguish two values of k


@dataclass(frozen=True)
class Clusters:
    """Clusters of an index's images, numbered from 0, largest first.

    Attributes:
        cluster_of: int64 [n].
        closeness: fp32 [n], cosine of each image's features and the centre of its cluster.
        names: Of each cluster, all different.
        terms: Of each cluster, the words and pairs of words that distinguish it, best first.
        silhouettes: k -> mean silhouette, of each k that was tried; empty if k was given.
    """

    cluster_of: np.ndarray
    closeness: np.ndarray
    names: list[str]
    terms: list[list[str]]
    silhouettes: dict[int, float]

    def sizes(self) -> np.ndarray:
        return np.bincount(self.cluster_of, minlength=len(self.names))


def clusters(index: Index, k: int | None) -> Clusters:
    """The clusters of an index: k-means on L2-normed features, so that nearest means the smallest angle.

    Close to spherical k-means (Dhillon and Modha, Concept decompositions, 2001), which norms centres too.
    Centres are fitted to at most FIT_ROWS random images; then each image is assigned to the nearest.

    Args:
        k: Number of clusters; None takes best_k(). There are fewer if fewer images are distinct.
    """
    features, assigned, closeness = index.features, [], []
    with threadpool_limits(1):  # threads add up in any order, so the result would not be reproducible
        tried = {} if k else silhouettes(features)
        model = k_means(random_rows(features, FIT_ROWS), k or best_k(tried))
        norms = np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True)
        centres = model.cluster_centers_ / np.maximum(norms, 1e-12)
        starts = range(0, len(features), CHUNK_ROWS)
        for start in progress(starts, desc="assigning images", unit="part", delay=1):
            part = features[start : start + CHUNK_ROWS].astype(np.float32)
            assigned.append(model.predict(part))
            closeness.append(np.einsum("nd,nd->n", part, centres[assigned[-1]]))
    assigned = np.concatenate(assigned)
    sizes = np.bincount(assigned, minlength=model.n_clusters)
    rank = np.argsort(np.argsort(-sizes, kind="stable"))
    cluster_of = rank[assigned].astype(np.int64)
    terms = terms_of(index, [np.flatnonzero(cluster_of == number) for number in range((sizes > 0).sum())])
    shown = [of_cluster[:MAX_TERMS] for of_cluster in terms]
    return Clusters(cluster_of, np.concatenate(closeness), distinct_names(terms), shown, tried)


def random_rows(features: np.ndarray, limit: int) -> np.ndarray:
    """fp32 [m, d], at most `limit` random rows (by SEED), in their order."""
    if len(features) <= limit:
        return features.astype(np.float32)
    rows = np.random.default_rng(SEED).choice(len(features), limit, replace=False)
    return features[np.sort(rows)].astype(np.float32)


def k_means(features: np.ndarray, k: int) -> KMeans:
    with warnings.catch_warnings():
        # It warns if there are fewer distinct images than k; empty clusters are dropped.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(k, n_init=INITS, random_state=SEED).fit(features)


def silhouettes(features: np.ndarray) -> dict[int, float]:
    """k -> mean silhouette by cosine distance (Rousseeuw 1987) on SILHOUETTE_ROWS images.

    k runs geometrically from 2 to MAX_AUTO_K, and to a fifth of the images at most. Empty where no k can be
    scored, as for two images.
    """
    features = random_rows(features, SILHOUETTE_ROWS)
    distances = np.maximum(1 - features @ features.T, 0)
    np.fill_diagonal(distances, 0)
    steps = np.arange(STEPS_PER_DOUBLING * np.log2(MAX_AUTO_K / 2) + 1)
    ks = np.unique(np.round(2 * 2 ** (steps / STEPS_PER_DOUBLING)).astype(int))
    ks = ks[(ks <= max(2, len(features) // 5)) & (ks < len(features))].tolist()
    scores = {}
    for k in progress(ks, desc="number of clusters", unit="k", delay=1):
        labels = k_means(features, k).labels_
        if len(np.unique(labels)) > 1:
            scores[k] = float(silhouette_score(distances, labels, metric="precomputed"))
    return scores


def best_k(silhouettes: dict[int, float]) -> int:
    """The largest k whose silhouette is near the best (more clusters say more); 1 if none was scored."""
    best = max(silhouettes.values(), default=0)
    return max((k for k, score in silhouettes.items() if score >= best - TOLERANCE * abs(best)), default=1)
