"""A shard that is not what was built is named, not read."""

import pickle
import shutil

import pytest

from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.verify import verify


@pytest.fixture
def shards_copy(icon_shards, tmp_path):
    return shutil.copytree(icon_shards, tmp_path / "shards")


def test_whole_shards_verify_and_travel_to_workers(icon_shards):
    shards = Shards(icon_shards, "train")
    shards.verify()
    assert shards.read(7) == pickle.loads(pickle.dumps(shards)).read(7)
    assert len(shards) == shards.shard_sizes.sum() == len(shards.groups)


@pytest.mark.parametrize("file", ["train-000001.tar", "train-000001.index.tsv"])
def test_an_altered_shard_is_named(shards_copy, file):
    path = shards_copy / "train" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file}: altered since it was built"):
        Shards(shards_copy, "train").verify()
    Shards(shards_copy, "val").verify()


def test_the_command_names_every_file_that_is_not_what_was_built(shards_copy, capsys):
    verify(shards_copy)
    assert "all" in capsys.readouterr().out
    (shards_copy / "train" / "train-000001.tar").unlink()
    with open(shards_copy / "val" / "val-000000.index.tsv", "a") as file:
        file.write("x")
    with pytest.raises(
        UserError,
        match=(
            r"2 files are missing or altered:\n.*train-000001\.tar: missing(.|\n)*val-000000\.index\.tsv:"
            r" altered"
        ),
    ):
        verify(shards_copy)


def test_ranks_share_the_hashing(shards_copy):
    (shards_copy / "train" / "train-000001.tar").write_bytes(b"")
    shards = Shards(shards_copy, "train")
    shards.verify(0, 2)
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        shards.verify(1, 2)


def test_missing_and_foreign_folders_are_explained(shards_copy, tmp_path):
    with pytest.raises(UserError, match="python -m data_prep build"):
        Shards(tmp_path, "train")
    with pytest.raises(UserError, match=r"no samples in split 'dev'; it has train \(\d+\), val"):
        Shards(shards_copy, "dev")
    (shards_copy / "train" / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar: missing"):
        Shards(shards_copy, "train")
    (shards_copy / "val" / "val-000000.index.tsv").write_text("key\tgroup\nx\ty\n")
    with pytest.raises(UserError, match=r"val-000000\.index\.tsv: not readable|but the manifest says"):
        Shards(shards_copy, "val")
