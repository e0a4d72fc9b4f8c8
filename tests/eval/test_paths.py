"""Each image is named by its path in the source, from the shards to every output; ids stay ids."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import expect, opened
from conftest import noise_images, png
from PIL import Image
from test_serve import running

from data_prep.build.pipeline import Parallelism, Reading, Splitting, build
from data_prep.inputs.names import key_of
from data_prep.shards import Shards
from eval.cluster.command import cluster
from eval.options import Inference
from eval.search.command import embed, export, search
from eval.search.index import Index
from eval.search.serve import app, open_columns

HERE = Inference(workers=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of twelve images, two of them nearly equal, whose CSV names them by absolute paths and has a
    column `path` of its own.
    """
    folder = tmp_path_factory.mktemp("home") / "someone" / "photos"
    (folder / "deep").mkdir(parents=True)
    noise_images(folder, 11)
    (folder / "10.png").rename(folder / "deep" / "ten é.png")
    near = Image.open(folder / "9.png").convert("RGB")
    near.putpixel((0, 0), (0, 0, 0))
    near.save(folder / "deep" / "near.png")
    names = [*(f"{number}.png" for number in range(10)), "deep/ten é.png", "deep/near.png"]
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "text", "path"])
        writer.writerows([folder / name, f"thing {at}", f"shelf {at}"] for at, name in enumerate(names))
    return folder


@pytest.fixture(scope="module")
def shards(photos) -> Path:
    out = photos.parent / "shards"
    build(
        [str(photos / "pairs.csv")],
        out,
        Reading("file", "text"),
        split=Splitting(0, 0),
        parallelism=Parallelism(1),
        min_shards=1,
    )
    return out


@pytest.fixture(scope="module")
def index(photos, shards, tiny_model) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        embed(tiny_model, shards, photos.parent / "index", inference=HERE)
    return photos.parent / "index"


def files_of(photos: Path) -> set[str]:
    return {str(path.relative_to(photos)) for path in photos.rglob("*.png")}


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_shards_and_index_hold_relative_paths(photos, shards, index):
    train = Shards(shards, "train")
    samples = [train.read(number) for number in range(len(train))]
    assert {sample.path for sample in samples} == files_of(photos)
    assert [sample.key for sample in samples] == [key_of(sample.path) for sample in samples]
    opened_index = Index(index)
    assert opened_index.paths == [sample.path for sample in samples]
    assert opened_index.keys == [sample.key for sample in samples]
    # The data's own column of this name is another one.
    shelves = {row["path"]: row["columns"]["path of the data"] for row in opened_index.rows(range(12))}
    assert shelves["deep/ten é.png"] == "shelf 10"
    written = [path for path in index.rglob("*") if path.name != "manifest.json"]
    for path in (*written, *shards.rglob("*.tar"), *shards.rglob("*.tsv")):
        assert b"someone" not in path.read_bytes(), path  # nothing of the builder's home


def test_search_answers_with_files(photos, index, tmp_path, capsys):
    """Table, JSON and CSV; a user opens the file that is named."""
    search(index, image=photos / "deep" / "ten é.png", k=3, json=tmp_path / "found.json")
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    printed = capsys.readouterr().out
    assert results[0]["path"] == "deep/ten é.png"
    assert results[0]["key"] == key_of("deep/ten é.png")
    for result in results:
        assert f"| {result['path']} " in printed
        assert result["key"] not in printed
    (tmp_path / "queries.csv").write_text("text\nthing\n")
    search(index, queries_csv=tmp_path / "queries.csv", out=tmp_path / "found.csv", k=12)
    found = rows_of(tmp_path / "found.csv")
    assert {row["path"] for row in found} == files_of(photos)
    assert all((photos / row["path"]).is_file() and row["key"] == key_of(row["path"]) for row in found)
    search(index, text="thing", filter=("path=deep/near.png",), json=tmp_path / "one.json")
    assert [row["path"] for row in json.loads((tmp_path / "one.json").read_text())["results"]] == [
        "deep/near.png"
    ]


def test_exports_and_clusters_name_files(photos, index, tmp_path):
    export(index, tmp_path / "x.parquet")
    assert set(pq.read_table(tmp_path / "x.parquet")["path"].to_pylist()) == files_of(photos)
    export(index, tmp_path / "x.npy")
    assert {row["path"] for row in rows_of(tmp_path / "x.csv")} == files_of(photos)
    export(index, tmp_path / "x.sql")
    lines = (tmp_path / "x.sql").read_text().splitlines()
    assert {line.split("\t")[2] for line in lines if line.count("\t") == 7} == files_of(photos)
    cluster(
        index,
        tmp_path / "page.html",
        k=2,
        threshold=-1,
        csv=tmp_path / "of.csv",
        pairs=tmp_path / "pairs.csv",
    )
    assert {row["path"] for row in rows_of(tmp_path / "of.csv")} == files_of(photos)
    first = rows_of(tmp_path / "pairs.csv")[0]
    assert {first["path"], first["other_path"]} == {"9.png", "deep/near.png"}
    assert key_of(first["path"]) == first["key"]


def test_the_page_shows_and_copies_the_path(browser, index, tmp_path):
    cluster(index, tmp_path / "page.html", k=2, threshold=-1)
    with opened(browser, (tmp_path / "page.html").as_uri()) as page:
        first = page.locator("figcaption").first
        expect(first).to_contain_text("deep/near.png")
        expect(first).to_contain_text("9.png")
    with (
        running(app(open_columns([index]))) as url,
        opened(browser, f"{url}/#text=thing", permissions=["clipboard-read"]) as page,
    ):
        page.locator(".card").first.click()
        path = page.locator("#path").inner_text()
        assert path in Index(index).paths
        page.locator("#copy").click()
        expect(page.locator("#copy")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == path


def test_a_folder_of_images_is_named_by_paths(photos, tiny_model, tmp_path):
    (photos / "bad.png").write_bytes(b"no image")
    embed(tiny_model, photos, tmp_path / "index", inference=HERE)
    (photos / "bad.png").unlink()
    assert set(Index(tmp_path / "index").paths) == files_of(photos)
    assert [row["path"] for row in rows_of(tmp_path / "index" / "unreadable.csv")] == ["bad.png"]


def test_files_in_a_table_keep_the_paths_that_they_had(photos, tiny_model, tmp_path, capsys):
    """As data sets on the Hugging Face hub: the row is the image's path, and its file's name is a column."""
    names = ["0.png", "deep/near.png", f"{photos}/deep/ten é.png"]
    cells = [{"bytes": (photos / name).read_bytes(), "path": name} for name in names]
    rows = pa.table({"image": cells, "caption": ["a", "b", "c"]})
    pq.write_table(rows, tmp_path / "table.parquet")
    split = Splitting(0, 0)
    build([str(tmp_path / "table.parquet")], tmp_path / "shards", split=split, parallelism=Parallelism(1))
    embed(tiny_model, tmp_path / "shards", tmp_path / "index", inference=HERE)
    found = Index(tmp_path / "index").rows(range(3))
    assert {row["path"]: row["columns"]["image.path"] for row in found} == {
        "table.parquet#1": "0.png",
        "table.parquet#2": "deep/near.png",
        "table.parquet#3": "ten é.png",  # an absolute path would name the builder's home
    }
    search(tmp_path / "index", text="b", filter=("image.path=deep/near.png",))
    assert "table.parquet#2" in capsys.readouterr().out


def test_old_shards_and_indexes_without_paths_open(index, tiny_model, tmp_path, capsys):
    """An index of format 1, whose column `path` is one of the data; shards whose KEY.json has no image."""
    shutil.copytree(index, tmp_path / "old")
    table = pq.read_table(index / "metadata.parquet").drop_columns("path")
    names = [name.removesuffix(" of the data") for name in table.column_names]
    pq.write_table(table.rename_columns(names), tmp_path / "old" / "metadata.parquet")
    manifest = json.loads((index / "manifest.json").read_text()) | {"index_format": 1}
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    old, new = Index(tmp_path / "old"), Index(index)
    assert old.paths == [""] * 12
    assert old.columns == ["path"]
    for before, now in zip(old.rows(range(12)), new.rows(range(12)), strict=True):
        assert before == {**now, "path": "", "columns": {"path": now["columns"]["path of the data"]}}
    assert old.same_corpus(new)
    search(tmp_path / "old", text="thing", k=2, filter=("path=shelf 3",))
    assert key_of("3.png") in capsys.readouterr().out
    for name in ("x.parquet", "x.npy", "x.sql"):
        export(tmp_path / "old", tmp_path / name)
    cluster(tmp_path / "old", tmp_path / "page.html", k=2, threshold=-1, pairs=tmp_path / "pairs.csv")
    assert rows_of(tmp_path / "pairs.csv")[0]["path"] == ""

    folder = tmp_path / "foreign" / "train"
    folder.mkdir(parents=True)
    from data_prep.shards import FORMAT, Member, write_shard

    data = png(Image.open(io.BytesIO(new.thumbnail(0))))
    members = [Member(f"{number:016x}", data, "png", ["a"], {"captions": ["a"]}, 1) for number in range(2)]
    entry = write_shard(folder / "train-000000.tar", members)
    splits = {"train": {"samples": 2, "captions": 2, "shards": [entry]}}
    (tmp_path / "foreign" / "manifest.json").write_text(json.dumps({"format": FORMAT, "splits": splits}))
    embed(tiny_model, tmp_path / "foreign", tmp_path / "new", inference=HERE)
    assert Index(tmp_path / "new").paths == ["", ""]
