"""The page of clusters: a map of pictures as points, and what is on it. cluster.html shows what this hands
over as JSON.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from data_prep.atomic import atomic_file
from data_prep.progress import progress
from eval.cluster.near_duplicates import Pairs
from eval.search.index import Index

TEMPLATE = Path(__file__).with_name("page.html")
SEED, CHUNK_ROWS, FIT_ROWS = 0, 8_192, 32_768
MOST_POINTS, MOST_PICTURES, MOST_PAIRS, FACES = 100_000, 1_500, 30, 8
PICTURE_PX, CAPTION_CHARACTERS = 64, 200  # with 1,500 pictures a page has 2 to 4 MB
FEWEST_FOR_UMAP = 50


def write_page(
    path: Path, index: Index, of: np.ndarray, closeness: np.ndarray, alike: Pairs, result: dict
) -> dict:
    """Write the page.

    Args:
        of: int64 [n], the cluster of each picture, from 0.
        closeness: fp32 [n], cosine of each picture and its cluster's centre.
        result: what eval.cluster.clusters.summary made.

    Returns:
        About the map: "by" what method, "points" drawn, and "pictures" that the page holds.
    """
    pairs = np.flatnonzero(~alike.same_group)[:MOST_PAIRS]
    faces = faces_of(of, closeness, index.group_of)
    others = np.random.default_rng(SEED).permutation(len(index))
    order = np.concatenate([*faces, alike.numbers[pairs].ravel(), others])
    points = order[np.sort(np.unique(order, return_index=True)[1])][
        :MOST_POINTS
    ]  # those with a picture come first
    place = {number: at for at, number in enumerate(points[:MOST_PICTURES].tolist())}
    xy, by = layout(index.features, points)
    drawn = {"by": by, "points": len(points), "pictures": len(place)}
    rows = index.rows(list(place))
    shown = {
        "result": {**result, "map": drawn},
        "points": base64.b64encode(np.column_stack([xy, of[points]]).astype("<u2").tobytes()).decode(),
        "pictures": [
            {
                "key": row["key"],
                "caption": "; ".join(row["captions"])[:CAPTION_CHARACTERS],
                "src": small(index.thumbnail(row["number"])),
            }
            for row in progress(rows, desc="pictures", unit="picture", delay=1)
        ],
        "faces": [[place[number] for number in each.tolist() if number in place] for each in faces],
        "pairs": [
            {
                "pictures": [place[number] for number in alike.numbers[at].tolist()],
                "cosine": round(float(alike.cosines[at]), 4),
            }
            for at in pairs
            if all(number in place for number in alike.numbers[at].tolist())
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without "<" no text ends the element that it stands in, and in ASCII none is read in another encoding.
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    with atomic_file(path) as partial:
        partial.write_text(TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", data), encoding="utf-8")
    return drawn


def faces_of(of: np.ndarray, closeness: np.ndarray, group_of: np.ndarray) -> list[np.ndarray]:
    """Of each cluster the pictures nearest to its centre, at most FACES, each of another group; fewer where
    there are many clusters.
    """
    found, k = [], int(of.max()) + 1
    for number in range(k):
        members = np.flatnonzero(of == number)
        members = members[np.argsort(-closeness[members], kind="stable")]
        firsts = np.sort(np.unique(group_of[members], return_index=True)[1])
        found.append(members[firsts[: min(FACES, max(1, MOST_PICTURES // 2 // k))]])
    return found


def layout(features: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, str]:
    """Places on the map, [m, 2] in whole numbers from 0 to 65535, and what they were found by, for people.

    UMAP (McInnes, Healy and Melville 2018, arXiv:1802.03426) where umap-learn is installed, otherwise the two
    first principal components. Both are the same each time."""
    with threadpool_limits(1):  # threads add up in any order
        if len(numbers) >= FEWEST_FOR_UMAP and (UMAP := _umap()):
            reducer = UMAP(
                metric="cosine",
                random_state=SEED,
                n_jobs=1,
                tqdm_kwds={"desc": "map", "disable": None, "leave": False},
            )
            xy, by = reducer.fit_transform(features[numbers].astype(np.float32)), "UMAP"
        else:
            pca = PCA(min(2, *features[numbers[:FIT_ROWS]].shape), svd_solver="randomized", random_state=SEED)
            with np.errstate(invalid="ignore"):  # one picture, or all the same, have no variance
                pca.fit(
                    features[numbers[:FIT_ROWS]].astype(np.float32)
                )  # beyond the pictures they are in random order
            parts = (numbers[start : start + CHUNK_ROWS] for start in range(0, len(numbers), CHUNK_ROWS))
            xy = np.concatenate([pca.transform(features[part].astype(np.float32)) for part in parts])
            share = np.nan_to_num(pca.explained_variance_ratio_).sum()
            by = f"the two first principal components, which hold {share:.0%} of the variance"
    low, high = np.quantile(
        xy, [0.0002, 0.9998], axis=0
    )  # a few that lie far away would press the others together
    placed = np.clip((xy - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.pad(np.round(placed * 65535), ((0, 0), (0, 2 - xy.shape[1]))), by


def _umap():
    """The class, or None where it is not installed; asked for late, as its import takes seconds."""
    try:
        from umap import UMAP
    except ImportError:
        return None
    return UMAP


def small(thumbnail: bytes) -> str:
    """A data: URI of a picture, no larger than PICTURE_PX."""
    with Image.open(io.BytesIO(thumbnail)) as picture:
        picture.thumbnail((PICTURE_PX, PICTURE_PX))
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=60, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
