"""What is in a corpus: clusters of an index's pictures, each with a name from its captions, and pictures that
are nearly the same.

features -> k-means on a sample -> each picture to its nearest centre -> names, agreement with labels and
         groups
         -> every pair, once    -> near duplicates
"""

import csv as comma_separated
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from threadpoolctl import threadpool_limits

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.progress import progress
from eval.cluster.names import MOST_TERMS, distinct_names, terms_of
from eval.cluster.near_duplicates import Pairs, near_duplicates
from eval.cluster.page import write_page
from eval.retrieval.score import write_json
from eval.search.index import Index, not_empty

SEED, INITS = 0, 3
CHOICE_ROWS, FIT_ROWS, CHUNK_ROWS = 5_000, 32_768, 8_192
MOST_CLUSTERS, STEPS_PER_DOUBLING, TIE = (
    64,
    4,
    0.03,
)  # "auto" tries; silhouettes that differ by no more than TIE tell nothing


@dataclass(frozen=True)
class Clusters:
    """Pictures of an index in clusters, numbered from 0, the largest first.

    Attributes:
        of: int64 [n], the cluster of each picture.
        closeness: fp32 [n], cosine of each picture's features and its cluster's centre.
        names: of each cluster, no two the same.
        terms: of each cluster the words and pairs of words that tell it apart, the best first.
        silhouettes: k -> mean silhouette, of each k that was tried; empty where k was given.
    """

    of: np.ndarray
    closeness: np.ndarray
    names: list[str]
    terms: list[list[str]]
    silhouettes: dict[int, float]

    def sizes(self) -> np.ndarray:
        return np.bincount(self.of, minlength=len(self.names))


def cluster(
    index: Annotated[Path, tyro.conf.Positional],
    page: Path,
    k: int | Literal["auto"] = "auto",
    label: str = "",
    threshold: float = 0.97,
    csv: Path | None = None,
    pairs: Path | None = None,
    json: Path | None = None,
) -> None:
    """Clusters of an index's pictures with names from their captions, a map of them, and near duplicates: one
    page.

    The same index gives the same page, byte for byte. The map is UMAP's where umap-learn is installed, and
    otherwise PCA's.

    Args:
        index: Folder that `python -m eval embed` made.
        page: HTML file to write; it loads nothing from elsewhere.
        k: How many clusters; auto tries 2 to 64 and takes the best by silhouette, of nearly equal ones the
            largest.
        label: Column of the data to compare the clusters with (NMI and ARI).
        threshold: Cosine of image features from which on two pictures are near duplicates; it depends on the
            model.
        csv: File for each picture's key, cluster and the cluster's name.
        pairs: CSV for the near duplicates, the most similar first.
        json: File for all figures.
    """
    if k != "auto" and k < 1:
        raise UserError(f"--k {k}: at least 1 is wanted, or auto")
    if not -1 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: a cosine is wanted, at most 1, such as 0.97")
    opened = not_empty(Index(index))
    if k != "auto" and k > len(opened):
        raise UserError(
            f"--k {k}: {index} has {len(opened)} pictures; at most as many clusters can be made of them"
        )
    truth = labels_of(opened, label) if label else None
    found = clusters(opened, None if k == "auto" else k)
    agreements = {f"column {label}": agreement(found.of, truth)} if label else {}
    if (groups := groups_of_several(opened)) is not None:
        agreements["groups of several pictures"] = {
            **agreement(found.of, groups),
            "whole": share_of_whole_groups(found.of, groups),
        }
    alike = near_duplicates(opened, threshold)
    result = summary(opened, found, agreements, alike, k)
    result["map"] = write_page(page, opened, found.of, found.closeness, alike, result)
    print(told(result))
    if csv:
        rows = zip(opened.keys, found.of.tolist(), strict=True)
        write_csv(
            csv, ["key", "cluster", "name"], ([key, number + 1, found.names[number]] for key, number in rows)
        )
    if pairs:
        write_csv(pairs, ["key", "other_key", "cosine", "same_group"], alike.rows(opened))
    if json:
        write_json(json, result)
    print(f"the page: {page}")


def clusters(index: Index, k: int | None) -> Clusters:
    """The clusters of an index, k-means on its L2-normed features, so that the nearest centre is one by
    angle.

    Close to spherical k-means (Dhillon and Modha, Concept decompositions, 2001), whose centres are normed as
    well. Centres are learned of at most FIT_ROWS pictures drawn at random; then each picture goes to the
    nearest.

    Args:
        k: how many; None takes the best of silhouettes(). There are fewer where there are fewer distinct
            pictures.
    """
    features, of, closeness = index.features, [], []
    with threadpool_limits(
        1
    ):  # threads add up in any order, and the clusters would not be the same ones each time
        tried = {} if k else silhouettes(features)
        model = k_means(drawn(features, FIT_ROWS), k or best_k(tried))
        centres = model.cluster_centers_ / np.maximum(
            np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True), 1e-12
        )
        for start in progress(
            range(0, len(features), CHUNK_ROWS), desc="each to its cluster", unit="part", delay=1
        ):
            part = features[start : start + CHUNK_ROWS].astype(np.float32)
            of.append(model.predict(part))
            closeness.append(np.einsum("nd,nd->n", part, centres[of[-1]]))
    sizes = np.bincount(np.concatenate(of), minlength=model.n_clusters)
    place = np.argsort(np.argsort(-sizes, kind="stable"))
    ordered = place[np.concatenate(of)].astype(np.int64)
    members = [np.flatnonzero(ordered == number) for number in range(int((sizes > 0).sum()))]
    terms = terms_of(index, members)
    return Clusters(
        ordered,
        np.concatenate(closeness),
        distinct_names(terms),
        [each[:MOST_TERMS] for each in terms],
        tried,
    )


def drawn(features: np.ndarray, most: int) -> np.ndarray:
    """fp32 [m, d], at most `most` rows, drawn at random by SEED, in their order."""
    if len(features) <= most:
        return features.astype(np.float32)
    return features[np.sort(np.random.default_rng(SEED).choice(len(features), most, replace=False))].astype(
        np.float32
    )


def k_means(features: np.ndarray, k: int) -> KMeans:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct pictures than k; the empty clusters are left out
        return KMeans(k, n_init=INITS, random_state=SEED).fit(features)


def silhouettes(features: np.ndarray) -> dict[int, float]:
    """k -> the mean silhouette by cosine distance (Rousseeuw 1987), for each k of a geometric range, on
    CHOICE_ROWS pictures.

    k is 2 to MOST_CLUSTERS, and a fifth of the pictures at most; where no k can be judged, as of two
    pictures, it is empty."""
    features = drawn(features, CHOICE_ROWS)
    distances = np.maximum(1 - features @ features.T, 0)
    np.fill_diagonal(distances, 0)
    steps = np.arange(STEPS_PER_DOUBLING * np.log2(MOST_CLUSTERS / 2) + 1)
    ks = np.unique(np.round(2 * 2 ** (steps / STEPS_PER_DOUBLING)).astype(int))
    found = {}
    for k in progress(
        ks[ks <= max(2, len(features) // 5)].tolist(), desc="how many clusters", unit="k", delay=1
    ):
        if k < len(features):
            labels = k_means(features, k).labels_
            if len(np.unique(labels)) > 1:
                found[k] = float(silhouette_score(distances, labels, metric="precomputed"))
    return found


def best_k(silhouettes: dict[int, float]) -> int:
    """The k with the best silhouette; of those within TIE of it the largest, as more clusters tell more. 1
    where none was judged.
    """
    best = max(silhouettes.values(), default=0)
    return max((k for k, score in silhouettes.items() if score >= best - TIE), default=1)


def labels_of(index: Index, column: str) -> np.ndarray:
    """int64 [n], a number for each value of a column, -1 where a picture has none.

    Raises:
        UserError: no such column, or no picture has a value.
    """
    values = (
        index.values(column)
        .combine_chunks()
        .dictionary_encode()
        .indices.fill_null(-1)
        .to_numpy(zero_copy_only=False)
    )
    if (values < 0).all():
        raise UserError(f"--label {column}: no picture of {index.folder} has a value in it")
    return values.astype(np.int64)


def groups_of_several(index: Index) -> np.ndarray | None:
    """int64 [n], the group of each picture, -1 where it is alone in it; None where fewer than two groups have
    several pictures.
    """
    sizes = np.bincount(index.group_of)
    return np.where(sizes[index.group_of] > 1, index.group_of, -1) if (sizes > 1).sum() > 1 else None


def agreement(of: np.ndarray, truth: np.ndarray) -> dict:
    """NMI and ARI of the clusters and other numbers of the same pictures; those that are -1 are left out, and
    not counted.
    """
    known = truth >= 0
    return {
        "pictures": int(known.sum()),
        "values": len(np.unique(truth[known])),
        "nmi": float(normalized_mutual_info_score(truth[known], of[known])),
        "ari": float(adjusted_rand_score(truth[known], of[known])),
    }


def share_of_whole_groups(of: np.ndarray, groups: np.ndarray) -> float:
    """Of the groups of several pictures, the share whose pictures are all in one cluster."""
    both = np.unique(np.stack([groups, of])[:, groups >= 0], axis=1)
    return float((np.unique(both[0], return_counts=True)[1] == 1).mean())


def summary(index: Index, found: Clusters, agreements: dict, alike: Pairs, asked: int | str) -> dict:
    """All figures, as --json writes them; "k" may be less than was asked for, where fewer pictures are
    distinct.
    """
    sizes, n = found.sizes().tolist(), len(index)
    return {
        "index": index.name,
        "model": index.manifest["model"],
        "pictures": n,
        "asked": asked,
        "k": len(sizes),
        "chosen": best_k(found.silhouettes) if found.silhouettes else asked,
        "silhouettes": {str(k): round(score, 4) for k, score in found.silhouettes.items()},
        "silhouettes_of_pictures": min(n, CHOICE_ROWS) if found.silhouettes else 0,
        "learned_of_pictures": min(n, FIT_ROWS),
        "clusters": [
            {"cluster": number, "name": name, "count": count, "share": count / n, "terms": terms}
            for number, (name, count, terms) in enumerate(
                zip(found.names, sizes, found.terms, strict=True), 1
            )
        ],
        "agreement": agreements,
        "near_duplicates": alike.summary(),
    }


def told(result: dict) -> str:
    """The figures for a terminal."""
    tried = result["silhouettes"]
    best = max(tried.values(), default=0)
    how = (
        f", the largest of {len(tried)} numbers tried that is within {TIE:g} of the best silhouette,"
        f" {best:.3f}"
        if tried
        else ""
    )
    lines = [f"{result['k']} clusters of {result['pictures']:,} pictures{how}"]
    lines += [
        f"{each['cluster']:4} {each['count']:9,} {each['share']:7.1%}  {each['name']}"
        for each in result["clusters"]
    ]
    if not any(each["terms"] for each in result["clusters"]):
        lines.append("no caption has a word, so the clusters have numbers for names")
    for what, values in result["agreement"].items():
        whole = (
            f"; {values['whole']:.1%} of these groups are in one cluster each" if "whole" in values else ""
        )
        sized = f"({values['values']:,} {'groups' if whole else 'values'}, {values['pictures']:,} pictures)"
        lines.append(f"NMI {values['nmi']:.3f}, ARI {values['ari']:.3f} with {what} {sized}{whole}")
    return "\n".join([*lines, result["near_duplicates"]["said"]])


def write_csv(path: Path, header: list[str], rows: Iterable[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = comma_separated.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
