"""Folders of strangers: links, pipes and manifests that lead out of them are not followed."""

import json
import os
import shutil

import pytest
from conftest import noise_images

from data_prep.build.pipeline import Checking, Parallelism, build, index
from data_prep.errors import UserError
from data_prep.shards import Shards, altered, read_manifest
from data_prep.verify import verify
from eval.search.index import Index

PLACES = (("file", "../secret.tar"), ("index", "../secret.tsv"), ("file", "/etc/passwd"), ("index", "a\0b"))


def test_captions_beside_images_are_not_read_through_links_and_pipes(tmp_path):
    (tmp_path / "secret").write_text("a secret")
    folder = tmp_path / "images"
    folder.mkdir()
    noise_images(tmp_path, 4)
    for number in range(4):
        source = next(tmp_path.rglob(f"{number}.png"))
        shutil.copy(source, folder / f"{number}.png")
    (folder / "0.txt").write_text("a plain caption")
    (folder / "1.txt").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "2.txt")
    (folder / "3.txt").symlink_to(folder / "0.txt")
    check = Checking(max_rejects=0.5)
    report = build([str(folder)], tmp_path / "out", check=check, parallelism=Parallelism(1))
    assert (report["records"], report["rejects"]) == (2, 2)
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"a secret" not in file.read_bytes(), file


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_a_manifest_that_names_files_elsewhere_is_refused(kind, name, icon_shards, tmp_path):
    folder = shutil.copytree(icon_shards, tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["splits"]["val"]["shards"][0]
    shutil.copy(folder / entry["file"], tmp_path / "secret.tar")
    shutil.copy(folder / entry["index"], tmp_path / "secret.tsv")
    entry[kind] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for act in (lambda: Shards(folder, "val"), lambda: list(altered(folder, entry)), lambda: verify(folder)):
        with pytest.raises(UserError, match=r"leads out of this folder|is no name of a file"):
            act()


def test_a_shard_that_is_a_link_or_a_pipe_is_refused(icon_shards, tmp_path):
    folder = shutil.copytree(icon_shards, tmp_path / "shards")
    tar = folder / read_manifest(folder)["splits"]["val"]["shards"][0]["file"]
    tar.rename(tmp_path / "elsewhere.tar")
    tar.symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(UserError, match="leads out of this folder"):
        Shards(folder, "val")
    tar.unlink()
    os.mkfifo(tar)
    with pytest.raises(UserError, match="not a regular file"):
        Shards(folder, "val")


def test_tars_that_were_indexed_in_place_are_read_where_they_are(icon_shards, tmp_path):
    tar = tmp_path / "a.tar"
    shutil.copy(icon_shards / read_manifest(icon_shards)["splits"]["train"]["shards"][0]["file"], tar)
    index([str(tar)], tmp_path / "indexed", parallelism=Parallelism(1))
    shards = Shards(tmp_path / "indexed", "train")
    assert shards.read(0).captions
    manifest = read_manifest(tmp_path / "indexed")
    manifest["splits"]["train"]["shards"][0]["file"] = "/etc/passwd"
    (tmp_path / "indexed" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="leads out"):
        Shards(tmp_path / "indexed", "train")


@pytest.mark.parametrize("name", ["thumbnails.bin", "thumbnails.npy", "features.npy", "metadata.parquet"])
def test_the_files_of_an_index_are_its_own(name, icon_index, tmp_path):
    folder = shutil.copytree(icon_index, tmp_path / "index")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="leads out of this folder"):
        Index(folder)


BROKEN = ("[]", "1", "null", "{}", '{"format": 2}', '{"format": 2, "splits": {"val": 1}}', "[" * 100_000)
BROKEN += ('{"format": 2, "splits": {"val": {"samples": 1, "shards": [{}]}}}',)
BROKEN += ('{"format": 2, "splits": {"val": {"samples": 1, "shards": [{"file": 1}]}}}',)
BROKEN += ('{"model_sha256": 1}', '{"model_sha256": "a", "index_format": 2}')


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:60])
def test_a_broken_manifest_is_one_sentence(content, icon_shards, icon_index, tmp_path):
    for made, act in ((icon_shards, lambda folder: Shards(folder, "val")), (icon_index, Index)):
        folder = shutil.copytree(made, tmp_path / made.name)
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=made.name):
            act(folder)
