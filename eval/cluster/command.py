"""The command cluster: options and help. scikit-learn and torch are imported when it runs."""

from typing import Annotated, Literal

import tyro

from data_prep.cli import Index, OptionalOutputFile, OutputFile
from data_prep.errors import UserError
from data_prep.terminal import say


def cluster(
    index: Annotated[Index, tyro.conf.Positional],
    page: OutputFile,
    k: int | Literal["auto"] = "auto",
    label_column: str = "",
    threshold: float = 0.97,
    csv: OptionalOutputFile = None,
    pairs: OptionalOutputFile = None,
    json: OptionalOutputFile = None,
) -> None:
    """Cluster the images of an index: named clusters, a map and near duplicates on one page.

    Names are the words of captions that distinguish a cluster. The map is by UMAP if umap-learn is installed,
    otherwise by PCA. The same index gives the same page, byte for byte.

      python -m eval cluster indexes/icons --page clusters.html --label-column set
      python -m eval cluster indexes/icons --page clusters.html --k 20 --csv clusters.csv --pairs pairs.csv

    Args:
        index: Folder that `python -m eval embed` made.
        page: HTML file to write; it loads nothing from elsewhere.
        k: Number of clusters. auto tries 2 to 64 and takes the largest whose silhouette is within 5 % of the
            best.
        label_column: Column of the data to compare the clusters with (NMI and ARI).
        threshold: Smallest cosine of near duplicates; a good value depends on the model.
        csv: File to write each image's key, path, cluster and cluster name to.
        pairs: CSV to write the near duplicates to, most similar first.
        json: File to write all figures to.
    """
    if k != "auto" and k < 1:
        raise UserError(f"--k {k}: must be at least 1, or auto")
    if not -1 <= threshold <= 1:
        raise UserError(f"--threshold {threshold}: must be a cosine, at most 1, such as 0.97")
    from data_prep.atomic import write_json
    from data_prep.sheets import check_csv, write_csv
    from eval.cluster.near_duplicates import PAIR_COLUMNS
    from eval.cluster.summary import CLUSTER_COLUMNS, analyze, report

    check_csv("--csv", csv, CLUSTER_COLUMNS)
    check_csv("--pairs", pairs, PAIR_COLUMNS)
    analysis = analyze(index, None if k == "auto" else k, label_column, threshold)
    result = analysis.write_page(page)
    say(report(result))
    if csv:
        write_csv(csv, CLUSTER_COLUMNS, analysis.cluster_rows())
    if pairs:
        write_csv(pairs, PAIR_COLUMNS, analysis.pairs.rows(analysis.index))
    if json:
        write_json(json, result)
    say(f"page: {page}")
