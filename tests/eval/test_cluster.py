"""Clusters of an index: their number, their names, what they agree with, near duplicates, and the page."""

import base64
import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import expect, opened, overflow_px
from conftest import assert_mistake, call_here, png
from PIL import Image
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from threadpoolctl import threadpool_limits

import eval.__main__
import eval.cluster.clusters
import eval.cluster.names
import eval.cluster.near_duplicates
import eval.cluster.page
from eval.cluster.clusters import clusters
from eval.cluster.command import cluster
from eval.cluster.names import distinct_names, terms_of
from eval.cluster.near_duplicates import near_duplicates
from eval.cluster.page import layout
from eval.cluster.summary import share_of_whole_groups
from eval.search.index import Index

EVIL = (
    "</script><script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\"> & \u202e"
    " {{ data }}"
)
THINGS = ["house", "river", "bicycle", "owl", "anchor", "violin", "lantern"]


def write_index(
    folder: Path, features: np.ndarray, captions: list[list[str]], groups=None, **columns
) -> Path:
    """An index of made-up features; each image has one color."""
    n, d = features.shape
    folder.mkdir()
    features = features / np.linalg.norm(features, axis=1, keepdims=True) if n else features
    np.save(folder / "features.npy", features.astype(np.float16))
    images = [png(Image.new("RGB", (9, 7), (number % 256, 90, 200)), "WEBP") for number in range(n)]
    (folder / "thumbnails.bin").write_bytes(b"".join(images))
    np.save(folder / "thumbnails.npy", np.cumsum([0, *map(len, images)]))
    table = {
        "key": pa.array([f"{number:05d}" for number in range(n)], pa.string()),
        "split": pa.array(["train"] * n, pa.string()),
        "group": pa.array(range(n) if groups is None else groups, pa.int64()),
        "captions": pa.array(captions, pa.list_(pa.string())),
        **{name: pa.array(values, pa.string()) for name, values in columns.items()},
    }
    pq.write_table(pa.table(table), folder / "metadata.parquet")
    manifest = {
        "index_format": 1,
        "model": "made:up",
        "model_sha256": "0",
        "data": "none",
        "data_sha256": "0",
        "n": n,
        "d": d,
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "thumbnail_px": 9}))
    return folder


def blobs(
    folder: Path, k: int = 7, each: int = 30, d: int = 24, captions=None, spread: float = 0.1, **columns
) -> Path:
    """Images in k well separated clusters, in turn; captions of cluster i name THINGS[i]."""
    rng = np.random.default_rng(3)
    of = np.arange(k * each) % k
    features = np.linalg.qr(rng.standard_normal((d, d)))[0][of] + spread * rng.standard_normal((k * each, d))
    captions = captions or [[f"a photo of the {THINGS[number]} {at // k}"] for at, number in enumerate(of)]
    return write_index(folder, features, captions, **columns)


def data_of(page: Path) -> dict:
    """The data in a page."""
    found = re.search(
        r'<script type="application/json" id="data">([^<]*)</script>', page.read_text(encoding="utf-8")
    )
    return json.loads(found[1])


def table_of(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ari_by_pairs(first, second) -> float:
    """The adjusted Rand index by looking at every pair (Hubert and Arabie 1985)."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    same = [(first[a] == first[b], second[a] == second[b]) for a, b in pairs]
    both, one, other = (sum(map(each, same)) for each in (all, lambda pair: pair[0], lambda pair: pair[1]))
    expected = one * other / len(pairs)
    return (both - expected) / ((one + other) / 2 - expected)


def test_auto_finds_how_many_there_are_and_names_them(tmp_path, capsys):
    kinds = [None if at % 10 == 9 else f"kind {at % 7 // 2}" for at in range(210)]
    folder = blobs(
        tmp_path / "index",
        kind=kinds,
        groups=[at // 14 * 7 + at % 7 if at < 70 else 1000 + at for at in range(210)],
    )
    cluster(
        folder,
        tmp_path / "page.html",
        label_column="kind",
        csv=tmp_path / "of.csv",
        json=tmp_path / "all.json",
    )
    result, rows = json.loads((tmp_path / "all.json").read_text()), table_of(tmp_path / "of.csv")
    assert result["k"] == result["chosen_k"] == 7
    assert max(result["silhouettes"], key=result["silhouettes"].get) == "7"
    assert [row["key"] for row in rows] == [f"{number:05d}" for number in range(210)]
    assert ari_by_pairs([row["cluster"] for row in rows], [at % 7 for at in range(210)]) == 1
    names = {each["cluster"]: each["name"] for each in result["clusters"]}
    assert len(set(names.values())) == 7
    for at, row in enumerate(rows):
        assert row["name"] == names[int(row["cluster"])]
        assert THINGS[at % 7] in row["name"].split(", ")[0]
    known = [at for at in range(210) if kinds[at]]
    pair = [kinds[at] for at in known], [rows[at]["cluster"] for at in known]
    column = result["agreement"]["column kind"]
    assert (column["images"], column["values"]) == (189, 4)
    assert column["nmi"] == pytest.approx(normalized_mutual_info_score(*pair), abs=1e-12)
    assert (
        column["ari"]
        == pytest.approx(adjusted_rand_score(*pair), abs=1e-12)
        == pytest.approx(ari_by_pairs(*pair), abs=1e-12)
    )
    several = result["agreement"]["groups of several images"]
    assert (several["images"], several["values"], several["whole"]) == (70, 35, 1)
    assert f"NMI {column['nmi']:.3f}" in capsys.readouterr().out


def test_torn_groups_are_counted():
    of, groups = np.array([0, 0, 1, 1, 2, 0]), np.array([5, 5, 6, 6, 6, -1])
    assert share_of_whole_groups(of, groups) == 0.5


def test_names_are_by_class_based_tf_idf(tmp_path):
    captions = [
        ["Red owl", "owl, at night"],
        ["red house"],
        ["the red owl"],
        ["blue river"],
        ["blue river", "a wide river"],
        [],
    ]
    index = Index(write_index(tmp_path / "index", np.eye(6), captions))
    terms = [
        ["red", "owl", "red owl", "night", "owl night", "red", "house", "red house", "red", "owl", "red owl"],
        ["blue", "river", "blue river", "blue", "river", "blue river", "wide", "wide river"],
    ]
    in_all = Counter(itertools.chain(*terms))
    scores = [
        {term: n * math.log(1 + (19 / 2) / in_all[term]) for term, n in Counter(each).items()}
        for each in terms
    ]
    ours = terms_of(index, [np.array([0, 1, 2]), np.array([3, 4, 5])])
    assert (
        scores[0]["red"]
        > scores[0]["red owl"]
        == scores[0]["owl"]
        > scores[0]["night"]
        == scores[0]["owl night"]
    )
    # each by score, without those that repeat a word
    assert ours == [["red", "owl", "house", "night"], ["blue river", "wide"]]


def test_what_is_frequent_everywhere_names_no_cluster(tmp_path):
    captions = [[f"red {thing}"] for thing in [*THINGS, *["lamp"] * 7]]
    index, members = (
        Index(write_index(tmp_path / "index", np.eye(14), captions)),
        [np.arange(7), np.arange(7, 14)],
    )
    # so the formula alone would call the first cluster "red"
    assert 7 * math.log(1 + 21 / 14) > math.log(1 + 21 / 1)
    assert [each[0] for each in terms_of(index, members)] == ["red anchor", "red lamp"]


def test_names_differ():
    same = [
        ["sea", "sky", "sun", "sand"],
        ["sea", "sky", "sun", "salt"],
        ["sea", "sky", "sun"],
        [],
        [],
        ["x" * 99],
    ]
    assert distinct_names(same) == [
        "sea, sky, sun",
        "sea, sky, sun, salt",
        "sea, sky, sun (3)",
        "cluster 4",
        "cluster 5",
        "x" * 40,
    ]


@pytest.mark.parametrize("tile", [7, 2048])
def test_near_duplicates_are_all_pairs_once(tmp_path, monkeypatch, tile):
    monkeypatch.setattr(eval.cluster.near_duplicates, "TILE_ROWS", tile)
    index = Index(blobs(tmp_path / "index", k=5, each=11, groups=[at % 9 for at in range(55)]))
    features = np.asarray(index.features, np.float32)
    cosines = features @ features.T
    expected = {
        (a, b): cosines[a, b] for a, b in itertools.combinations(range(55), 2) if cosines[a, b] >= 0.75
    }
    found = near_duplicates(index, 0.75)
    assert 0 < found.count == len(expected) == len(found.numbers) < 55 * 54 / 2
    assert {tuple(pair) for pair in found.numbers.tolist()} == set(expected)
    np.testing.assert_allclose(
        found.cosines, [expected[tuple(pair)] for pair in found.numbers.tolist()], rtol=1e-5
    )
    assert (np.diff(found.cosines) < 1e-4).all()
    assert found.same_group.tolist() == [a % 9 == b % 9 for a, b in found.numbers.tolist()]
    monkeypatch.setattr(eval.cluster.near_duplicates, "MAX_PAIRS", 10)
    fewer = near_duplicates(index, 0.75)
    assert (fewer.count, fewer.numbers.tolist()) == (found.count, found.numbers[:10].tolist())
    assert "only the 10 most similar" in fewer.summary()["message"]


def test_the_same_index_gives_the_same_bytes(tmp_path, icon_index):
    names = {"page": "page.html", "csv": "of.csv", "pairs": "pairs.csv", "json": "all.json"}
    for threads in (1, 2):
        with threadpool_limits(threads):
            cluster(
                icon_index,
                threshold=0.99,
                label_column="set",
                **{what: tmp_path / str(threads) / name for what, name in names.items()},
            )
    for name in names.values():
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()

    index, result = Index(icon_index), json.loads((tmp_path / "1" / "all.json").read_text())
    rows, shown = table_of(tmp_path / "1" / "of.csv"), data_of(tmp_path / "1" / "page.html")
    assert [row["key"] for row in rows] == index.keys
    assert Counter(int(row["cluster"]) for row in rows) == {
        each["cluster"]: each["count"] for each in result["clusters"]
    }
    assert len({each["name"] for each in result["clusters"]}) == result["k"] > 1
    assert [each["count"] for each in result["clusters"]] == sorted(
        (each["count"] for each in result["clusters"]), reverse=True
    )
    words = {
        word
        for row in index.rows(range(len(index)))
        for caption in row["captions"]
        for word in re.findall(r"\w+", caption.lower())
    }
    assert {word for each in result["clusters"] for term in each["terms"] for word in term.split()} <= words
    assert (
        len(table_of(tmp_path / "1" / "pairs.csv"))
        == result["near_duplicates"]["pairs"]
        == result["near_duplicates"]["listed"]
    )

    places = np.frombuffer(base64.b64decode(shown["points"]), "<u2").reshape(-1, 3)
    assert shown["result"] == result
    assert len(places) == len(shown["images"]) == len(index)
    at = {key: number for number, key in enumerate(index.keys)}
    for image, (_, _, of) in zip(shown["images"], places.tolist(), strict=True):
        assert str(of + 1) == rows[at[image["key"]]]["cluster"]
        thumbnail = Image.open(
            io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/webp;base64,"), validate=True))
        )
        assert max(thumbnail.size) <= eval.cluster.page.IMAGE_PX
    for number, faces in enumerate(shown["examples"]):
        assert 0 < len(faces) <= eval.cluster.page.MAX_EXAMPLES
        assert set(places[faces, 2].tolist()) == {number}
    for pair in shown["pairs"]:
        first, second = (
            index.features[at[shown["images"][which]["key"]]].astype(np.float32) for which in pair["images"]
        )
        assert pair["cosine"] == pytest.approx(float(first @ second), abs=1e-4)


def test_threads_change_nothing(tmp_path):
    index = Index(blobs(tmp_path / "index", each=600, spread=1.0))
    found = []
    for threads in (1, 4, 4, 4):
        with threadpool_limits(threads):
            found.append(
                clusters(index, 20).closeness.tobytes()
                + layout(index.features, np.arange(len(index)))[0].tobytes()
            )
    assert len(set(found)) == 1


def test_chunks_and_limits(tmp_path, monkeypatch):
    index = Index(blobs(tmp_path / "index", spread=0.2))
    whole, (places, _) = clusters(index, 7), layout(index.features, np.arange(210))
    monkeypatch.setattr(eval.cluster.clusters, "CHUNK_ROWS", 11)
    monkeypatch.setattr(eval.cluster.names, "ROWS_AT_ONCE", 11)
    monkeypatch.setattr(eval.cluster.page, "CHUNK_ROWS", 11)
    chunked = clusters(index, 7)
    assert (whole.cluster_of.tolist(), whole.names) == (chunked.cluster_of.tolist(), chunked.names)
    np.testing.assert_allclose(layout(index.features, np.arange(210))[0], places, atol=1)
    monkeypatch.setattr(eval.cluster.clusters, "FIT_ROWS", 100)
    assert ari_by_pairs(clusters(index, 7).cluster_of, whole.cluster_of) == 1
    monkeypatch.setattr(eval.cluster.page, "MAX_POINTS", 120)
    monkeypatch.setattr(eval.cluster.page, "MAX_IMAGES", 70)
    cluster(index.folder, tmp_path / "page.html", k=7, csv=tmp_path / "of.csv")
    shown = data_of(tmp_path / "page.html")
    assert shown["result"]["map"] | {"method": ""} == {"method": "", "points": 120, "images": 70}
    assert len(base64.b64decode(shown["points"])) == 120 * 3 * 2
    assert (len(shown["images"]), [len(each) for each in shown["examples"]]) == (70, [5] * 7)
    assert len(table_of(tmp_path / "of.csv")) == 210


def test_captions_are_shown_as_text(browser, tmp_path):
    captions = [[EVIL] for _ in range(90)]
    cluster(
        blobs(tmp_path / "index", k=3, captions=captions, kind=[EVIL, "b"] * 45),
        tmp_path / "page.html",
        label_column="kind",
        threshold=0.5,
    )
    source, shown = (tmp_path / "page.html").read_text(encoding="utf-8"), data_of(tmp_path / "page.html")
    assert {each["caption"] for each in shown["images"]} == {EVIL}
    assert source.count("<script") == source.count("</script>") == 2
    assert "innerHTML" not in source
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", source)
    with opened(browser, (tmp_path / "page.html").as_uri(), viewport={"width": 390, "height": 800}) as page:
        expect(page).to_have_title("Clusters of index")
        expect(page.locator("ol button[aria-pressed=false]")).to_have_count(shown["result"]["k"])
        expect(page.locator("figure")).to_have_count(len(shown["pairs"]))
        page.locator("ol button").first.click()
        expect(page.locator("ol button[aria-pressed=true]")).to_have_count(1)
        page.locator("canvas").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#card bdi")).to_have_text(EVIL)
        assert overflow_px(page) == 0
    assert len(shown["pairs"]) > 0


def test_few_images_and_no_captions(tmp_path, capsys):
    for n in (1, 2, 3, 60):
        alone = write_index(tmp_path / str(n), np.ones((n, 8)), [[] for _ in range(n)])
        cluster(alone, tmp_path / f"{n}.html")
        assert data_of(tmp_path / f"{n}.html")["result"]["clusters"] == [
            {"cluster": 1, "name": "cluster 1", "count": n, "share": 1.0, "terms": []}
        ]
        assert "the captions have no words" in capsys.readouterr().out
    cluster(
        write_index(tmp_path / "twice", np.eye(4)[[0, 1, 2, 0, 1, 2]], [["a cat"]] * 6),
        tmp_path / "twice.html",
        k=5,
    )
    assert (
        data_of(tmp_path / "twice.html")["result"]["k"],
        data_of(tmp_path / "twice.html")["result"]["requested_k"],
    ) == (3, 5)


def test_mistakes(tmp_path):
    small = blobs(tmp_path / "small", k=3, each=2, kind=[None] * 6)
    empty = write_index(tmp_path / "empty", np.zeros((0, 8)), [])
    page = ("--page", tmp_path / "page.html")
    for index, options, words in (
        (empty, (), "holds no images"),
        (small, ("--k", 7), "--k 7: must be at most 6"),
        (small, ("--k", 0), "must be at least 1, or auto"),
        (small, ("--label-column", "color"), "no column 'color'.* kind"),
        (small, ("--label-column", "kind"), "--label-column kind: no image"),
        (small, ("--threshold", 97), "--threshold 97.0: must be a cosine"),
        (tmp_path / "none", (), "no index there"),
    ):
        result = call_here(eval.__main__.main, "cluster", index, *page, *options)
        assert_mistake(result)
        assert re.search(words, result.stderr), result.stderr
    assert not (tmp_path / "page.html").exists()


def test_umap_is_the_same_each_time():
    pytest.importorskip("umap")
    features = np.random.default_rng(0).standard_normal((80, 8)).astype(np.float16)
    (first, by), (second, _) = layout(features, np.arange(80)), layout(features, np.arange(80))
    assert by == "UMAP"
    np.testing.assert_array_equal(first, second)
