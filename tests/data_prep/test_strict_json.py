"""NaN and Infinity reach no JSON file and no page: they are text and counted, or null and said."""

import json
import math
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_images, tars
from starlette.testclient import TestClient

from data_prep.atomic import write_json
from data_prep.build.pipeline import Checking, Parallelism, build
from data_prep.review.server import app
from data_prep.strict_json import strict_json
from eval.options import Inference
from eval.search.command import embed
from eval.search.index import Index

NAN, INF = math.nan, math.inf
COLUMNS = {"good": 0.5, "missing": NAN, "score": -INF, "nested": [1.0, NAN, {"a": INF}]}
STORED = {"good": 0.5, "score": "-Infinity", "nested": [1.0, "NaN", {"a": "Infinity"}]}


def strict(text: str | bytes):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(params=["jsonl", "parquet", "tar"])
def source(request, tmp_path):
    noise_images(tmp_path, 4)
    rows = [{"image": f"{number}.png", "caption": f"caption {number}", **COLUMNS} for number in range(4)]
    path = tmp_path / f"pairs.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif request.param == "parquet":
        for row in rows:
            row["nested"] = [1.0, NAN, INF]
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import io

        with tarfile.open(path, "w") as archive:
            for number, row in enumerate(rows):
                meta = json.dumps({name: row[name] for name in ("caption", "good", "missing", "score")})
                image = (tmp_path / f"{number}.png").read_bytes()
                for extension, data in (("png", image), ("json", meta.encode())):
                    info = tarfile.TarInfo(f"{number}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return path


def test_columns_are_text_counted_and_shown(source, tmp_path, tiny_model, capsys):
    out = tmp_path / "out"
    report = build([str(source)], out, check=Checking(min_side_px=1), parallelism=Parallelism(1))
    kind = source.suffix
    expected = {
        ".jsonl": STORED,
        ".parquet": {**STORED, "nested": [1.0, "NaN", "Infinity"]},
        ".tar": {name: STORED[name] for name in ("good", "score")},
    }[kind]
    count = {".jsonl": 3, ".parquet": 3, ".tar": 1}[kind]
    assert (report["records"], report["nonfinite"]) == (4, 4 * count)
    assert f"{4 * count} values of other columns are NaN or Infinity" in capsys.readouterr().out
    members = 0
    for split in ("train", "val", "test"):
        for path in (out / split).glob("*.tar"):
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.name.endswith(".json"):
                        assert strict(archive.extractfile(member).read())["columns"] == expected
                        members += 1
    assert members == 4
    with TestClient(app(out, tmp_path / "decisions.csv"), "http://localhost") as page:
        group = page.get("/api/groups?split=train").json()["groups"]
        assert group, group
    embed(tiny_model, out, tmp_path / "index", inference=Inference(workers=0))
    index = Index(tmp_path / "index")
    columns = index.rows([0])[0]["columns"]
    assert columns["score"] == "-Infinity"
    assert index.columns.count("missing") == 0


def test_shards_of_an_earlier_version_are_shown(tmp_path, monkeypatch):
    import data_prep.build.write as writing

    path = noise_images(tmp_path, 6)
    build([str(path)], tmp_path / "new", parallelism=Parallelism(1))
    with monkeypatch.context() as patch:  # as shards were written before
        member = writing._member

        def with_nan(image):
            found = member(image)
            return found._replace(meta={**found.meta, "columns": {"score": NAN}})

        patch.setattr(writing, "_member", with_nan)
        patch.setattr("data_prep.shards.as_json", json.JSONEncoder(sort_keys=True).encode)
        build([str(path)], tmp_path / "old", parallelism=Parallelism(1))
    assert tars(tmp_path / "old") != tars(tmp_path / "new")
    with TestClient(app(tmp_path / "old", tmp_path / "decisions.csv"), "http://localhost") as page:
        answer = page.get("/api/groups?split=train")
        assert answer.status_code == 200
        for group in answer.json()["groups"]:
            shown = page.get(f"/api/group?split=train&group={group['group']}")
            assert shown.status_code == 200
            assert strict(shown.content)["images"][0]["columns"] == {"score": "NaN"}


def test_measured_numbers_are_null_and_said(tmp_path, capsys):
    write_json(tmp_path / "new" / "a.json", {"loss": NAN, "all": [1.5, INF], "text": "é"})
    written = strict((tmp_path / "new" / "a.json").read_text())
    assert written == {"loss": None, "all": [1.5, None], "text": "é"}
    assert "a.json: 2 numbers are not finite" in capsys.readouterr().err
    write_json(tmp_path / "b.json", {"loss": 1.0})
    assert capsys.readouterr().err == ""
    assert strict_json({"b": (1, NAN), "a": None}, sort_keys=True) == '{"a": null, "b": [1, "NaN"]}'
