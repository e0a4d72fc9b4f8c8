"""Labelled evaluation reads what `data_prep build` reads, by the same options."""

import base64
import contextlib
import io
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from conftest import assert_mistake, call_here
from labelled_formats import CLASSES, as_csv, as_parquet, labelled_images
from pyarrow import parquet
from test_labelled import contents

from data_prep.build.pipeline import Parallelism, Reading, build
from data_prep.errors import UserError
from eval.__main__ import main
from eval.classify.command import linear_probe, zeroshot
from eval.classify.labelled import read_labelled
from eval.compare.command import compare
from eval.options import Inference, LabelledTable

INFERENCE = Inference(64, 0)


@pytest.fixture(scope="module")
def images():
    return labelled_images()


def moved(folder: Path, images) -> str:
    """A tab-separated .csv in latin-1 in another folder than its images, with columns of other names, and one
    absolute path.
    """
    text = as_csv(folder / "set", images).read_text()
    text = text.replace("image,label", "path\tkind").replace(",", "\t").replace(CLASSES[0], "Citroën")
    text = text.replace("images/3.png", str(folder / "set" / "images" / "3.png"))
    (folder / "tables").mkdir()
    (folder / "tables" / "labels.csv").write_bytes(text.encode("latin-1"))
    return str(folder / "tables" / "labels.csv")


def test_all_commands_read_a_table_by_the_same_options(images, tiny_model, icon_shards, tmp_path):
    place, test = moved(tmp_path / "a", images), moved(tmp_path / "b", labelled_images(1))
    table = LabelledTable("path", "kind", str(tmp_path), "latin-1")
    for file, name in ((place, "a"), (test, "b")):  # relative to the folder of both
        text = Path(file).read_bytes().replace(b"\nimages/", b"\n" + name.encode() + b"/set/images/")
        Path(file).write_bytes(text)
    with contextlib.redirect_stdout(io.StringIO()):
        zeroshot((tiny_model,), place, table=table, json=tmp_path / "z.json", inference=INFERENCE)
        linear_probe(
            tiny_model,
            place,
            test_data=test,
            table=table,
            cache=tmp_path / "cache",
            json=tmp_path / "p.json",
            inference=INFERENCE,
        )
        compare(
            (tiny_model, tiny_model),
            icon_shards,
            "val",
            tmp_path / "comparison",
            labelled=place,
            table=table,
            inference=INFERENCE,
        )
    metrics = json.loads((tmp_path / "z.json").read_text())["models"][0]["metrics"]
    compared = json.loads((tmp_path / "comparison" / "compare.json").read_text())["models"]
    assert [model["zeroshot"]["metrics"] for model in compared] == [metrics, metrics]
    assert json.loads((tmp_path / "p.json").read_text())["n_images"] == len(images)
    reading = Reading("path", "kind", images=str(tmp_path), encoding="latin-1")
    assert build([place], tmp_path / "shards", reading, parallelism=Parallelism(1))["records"] == len(images)


def test_mistakes_name_options_that_the_command_has(images, tiny_model, tmp_path):
    place = moved(tmp_path, images)
    command = ("zeroshot", tiny_model, "--data", place)
    assert_mistake(
        call_here(main, *command),
        "no column 'image', 'label'; it has 'path', 'kind'; pass --image-column path --label-column NAME",
    )
    command += ("--image-column", "path", "--label-column", "kind")
    wrong = call_here(main, *command, "--encoding", "ascii")
    assert_mistake(wrong, "labels.csv:2: byte", "is not ascii; pass --encoding, for example latin-1")
    assert_mistake(call_here(main, *command, "--encoding", "latin1"), "missing file", "see --images")


def test_data_sets_of_the_hub_and_tables_behind_a_url(hub, served, images, tmp_path):
    names = ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"]
    parts = [images[:12], images[5:15]]  # no image of class 2 in the first
    files = {name: as_parquet(tmp_path / name, part) for name, part in zip(names, parts, strict=True)}
    hub.put("datasets/me/cars", {name: file.read_bytes() for name, file in files.items()})
    for name, split in zip(names, ("train", "test"), strict=True):
        remote, local = read_labelled("hf://datasets/me/cars", split), read_labelled(tmp_path / name)
        assert contents(remote) == contents(local)
        assert (remote.classes, remote.sha256) == (CLASSES, local.sha256)
        assert read_labelled(f"hf://datasets/me/cars/{name}").sha256 == local.sha256
    with pytest.raises(UserError, match=r"me/cars: no split 'val'; pass one of test, train as its split"):
        read_labelled("hf://datasets/me/cars", "val")
    folder, url = served
    csv = as_csv(folder / "csv", images)
    over_http = read_labelled(f"{url}/csv/labels.csv")
    assert contents(over_http) == contents(read_labelled(csv))
    assert over_http.sha256 == read_labelled(csv).sha256


def test_images_in_base64_and_labels_in_structs(images, tmp_path):
    rows = [
        {"image": base64.b64encode(data).decode(), "meta": {"kind": CLASSES[label]}} for label, data in images
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=6)
    for name in ("a.jsonl", "a.parquet"):
        data = read_labelled(tmp_path / name, label_column="meta.kind")
        assert contents(data) == [(CLASSES[label], content) for label, content in images]
    with pytest.raises(UserError, match=r"'meta' has structs, .*--label-column with one of meta\.kind"):
        read_labelled(tmp_path / "a.parquet", label_column="meta")


def test_labels_that_are_missing_are_no_class(images, tmp_path):
    csv = as_csv(tmp_path, images)
    table = pd.read_csv(csv)
    table["number"] = [float("nan"), *range(1, len(table))]
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "a.parquet")
    text = (tmp_path / "a.jsonl").read_text().replace('"number":null', '"number":NaN')
    (tmp_path / "a.jsonl").write_text(text)
    for name in ("a.jsonl", "a.parquet"):
        data = read_labelled(tmp_path / name, label_column="number")
        assert data.unlabelled == [(data.unlabelled[0][0], "no label")]
        assert "nan" not in data.classes
