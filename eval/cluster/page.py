"""The page of clusters: a map of images as points, drawn by page.html from the JSON written into it."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from data_prep import html
from data_prep.progress import progress
from eval.cluster.clusters import Clusters
from eval.cluster.near_duplicates import Pairs
from eval.search.index import Index

TEMPLATE = Path(__file__).with_name("page.html")
SEED, CHUNK_ROWS, FIT_ROWS = 0, 8_192, 32_768
MAX_POINTS, MAX_IMAGES, MAX_PAIRS, MAX_EXAMPLES = 100_000, 1_500, 30, 8
IMAGE_PX, CAPTION_CHARACTERS = 64, 200  # with 1,500 images a page has 2 to 4 MB
MIN_UMAP_POINTS = 50


def write_page(path: Path, index: Index, clusters: Clusters, near: Pairs, result: dict) -> dict:
    """Write the page.

    Args:
        result: What eval.cluster.summary returns.

    Returns:
        About the map: "method", "points" drawn, and "images" that the page holds.
    """
    pairs = np.flatnonzero(~near.same_group)[:MAX_PAIRS]
    examples = examples_of(clusters.cluster_of, clusters.closeness, index.group_of)
    rest = np.random.default_rng(SEED).permutation(len(index))
    order = np.concatenate([*examples, near.numbers[pairs].ravel(), rest])
    order = order[np.sort(np.unique(order, return_index=True)[1])]  # each image once
    points = order[:MAX_POINTS]  # the first MAX_IMAGES of them come with their image
    position = {number: at for at, number in enumerate(points[:MAX_IMAGES].tolist())}
    xy, method = layout(index.features, points)
    drawn = {"method": method, "points": len(points), "images": len(position)}
    placed = np.column_stack([xy, clusters.cluster_of[points]]).astype("<u2")
    data = {
        "result": {**result, "map": drawn},
        "points": base64.b64encode(placed.tobytes()).decode(),
        "images": images_of(index, list(position)),
        "examples": [
            [position[number] for number in numbers.tolist() if number in position] for numbers in examples
        ],
        "pairs": [
            {
                "images": [position[number] for number in near.numbers[pair].tolist()],
                "cosine": round(float(near.cosines[pair]), 4),
            }
            for pair in pairs
            if all(number in position for number in near.numbers[pair].tolist())
        ],
    }
    html.write_page(path, TEMPLATE, title=f"Clusters of {index.name}", data=data)
    return drawn


def images_of(index: Index, numbers: list[int]) -> list[dict]:
    """{"key", "path", "caption", "src"} of each image."""
    rows = progress(index.rows(numbers), desc="images", unit="image", delay=1)
    return [
        {
            "key": row["key"],
            "path": row["path"],
            "caption": "; ".join(row["captions"])[:CAPTION_CHARACTERS],
            "src": small_uri(index.thumbnail(row["number"])),
        }
        for row in rows
    ]


def examples_of(cluster_of: np.ndarray, closeness: np.ndarray, group_of: np.ndarray) -> list[np.ndarray]:
    """Of each cluster the images nearest to its centre, from different groups.

    At most MAX_EXAMPLES, and fewer if there are many clusters.
    """
    examples, k = [], int(cluster_of.max()) + 1
    limit = min(MAX_EXAMPLES, max(1, MAX_IMAGES // 2 // k))
    for number in range(k):
        members = np.flatnonzero(cluster_of == number)
        members = members[np.argsort(-closeness[members], kind="stable")]
        firsts = np.sort(np.unique(group_of[members], return_index=True)[1])
        examples.append(members[firsts[:limit]])
    return examples


def layout(features: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, str]:
    """Positions on the map, [m, 2] in whole numbers from 0 to 65535, and the method, in words.

    UMAP (McInnes, Healy and Melville 2018, arXiv:1802.03426) if umap-learn is installed, otherwise the first
    two principal components. Both are reproducible.
    """
    with threadpool_limits(1):  # threads add up in any order
        if len(numbers) >= MIN_UMAP_POINTS and (UMAP := _umap()):
            bar = {"desc": "map", "disable": None, "leave": False}
            reducer = UMAP(metric="cosine", random_state=SEED, n_jobs=1, tqdm_kwds=bar)
            xy, method = reducer.fit_transform(features[numbers].astype(np.float32)), "UMAP"
        else:
            xy, method = _principal_components(features, numbers)
    # A few outliers would squeeze the others together.
    low, high = np.quantile(xy, [0.0002, 0.9998], axis=0)
    scaled = np.clip((xy - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.pad(np.round(scaled * 65535), ((0, 0), (0, 2 - xy.shape[1]))), method


def _principal_components(features: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, str]:
    sample = features[numbers[:FIT_ROWS]].astype(np.float32)  # beyond the examples, `numbers` are shuffled
    pca = PCA(min(2, *sample.shape), svd_solver="randomized", random_state=SEED)
    with np.errstate(invalid="ignore"):  # a single image, or equal ones, have no variance
        pca.fit(sample)
    parts = (numbers[start : start + CHUNK_ROWS] for start in range(0, len(numbers), CHUNK_ROWS))
    xy = np.concatenate([pca.transform(features[part].astype(np.float32)) for part in parts])
    share = np.nan_to_num(pca.explained_variance_ratio_).sum()
    return xy, f"the first two principal components ({share:.0%} of the variance)"


def _umap():
    """The class, or None if it is not installed; imported late, as that takes seconds."""
    try:
        from umap import UMAP
    except ImportError:
        return None
    return UMAP


def small_uri(thumbnail: bytes) -> str:
    """A data: URI of an image, its longer side at most IMAGE_PX."""
    with Image.open(io.BytesIO(thumbnail)) as image:
        image.thumbnail((IMAGE_PX, IMAGE_PX))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=60, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
