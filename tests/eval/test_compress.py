"""A compressed index: search is brute force on its codes, its loss is a difference of two retrievals, and
every command that takes an index takes it.
"""

import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_mistake, call_here
from test_indexing import empty_index
from test_search import HAS_FAISS

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.__main__ import main
from eval.cluster.command import cluster
from eval.embed import Embedded, embed
from eval.options import Inference
from eval.retrieval.score import differences, evaluate_full
from eval.search import compress as compress_module
from eval.search.command import compress, export, search
from eval.search.index import Index
from eval.search.nearest import Nearest
from eval.search.query import text_query
from eval.search.serve import Column, Search, results_of
from train.world import World

DIMS = 8
WAYS = [pytest.param(True, marks=pytest.mark.skipif(not HAS_FAISS, reason="no faiss here")), False]


@pytest.fixture(scope="module")
def small(icon_index, tmp_path_factory):
    """The folder of a compressed index of DIMS dimensions."""
    out = tmp_path_factory.mktemp("compressed") / "small"
    compress(icon_index, out, dims=DIMS)
    return out


def decoded(folder) -> np.ndarray:
    """fp64 [n, d]: the features that the files stand for, in the model's dimensions."""
    codes, matrix, scales = (np.load(folder / f"{name}.npy") for name in ("features", "projection", "scales"))
    assert (codes.dtype, matrix.dtype, scales.dtype) == (np.int8, np.float32, np.float32)
    return codes * scales.astype(np.float64) @ matrix.T.astype(np.float64)


@pytest.mark.parametrize("use_faiss", WAYS)
@pytest.mark.parametrize("dims", [DIMS, 16])  # faiss has other code for multiples of 16
def test_search_is_brute_force_on_the_codes(use_faiss, dims, icon_index, tmp_path):
    compress(icon_index, tmp_path / "small", dims=dims)
    index = Index(tmp_path / "small")
    drawn = torch.randn(7, index.manifest["d"], generator=torch.Generator().manual_seed(0))
    queries = F.normalize(drawn, dim=1)
    scores = queries.double().numpy() @ decoded(index.folder).T
    few = np.arange(len(index)) % 5 == 2
    for rows in (None, few):
        allowed = scores if rows is None else np.where(rows, scores, -np.inf)
        best = -np.sort(-allowed, axis=1)[:, :9]
        found = Nearest(index, use_faiss=use_faiss).top(queries, 9, rows, grouped=False)
        for of_query, expected, hits in zip(scores, best, found, strict=True):
            assert [hit.score for hit in hits] == pytest.approx(expected, abs=2e-6)
            assert of_query[[hit.number for hit in hits]] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("dims", [DIMS, 16])
def test_codes_are_the_features_on_the_axes_to_half_a_step(dims, icon_index, tmp_path):
    """The axes are those of numpy's SVD of the training images; 16 are all of them."""
    original = Index(icon_index)
    compress(icon_index, tmp_path / "small", dims=dims)
    index = Index(tmp_path / "small")
    matrix, scales = index.projection
    train = original.decoded(np.flatnonzero(original.values("split").to_numpy() == "train"))
    _, values, axes = np.linalg.svd(train.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(((train @ matrix) ** 2).sum(0), values[:dims] ** 2, rtol=1e-3, atol=1e-3)
    overlap = matrix.T @ axes[:dims].T  # the sign of an axis is free, and near equal values mix two of them
    np.testing.assert_allclose(overlap @ overlap.T, np.eye(dims), atol=1e-2)
    expected = original.decoded(slice(None)) @ matrix
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    error = np.abs(index.decoded(slice(None)) - expected)
    assert (error <= scales / 2 + 1e-6).all()
    assert error.max() > 0
    np.testing.assert_allclose(index.as_queries(range(len(index))), decoded(index.folder), atol=1e-6)
    np.testing.assert_allclose(index.features, index.stored * scales, atol=1e-3)
    np.testing.assert_allclose(index.as_queries([3]) @ matrix, index.decoded([3]), atol=1e-6)


def test_the_loss_is_the_difference_of_two_retrievals(icon_index, icon_shards, capsys, tmp_path):
    """By evaluate_full() on the shards, with the features of either index."""
    original, shards = Index(icon_index), Shards(icon_shards, "val")
    compress(icon_index, tmp_path / "small", max_loss=1)
    printed = capsys.readouterr().out
    index = Index(tmp_path / "small")
    fewest = compress_module.ladder(original.manifest["d"])[-1]
    assert index.stored.shape[1] == fewest
    whole = embed(original.model(), shards, World(), Inference(workers=0))
    rows = [original.keys.index(shards.key(number)) for number in range(len(shards))]
    scores = []
    for each, texts in (
        (original, whole.text_features),
        (index, whole.text_features @ torch.from_numpy(index.projection.matrix)),
    ):
        embedded = Embedded(torch.from_numpy(each.decoded(rows)), texts, whole.captions)
        scores.append(evaluate_full(embedded, shards.groups, World())[1])
    found = differences(*scores)
    (row,) = [line for line in printed.splitlines() if f"{fewest} at int8" in line]
    cells = [cell.strip() for cell in row.split("|")]
    for k, cell in ((1, cells[5]), (10, cells[7])):
        value, low, high, _ = (100 * number for number in found[f"text_to_image/R@{k}"])
        assert cell == f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        values = scores[1].values[f"text_to_image/R@{k}"]
        assert f"{100 * values.mean():.1f} %" in (cells[4], cells[6])


def test_the_smallest_within_the_loss_is_chosen(tmp_path):
    rungs = [
        compress_module.Rung(dims, {}, {"a": compress_module.Difference(-loss, 0, 0, 1)})
        for dims, loss in ((32, 0.0), (16, 0.02), (8, 0.004), (4, 0.05))
    ]
    chosen = [compress_module.smallest(rungs, loss, tmp_path).dims for loss in (0, 0.004, 0.04, 1)]
    assert chosen == [32, 8, 8, 4]
    with pytest.raises(UserError, match=r"--max-loss 0.001: .* best 0.0040"):
        compress_module.smallest(rungs[1:], 0.001, tmp_path)


def test_commands_take_it(icon_index, small, tmp_path, capsys):
    original, index = Index(icon_index), Index(small)
    assert index.same_corpus(original)
    assert index.thumbnail(3) == original.thumbnail(3)
    assert index.made_by == original.made_by
    search(small, text="bell", k=4, all_variants=True, json=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    exact = decoded(small) @ text_query(index.model(), ["bell"])[0].double().numpy()
    assert [one["score"] for one in found] == pytest.approx(-np.sort(-exact)[:4], abs=2e-6)
    cluster(small, tmp_path / "clusters.html", csv=tmp_path / "clusters.csv")
    with open(tmp_path / "clusters.csv", newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == index.keys
    capsys.readouterr()
    for name in ("x.npy", "x.parquet", "x.sql"):
        export(small, tmp_path / name)
        assert "x.projection.npy" in capsys.readouterr().out
        assert np.array_equal(np.load(tmp_path / "x.projection.npy"), index.projection.matrix)
    assert np.array_equal(np.load(tmp_path / "x.npy"), index.features)
    column = pq.read_table(tmp_path / "x.parquet")["image_features"].to_pylist()
    assert np.array_equal(np.array(column, np.float32), index.features.astype(np.float32))
    sql = (tmp_path / "x.sql").read_text()
    assert f"halfvec({DIMS})" in sql
    (first,) = [line for line in sql.splitlines() if line.startswith("0\t")]
    assert np.array_equal(np.array(json.loads(first.split("\t")[-1]), np.float16), index.features[0])


def test_the_page_shows_it_beside_the_larger_one(icon_index, small):
    columns = [Column(Index(folder), None, ThreadPoolExecutor(1)) for folder in (icon_index, small)]
    found = results_of(columns, Search(like=3, k=5, grouped=False))["results"]
    features = decoded(small)
    exact = np.delete(features @ features[3], 3)
    assert [hit["score"] for hit in found[1]] == pytest.approx(-np.sort(-exact)[:5], abs=2e-6)
    assert found[0] != found[1]


@pytest.mark.skipif(not HAS_FAISS, reason="no faiss here")
def test_an_approximate_index_of_it_has_a_recall(small, tmp_path):
    shutil.copytree(small, tmp_path / "index")
    approximate = Nearest(Index(tmp_path / "index"), approximate=True)
    assert 0.5 < approximate.recall() <= 1
    approximate._inverted_file.nprobe = approximate._inverted_file.nlist
    assert approximate.recall() > 0.97  # its codes are fp16, so near ties may change places


def test_without_val_only_chosen_dimensions_are_written(icon_index, tmp_path, capsys):
    folder = shutil.copytree(icon_index, tmp_path / "index")
    table = pq.read_table(folder / "metadata.parquet")
    at = table.column_names.index("split")
    pq.write_table(table.set_column(at, "split", [["x"] * len(table)]), folder / "metadata.parquet")
    assert_mistake(call_here(main, "compress", folder, "--out", tmp_path / "a"), "split val", "pass --dims")
    compress(folder, tmp_path / "a", dims=4)
    assert "the loss is not measured" in capsys.readouterr().out
    assert Index(tmp_path / "a").stored.shape == (len(table), 4)  # axes of all images, as none is of train


def test_mistakes_are_sentences(icon_index, small, tmp_path):
    def mistake(index, *options, out=tmp_path / "out"):
        return call_here(main, "compress", index, "--out", out, *options)

    assert_mistake(mistake(small), "compressed already")
    assert_mistake(mistake(icon_index, "--dims", 0), "--dims 0: must be from 1 to")
    assert_mistake(mistake(icon_index, "--max-loss", 5), "--max-loss 5", "0.005 is half a point")
    assert_mistake(mistake(icon_index, out=small), "exists already", "--overwrite")
    assert_mistake(mistake(icon_index, "--overwrite", out=icon_index), "would delete")
    assert_mistake(mistake(empty_index(icon_index, tmp_path / "empty")), "holds no images")
    assert not (tmp_path / "out").exists()


CHANGES = {
    "no projection": lambda folder: (folder / "projection.npy").unlink(),
    "too wide": lambda folder: np.save(folder / "projection.npy", np.zeros((999, DIMS), np.float32)),
    "NaN": lambda folder: np.save(folder / "scales.npy", np.full(DIMS, np.nan, np.float32)),
    "huge": lambda folder: np.save(folder / "scales.npy", np.full(DIMS, 1e30, np.float32)),
    "objects": lambda folder: np.save(folder / "scales.npy", np.array([None] * DIMS), allow_pickle=True),
    "other codes": lambda folder: np.save(folder / "features.npy", np.zeros((9, DIMS), np.float16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_one_is_refused(change, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "index")
    CHANGES[change](folder)
    with pytest.raises(UserError, match="make the index again"):
        Index(folder)


@pytest.mark.parametrize("name", ["projection.npy", "scales.npy"])
def test_its_files_are_its_own(name, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "index")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="leads out of this folder"):
        Index(folder)
