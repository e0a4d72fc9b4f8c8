"""Remote inputs and images: on a server, on the Hugging Face hub."""

import json

import pytest
from conftest import noise_images
from test_inputs import hub_parquet, images_of, write

from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.errors import UserError
from data_prep.inputs import image_server
from data_prep.inputs.storage import expand


def test_a_data_set_of_the_hub_is_read_at_a_pinned_revision(hub, tmp_path):
    names = [f"train-0000{number}-of-00002.parquet" for number in range(2)]
    expected = {**hub_parquet(tmp_path / names[0]), **hub_parquet(tmp_path / names[1], seed=2)}
    commit = hub.put("datasets/me/icons", {f"data/{name}": (tmp_path / name).read_bytes() for name in names})
    report = build(
        ["hf://datasets/me/icons"],
        tmp_path / "out",
        Reading(caption_column="text"),
        parallelism=Parallelism(1),
    )
    assert (report["rows"], report["images"]) == (48, 24)
    pinned = [f"hf://datasets/me/icons@{commit}/data/{name}" for name in names]
    assert list(json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]) == pinned
    assert expand([f"hf://datasets/me/icons/data/{names[0]}"]) == pinned[:1]
    with pytest.raises(UserError, match="hf://datasets/me/nothing: "):
        expand(["hf://datasets/me/nothing"])
    assert images_of(tmp_path / "out") == expected


def test_remote_images_and_inputs(served, tmp_path, monkeypatch):
    folder, url = served
    path = noise_images(folder, 12)
    (folder / "3.png").rename(folder / "busy.png")
    text = path.read_text().replace("3.png", "busy.png")
    build([str(write(folder, text, name="local.csv"))], tmp_path / "local", parallelism=Parallelism(1))
    rows = (
        text
        + f"{url}/5.png,absolute,\nnone.png,x,\n../secret.png,x,\n%2e%2e/secret.png,x,\nhttp://example.invalid/a.png,x,\n{url}.invalid/a.png,x,\n"
    )
    for name, images, processes in (("a", url, 1), ("b", url + "/", 2)):
        write(folder, rows, name="remote.csv")
        check = Checking(max_rejects=0.9)
        report = build(
            [f"{url}/remote.csv"],
            tmp_path / name,
            Reading(images=images),
            check,
            parallelism=Parallelism(processes),
        )
        assert report["reasons"] == {"outside of the images folder": 4, "missing file": 1}
        assert (report["rows"], report["images"]) == (18, 12)
        found, expected = images_of(tmp_path / name), images_of(tmp_path / "local")
        assert found.keys() == expected.keys()
        assert sum(len(captions) for captions in found.values()) == 13
    # Of any host only public addresses are asked; this one is not.
    monkeypatch.setattr(image_server, "is_public", lambda address: True)
    write(tmp_path, f"image,caption\n{url}/5.png,anywhere\n", name="any.csv")
    assert (
        build(
            [str(tmp_path / "any.csv")],
            tmp_path / "any",
            Reading(images="http://"),
            parallelism=Parallelism(1),
        )["images"]
        == 1
    )
    with pytest.raises(UserError, match=r"nothing\.csv: cannot be read"):
        build([f"{url}/nothing.csv"], tmp_path / "nothing", parallelism=Parallelism(1))
    with pytest.raises(UserError, match=r"adlfs"):
        build(
            [str(tmp_path / "any.csv")],
            tmp_path / "s3",
            Reading(images="abfs://container/folder"),
            parallelism=Parallelism(1),
        )


def test_patterns_of_remote_files(served):
    folder, _ = served
    for name in ("b.csv", "a.csv"):
        (folder / name).touch()
    assert expand([f"file://{folder}/*.csv"]) == [f"file://{folder}/a.csv", f"file://{folder}/b.csv"]
    with pytest.raises(UserError, match="no file matches"):
        expand([f"file://{folder}/*.parquet"])
