"""An index holds each image once with the model's features, on any number of ranks and after any stop."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_mistake, call_here, noise_images, png, save_tiny
from PIL import Image

from data_prep.errors import NotFinite, UserError
from data_prep.shards import Shards
from eval.__main__ import main
from eval.embed import load_for_eval
from eval.options import Inference
from eval.search import indexing
from eval.search.command import embed
from eval.search.corpus import FolderCorpus, ShardsCorpus
from eval.search.index import Index, open_index
from train.data.decode import decode
from train.world import World

HERE = Inference(workers=0)
SPLITS = ("train", "val", "test")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_once_with_the_models_features(icon_index, icon_shards, tiny_model):
    index, clip = Index(icon_index), load_for_eval(tiny_model, HERE, World())
    keys, features, groups, captions, images = [], [], [], [], []
    for split in SPLITS:
        shards = Shards(icon_shards, split)
        for number in range(len(shards)):
            sample = shards.read(number)
            images.append(decode(sample.image))
            keys.append(sample.key)
            groups.append(shards.groups[number])
            captions.append(sample.captions)
            with torch.inference_mode():
                features.append(
                    clip.towers.image_features(clip.eval_transform(images[-1])[None])[0].half().numpy()
                )
    assert index.keys == keys
    assert len(set(keys)) == len(index)
    np.testing.assert_allclose(
        index.features.astype(np.float32), np.stack(features).astype(np.float32), atol=1e-3
    )
    assert index.group_of.tolist() == groups
    rows = index.rows(range(len(index)))
    assert [row["captions"] for row in rows] == captions
    assert {row["split"] for row in rows} == set(SPLITS)
    assert {row["columns"]["set"] for row in rows} == {name for name, _ in index.choices()["set"]}
    assert sum(count for _, count in index.choices()["split"]) == len(index)
    for number in (0, len(index) // 2, len(index) - 1):
        small = Image.open(io.BytesIO(index.thumbnail(number)))
        assert max(small.size) <= index.manifest["thumbnail_px"]
        whole = images[number].copy()
        whole.thumbnail((192, 192))
        assert small.size == whole.size
        assert np.abs(np.asarray(small.convert("RGB"), float) - np.asarray(whole, float)).mean() < 8
    assert index.model().fingerprint() == index.manifest["model_sha256"]


def test_blocks_ranks_and_stops_change_no_byte(icon_shards, tiny_model, tmp_path, monkeypatch, capsys):
    """32 images in a block, started by rank 1 of 3 alone, then resumed by one process; likewise by 1 of 2.

    tests/test_every_command.py has two real ranks.
    """
    monkeypatch.setattr(indexing, "BLOCK_IMAGES", 32)
    small = Inference(batch_size=16, workers=0)
    embed(tiny_model, icon_shards, tmp_path / "at once", inference=small)
    for world_size in (2, 3):
        out, corpus, clip = (
            tmp_path / f"of {world_size}",
            ShardsCorpus(icon_shards, ""),
            load_for_eval(tiny_model, small, World()),
        )
        unfinished = out.with_name(f".{out.name}.unfinished")
        indexing.start(unfinished, indexing.describe(tiny_model, corpus, clip, small, out))
        blocks = indexing.block_files(unfinished, corpus, small)
        assert len(blocks) == -(-len(corpus) // 32)
        mine = range(len(blocks))[1::world_size]
        _, count = indexing.write_blocks(blocks, mine, corpus, clip, small, World(1, world_size))
        assert sorted(unfinished.glob("block-*")) == [blocks[block] for block in mine]
        capsys.readouterr()
        embed(tiny_model, icon_shards, out, inference=small)
        printed = capsys.readouterr().out
        assert "resuming" in printed
        assert f"{len(corpus) - count} embedded now" in printed
        assert files(out) == files(tmp_path / "at once")
        assert not unfinished.exists()


def test_a_folder_of_images_with_bad_ones(tiny_model, tmp_path, capsys):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    noise_images(folder, 3)
    (folder / "1.txt").write_text("a first caption\n\n a second\n")
    faint = Image.new("RGBA", (20, 20), (255, 0, 0, 9))
    faint.paste((0, 0, 255, 200), (3, 3, 9, 9))
    (folder / "deep" / "faint.webp").write_bytes(png(faint, "WEBP", lossless=True))
    noise = Image.open(folder / "0.png")
    noise.save(folder / "deep" / "b.jpg")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "huge.png").write_bytes(png(Image.new("1", (20_000, 20_000))))
    (tmp_path / "secret.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    capsys.readouterr()
    embed(tiny_model, folder, tmp_path / "index", inference=HERE)
    index = Index(tmp_path / "index")
    printed = capsys.readouterr().out
    assert f"{len(index)} images ({len(index)} embedded now, " in printed
    assert "3 images cannot be read" in printed
    known = {row["key"]: row["captions"] for row in index.rows(range(len(index)))}
    with open(tmp_path / "index" / "unreadable.csv", newline="") as file:
        reasons = {row["key"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"broken.png", "huge.png", "link.png"}
    assert "pixels" in reasons["huge.png"]
    assert "leads out" in reasons["link.png"]
    assert set(known) | set(reasons) == set(FolderCorpus(folder).names)
    assert not set(known) & set(reasons)
    assert known["1.png"] == ["a first caption", "a second"]
    assert known["0.png"] == []
    assert len(set(index.group_of)) == len(index)
    assert index.manifest["unreadable"] == 3


def test_two_commands_at_once_do_not_mix(tiny_model, tmp_path):
    (tmp_path / "images").mkdir()
    data, out = noise_images(tmp_path / "images", 3).parent, tmp_path / "index"
    unfinished = tmp_path / ".index.unfinished"
    code = (
        "import sys, pathlib, data_prep.atomic as atomic\n"
        "with atomic.locked(pathlib.Path(sys.argv[1]), 'embedding into'): print(flush=True); input()"
    )
    arguments = [sys.executable, "-c", code, str(unfinished)]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=-1, stdout=-1) as first:
        first.stdout.readline()
        with pytest.raises(UserError, match="another process is embedding into it; wait until it ends"):
            embed(tiny_model, data, out, inference=HERE)
        first.communicate(b"\n")
    embed(tiny_model, data, out, inference=HERE)
    assert len(Index(out)) == 3
    assert not unfinished.exists()
    unfinished.mkdir()
    (unfinished / "mine.txt").touch()
    with pytest.raises(UserError, match=r"has no started\.json"):
        embed(tiny_model, data, out, overwrite=True, inference=HERE)


def test_a_feature_that_is_not_finite_is_named(tiny_model, icon_shards, tmp_path):
    clip = load_for_eval(tiny_model, HERE, World())
    clip.towers.model.visual.ln_post.weight.data[:] = 3e38  # the weights are finite
    clip.save(save_tiny(tmp_path))
    with pytest.raises(NotFinite, match=r"not finite, the first of \S+\.png"):
        embed(f"local-dir:{tmp_path}", icon_shards, tmp_path / "index", inference=HERE)
    assert not (tmp_path / "index").exists()


def test_mistakes_get_messages(icon_index, icon_shards, tiny_model, tmp_path):
    def mistake(*arguments, of: str = "embed"):
        return call_here(main, of, *arguments)

    out = ("--out", tmp_path / "new")
    assert_mistake(mistake(tiny_model, "--data", tmp_path / "none", *out), "no such folder")
    assert_mistake(
        mistake(tiny_model, "--data", icon_shards, "--split", "dev", *out), "no samples in split 'dev'"
    )
    (tmp_path / "empty").mkdir()
    assert_mistake(mistake(tiny_model, "--data", tmp_path / "empty", *out), "no images in it")
    assert_mistake(mistake(tiny_model, "--data", icon_shards, "--out", icon_index), "exists already")
    assert_mistake(mistake("no-model", "--data", icon_shards, *out), "no model 'no-model'")
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    assert_mistake(
        mistake(tiny_model, "--data", tmp_path / "empty", "--workers", 0, *out),
        "none of 1 images can be read",
    )
    assert_mistake(
        mistake(tmp_path / "none", "--text", "bell", of="search"), "no index there", "python -m eval embed"
    )
    assert_mistake(mistake(icon_shards, "--text", "bell", of="search"), "holds shards, not an index")


def test_a_wrong_model_or_folder_does_not_block_the_right_one(
    icon_shards, narrow_index, tiny_model, tmp_path, monkeypatch, capsys
):
    """An unfinished index of another model, then of other data, with one block each; no hash is printed."""
    monkeypatch.setattr(indexing, "BLOCK_IMAGES", 32)
    small, out = Inference(batch_size=16, workers=0), tmp_path / "index"
    embed(tiny_model, icon_shards, tmp_path / "fresh", inference=small)
    other = json.loads((narrow_index / "manifest.json").read_text())["model"]
    unfinished = out.with_name(f".{out.name}.unfinished")
    for model, data in ((other, icon_shards), (tiny_model, noise_images(tmp_path, 40).parent)):
        corpus, clip = indexing.open_corpus(data, ""), load_for_eval(model, small, World())
        indexing.start(unfinished, indexing.describe(model, corpus, clip, small, out))
        blocks = indexing.block_files(unfinished, corpus, small)
        indexing.write_blocks(blocks, [0], corpus, clip, small, World())
    corpus = ShardsCorpus(icon_shards, "")
    clip = load_for_eval(tiny_model, small, World())
    capsys.readouterr()
    embed(tiny_model, icon_shards, out, inference=small)
    printed = capsys.readouterr().out
    assert f"of another data ({tmp_path}, now {icon_shards}); starting again, without its 1 blocks" in printed
    assert not re.search("[0-9a-f]{32}", printed)
    assert files(out) == files(tmp_path / "fresh")


def test_a_damaged_index_is_not_used(icon_index, tmp_path):
    for name in ("features.npy", "metadata.parquet", "thumbnails.bin", "thumbnails.npy", "manifest.json"):
        broken = tmp_path / name
        shutil.copytree(icon_index, broken)
        (broken / name).write_bytes((broken / name).read_bytes()[:-40])
        with pytest.raises(UserError, match="make the index again"):
            Index(broken)
    shutil.copytree(icon_index, tmp_path / "other")
    manifest = json.loads((icon_index / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({**manifest, "model_sha256": "0" * 64}))
    with pytest.raises(UserError, match="features do not compare"):
        Index(tmp_path / "other").model()


def test_an_empty_index_opens_and_is_named(icon_index, tmp_path):
    empty = empty_index(icon_index, tmp_path / "empty")
    index = Index(empty)
    assert len(index) == 0
    assert index.columns == ["set"]
    assert index.choices() == {}
    assert index.group_of.tolist() == []
    with pytest.raises(UserError, match="holds no images"):
        open_index(empty)


def empty_index(of: Path, out: Path) -> Path:
    """An index of nothing."""
    import pyarrow.parquet as pq

    shutil.copytree(of, out)
    manifest = json.loads((of / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "n": 0}))
    np.save(out / "features.npy", np.zeros((0, manifest["d"]), np.float16))
    pq.write_table(pq.read_table(of / "metadata.parquet").slice(0, 0), out / "metadata.parquet")
    np.save(out / "thumbnails.npy", np.zeros(1, np.int64))
    (out / "thumbnails.bin").write_bytes(b"")
    return out
