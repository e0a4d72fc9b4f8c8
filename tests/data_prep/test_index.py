"""Existing tars are checked and indexed in place, and training reads them."""

import numpy as np
import pytest
import torch
import webdataset
from conftest import assert_mistake, call_here, noise_images, png
from damage import flip
from PIL import Image

import data_prep.__main__
from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build, index
from data_prep.build.split import SPLITS
from data_prep.errors import UserError
from data_prep.shards import Damaged, Shards
from data_prep.verify import verify
from train.data.loader import TrainPairs
from train.data.order import Order
from train.recipe import Augment, Captions


def write_tars(folder, n=90):
    """Two tars by webdataset's writer, some of whose images cannot be used in place; image -> captions."""
    rng = np.random.default_rng(0)
    expected, files = {}, []
    for shard in range(2):
        path = folder / f"{shard:05d}.tar"
        files.append(str(path))
        with webdataset.TarWriter(str(path)) as tar:
            for number in range(shard, n, 2):
                data = png(
                    Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)),
                    "PNG" if number % 3 else "JPEG",
                )
                extension = "png" if number % 3 else "jpg"
                sample = {
                    "__key__": f"{number:09d}",
                    extension: data,
                    "txt": f"thing {number}",
                    "json": {"label": number % 5},
                }
                tar.write(sample)
                expected[data] = [f"thing {number}"]
            if shard:
                tar.write(
                    {
                        "__key__": "icon",
                        "png": png(Image.linear_gradient("L").convert("LA")),
                        "txt": "transparent",
                    }
                )
                tar.write({"__key__": "broken", "png": data[:99], "txt": "broken"})
    return files, expected


def test_tars_are_indexed_in_place(tmp_path):
    (tmp_path / "tars").mkdir()
    files, expected = write_tars(tmp_path / "tars")
    before = {path: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    report = index(
        files,
        tmp_path / "indexed",
        check=Checking(max_rejects=0.1),
        split=Splitting(val=0.2),
        parallelism=Parallelism(2),
    )
    assert report["reasons"] == {"needs a change": 1, "truncated image": 1}
    assert {path: path.read_bytes() for path in (tmp_path / "tars").iterdir()} == before
    assert not list((tmp_path / "indexed").rglob("*.tar"))
    (tmp_path / "indexed").rename(tmp_path / "moved")  # relative paths stay valid
    found, groups = {}, {}
    for split in SPLITS:
        shards = Shards(tmp_path / "moved", split)
        shards.verify()
        for number in range(len(shards)):
            sample = shards.read(number)
            found[sample.image] = sample.captions
            assert sample.captions == shards.captions(number)
            assert sample.meta["columns"]["label"] == int(sample.captions[0].split()[1]) % 5
            assert groups.setdefault(shards.groups[number], split) == split
    assert found == expected
    shards = Shards(tmp_path / "moved", "train")
    pairs = TrainPairs(shards, Order(shards.shard_sizes, 8, 0), (16, 16), Augment(), Captions())
    pair = pairs[3]
    assert (pair.image.shape, pair.image.dtype) == (torch.Size([16, 16, 3]), torch.uint8)
    assert pair.caption.split()[0] == "thing"
    assert pair.group == shards.groups[pairs.order.sample_at(3)]
    tar = flip(shards, 3)
    with pytest.raises(Damaged, match=rf"{tar.name}: sample {shards.key(3)}: altered since it was built"):
        shards.read(3)
    shards.read(4)
    with pytest.raises(UserError, match=rf"{tar.name}: altered"):
        verify(tmp_path / "moved")


def test_what_cannot_be_indexed_is_explained(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match=r"a\.csv: index reads uncompressed"):
        index([str(tmp_path / "a.csv")], tmp_path / "out")
    assert_mistake(
        call_here(data_prep.__main__.main, "index", "none.tar", "--out", tmp_path / "out"),
        "none.tar: no such file",
    )


@pytest.mark.parametrize("name", ["build", "index", "merge", "verify", "icons"])
def test_the_commands_of_the_guide_have_help(name):
    call_here(data_prep.__main__.main, name, "--help", expect=0)
    assert name in data_prep.__main__.__doc__


def test_tars_of_one_split_are_not_called_few_groups(tmp_path):
    """The names of 100 groups of train are hashed to train again."""
    out = tmp_path / "shards"
    path = noise_images(tmp_path, 130, groups=130)
    build([str(path)], out, Reading(group_column="group"), parallelism=Parallelism(1))
    tars = [str(tar) for tar in sorted((out / "train").glob("*.tar"))]
    report = index(tars, tmp_path / "indexed", parallelism=Parallelism(1))
    assert {report["splits"][split]["images"] for split in ("val", "test")} == {0}
    for warning in report["warnings"]:
        assert f"none of {report['groups']} groups is hashed to it" in warning
        assert "; index again with --seed 1 --overwrite" in warning
    report = index(tars, tmp_path / "again", split=Splitting(seed=1), parallelism=Parallelism(1))
    assert all(counts["images"] for counts in report["splits"].values())
