"""The analysis of an index: clusters, agreement with labels, near duplicates, and all figures as a dict."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from data_prep.errors import UserError
from data_prep.tables import markdown_table, percent
from eval.cluster.clusters import FIT_ROWS, SILHOUETTE_ROWS, TOLERANCE, Clusters, best_k, clusters
from eval.cluster.near_duplicates import Pairs, near_duplicates
from eval.cluster.page import write_page
from eval.search.index import Index, open_index

CLUSTER_COLUMNS = ["key", "path", "cluster", "name"]


@dataclass(frozen=True)
class Analysis:
    """What is known of an index.

    Attributes:
        requested_k: None for auto.
        agreements: Description -> figures of agreement() with a column or with groups.
    """

    index: Index
    requested_k: int | None
    clusters: Clusters
    agreements: dict[str, dict]
    pairs: Pairs

    def write_page(self, path: Path) -> dict:
        """Write the page; all figures, with "map" from eval.cluster.page.write_page."""
        result = self.summary()
        drawn = write_page(path, self.index, self.clusters, self.pairs, result)
        return {**result, "map": drawn}

    def cluster_rows(self) -> Iterator[list]:
        """CLUSTER_COLUMNS of each image; clusters are counted from 1."""
        index, cluster_of = self.index, self.clusters.cluster_of.tolist()
        for key, path, number in zip(index.keys, index.paths, cluster_of, strict=True):
            yield [key, path, number + 1, self.clusters.names[number]]

    def summary(self) -> dict:
        """All figures. "k" is below "requested_k" if fewer images are distinct."""
        sizes, n, silhouettes = self.clusters.sizes().tolist(), len(self.index), self.clusters.silhouettes
        described = zip(self.clusters.names, sizes, self.clusters.terms, strict=True)
        return {
            "index": self.index.name,
            "model": self.index.manifest["model"],
            "images": n,
            "requested_k": self.requested_k or "auto",
            "k": len(sizes),
            "chosen_k": best_k(silhouettes) if silhouettes else self.requested_k,
            "silhouettes": {str(k): round(score, 4) for k, score in silhouettes.items()},
            "silhouette_tolerance": TOLERANCE,
            "silhouette_images": min(n, SILHOUETTE_ROWS) if silhouettes else 0,
            "fitted_images": min(n, FIT_ROWS),
            "clusters": [
                {"cluster": number, "name": name, "count": count, "share": count / n, "terms": terms}
                for number, (name, count, terms) in enumerate(described, 1)
            ],
            "agreement": self.agreements,
            "near_duplicates": self.pairs.summary(),
        }


def analyze(folder: Path, k: int | None, label_column: str, threshold: float) -> Analysis:
    """Cluster an index; see eval.cluster.command.cluster.

    Raises:
        UserError: There is no index, k is too large, or the column has no values.
    """
    index = open_index(folder)
    if k and k > len(index):
        raise UserError(f"--k {k}: must be at most {len(index)}, the number of images in {folder}")
    labels = labels_of(index, label_column) if label_column else None
    clustered = clusters(index, k)
    agreements = {}
    if labels is not None:
        agreements[f"column {label_column}"] = agreement(clustered.cluster_of, labels)
    if (groups := groups_of_several(index)) is not None:
        agreements["groups of several images"] = {
            **agreement(clustered.cluster_of, groups),
            "whole": share_of_whole_groups(clustered.cluster_of, groups),
        }
    return Analysis(index, k, clustered, agreements, near_duplicates(index, threshold))


def labels_of(index: Index, column: str) -> np.ndarray:
    """int64 [n], a number for each value of a column, -1 where an image has none.

    Raises:
        UserError: No such column, or no image has a value.
    """
    encoded = index.values(column).combine_chunks().dictionary_encode().indices
    labels = encoded.fill_null(-1).to_numpy(zero_copy_only=False)
    if (labels < 0).all():
        raise UserError(f"--label-column {column}: no image of {index.folder} has a value in it")
    return labels.astype(np.int64)


def groups_of_several(index: Index) -> np.ndarray | None:
    """int64 [n], the group of each image, -1 for groups of one; None if fewer than two have several."""
    sizes = np.bincount(index.group_of)
    return np.where(sizes[index.group_of] > 1, index.group_of, -1) if (sizes > 1).sum() > 1 else None


def agreement(cluster_of: np.ndarray, labels: np.ndarray) -> dict:
    """NMI and ARI of clusters and labels, int64 [n]; images with the label -1 are not counted."""
    known = labels >= 0
    return {
        "images": int(known.sum()),
        "values": len(np.unique(labels[known])),
        "nmi": float(normalized_mutual_info_score(labels[known], cluster_of[known])),
        "ari": float(adjusted_rand_score(labels[known], cluster_of[known])),
    }


def share_of_whole_groups(cluster_of: np.ndarray, groups: np.ndarray) -> float:
    """Share of the groups (other than -1) whose images are all in one cluster."""
    pairs = np.unique(np.stack([groups, cluster_of])[:, groups >= 0], axis=1)
    return float((np.unique(pairs[0], return_counts=True)[1] == 1).mean())


def report(result: dict) -> str:
    """The figures for the terminal."""
    tried = result["silhouettes"]
    how = ""
    if tried:
        how = (
            f", the largest of {len(tried)} tried whose silhouette is within {TOLERANCE:.0%} of the best,"
            f" {max(tried.values()):.3f}"
        )
    rows = [
        [f"{cluster['cluster']}  {cluster['name']}", f"{cluster['count']:,}", percent(cluster["share"])]
        for cluster in result["clusters"]
    ]
    lines = [f"{result['k']} clusters of {result['images']:,} images{how}", ""]
    lines += [markdown_table(["cluster", "images", "%"], rows), ""]
    if not any(cluster["terms"] for cluster in result["clusters"]):
        lines.append("the captions have no words, so clusters are named by number")
    for description, values in result["agreement"].items():
        unit, whole = "values", ""
        if "whole" in values:
            unit, whole = "groups", f"; {values['whole']:.1%} of these groups are within one cluster"
        counts = f"({values['values']:,} {unit}, {values['images']:,} images)"
        lines.append(f"NMI {values['nmi']:.3f}, ARI {values['ari']:.3f} with {description} {counts}{whole}")
    return "\n".join([*lines, result["near_duplicates"]["message"]])
