"""Queries and searched folders take every image that build takes, and see the same pixels."""

import contextlib
import io

import numpy as np
import pytest
import torch
from conftest import png
from evil import encoded, noise
from other_formats import drawing, heic

from data_prep.build.pipeline import Parallelism, build
from data_prep.errors import UserError
from eval.options import Inference
from eval.search.command import embed
from eval.search.index import open_index
from eval.search.query import image_query


def shapes(color: str) -> bytes:
    return drawing(f'<circle cx="20" cy="25" r="15" fill="{color}"/><path d="M30 0h20v50z" fill="black"/>')


def test_the_features_of_an_svg_are_those_of_its_shard(tmp_path, tiny_model):
    folder = tmp_path / "set"
    folder.mkdir()
    files = {
        "red.svg": shapes("red"),
        "blue": shapes("blue"),
        "photo.heic": heic(noise(64, 64)),
        "icon.ico": encoded(noise(32, 32, seed=1), "ICO"),
        "plain.png": png(noise(48, 48, seed=2)),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"{name}\n")
    with contextlib.redirect_stdout(io.StringIO()):
        build([str(folder)], tmp_path / "shards", parallelism=Parallelism(1))
        for source, out in ((folder, "of_folder"), (tmp_path / "shards", "of_shards")):
            embed(tiny_model, source, tmp_path / out, inference=Inference(workers=0))
    of_folder, of_shards = open_index(tmp_path / "of_folder"), open_index(tmp_path / "of_shards")
    clip = of_folder.model("")
    by_caption = {
        row["captions"][0]: number for number, row in enumerate(of_shards.rows(range(len(of_shards))))
    }
    assert sorted(by_caption) == sorted(files)
    assert sorted(of_folder.keys) == sorted(files)
    for number, name in enumerate(of_folder.keys):
        query = image_query(clip, files[name], name)[0]
        torch.testing.assert_close(
            query, torch.from_numpy(of_folder.features[number]).float(), atol=2e-3, rtol=0
        )
        np.testing.assert_array_equal(of_folder.features[number], of_shards.features[by_caption[name]])
    with pytest.raises(UserError, match=r"--image x: PDF is not supported; use another image"):
        image_query(clip, b"%PDF-1.7", "--image x")
