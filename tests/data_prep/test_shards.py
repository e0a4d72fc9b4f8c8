"""A shard that is not what was built is named, not read."""

import json
import pickle
import shutil

import numpy as np
import pytest
from damage import as_an_older_build, flip, reindex

from data_prep.errors import UserError
from data_prep.shard_index import Rows, key_text, read_indexes
from data_prep.shards import Damaged, Shards
from data_prep.verify import verify


@pytest.fixture
def shards_copy(icon_shards, tmp_path):
    return shutil.copytree(icon_shards, tmp_path / "shards")


def test_whole_shards_verify_and_travel_to_workers(icon_shards):
    shards = Shards(icon_shards, "train")
    shards.verify()
    assert shards.read(7) == pickle.loads(pickle.dumps(shards)).read(7)
    assert len(shards) == shards.shard_sizes.sum() == len(shards.groups)


def test_an_altered_sample_is_named_when_it_is_read(shards_copy):
    shards = Shards(shards_copy, "train")
    number = len(shards) - 1
    tar = flip(shards, number)
    with pytest.raises(
        Damaged, match=rf"{tar.name}: sample {shards.key(number)}: altered since it was built"
    ) as caught:
        shards.read(number)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.file, again.found) == (str(caught.value), tar, caught.value.found)
    assert [shards.read(each).key for each in range(number)] == [shards.key(each) for each in range(number)]
    with pytest.raises(UserError, match=f"1 file is missing or altered:\n.*{tar.name}: altered"):
        verify(shards_copy)
    flip(shards, number)
    shards.read(number)


def test_an_altered_json_is_named_when_the_sample_is_read(shards_copy):
    shards = Shards(shards_copy, "train")
    data, meta = (shards_copy / "train" / "train-000000.tar").read_bytes(), shards.read(0).meta
    caption = json.dumps(meta["captions"][0], ensure_ascii=False).encode()
    offset, size = shards._offsets[0, 2:].tolist()
    changed = data[offset : offset + size].replace(caption, caption.swapcase())
    (shards_copy / "train" / "train-000000.tar").write_bytes(data[:offset] + changed + data[offset + size :])
    assert Shards(shards_copy, "train").captions(0) != meta["captions"]  # valid as JSON
    with pytest.raises(Damaged, match="altered since it was built"):
        Shards(shards_copy, "train").read(0)


def test_an_altered_index_is_named_when_shards_are_opened(shards_copy):
    path = shards_copy / "train" / "train-000001.index.tsv"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"0\n" if data[-2:] != b"0\n" else data[:-2] + b"1\n")
    with pytest.raises(UserError, match=r"train-000001\.index\.tsv: altered since it was built"):
        Shards(shards_copy, "train")
    Shards(shards_copy, "val")


def test_an_index_of_an_older_build_is_read_and_its_shards_hashed(shards_copy, icon_shards):
    old, new = Shards(as_an_older_build(shards_copy), "train"), Shards(icon_shards, "train")
    old.verify()
    assert all(old.read(number) == new.read(number) for number in range(len(new)))
    assert old.groups.tolist() == new.groups.tolist()
    tar = flip(old, 3)
    old.only(np.arange(len(old)) == 3).read(0)  # nothing tells here
    new.verify()
    with pytest.raises(UserError, match=rf"{tar.name}: altered since it was built"):
        old.verify()


def test_many_indexes_parsed_at_once_are_those_parsed_alone(icon_shards, monkeypatch):
    whole = [(icon_shards / entry["index"], entry) for entry in Shards(icon_shards, "train").entries]
    assert len(whole) > 1
    together, alone = read_indexes(whole), [read_indexes([each]) for each in whole]
    for name, column in zip(Rows._fields, together, strict=True):
        assert np.array_equal(column, np.concatenate([getattr(rows, name) for rows in alone])), name
    monkeypatch.setattr("data_prep.shard_index.TOGETHER_BYTES", 1)
    assert all(map(np.array_equal, together, read_indexes(whole)))
    rows = [line.split("\t") for line in whole[0][0].read_text().splitlines()[1:]]
    assert [key_text(key) for key in alone[0].keys.tolist()] == [row[0] for row in rows]
    assert alone[0].groups.tolist() == [int(row[1]) for row in rows]
    assert alone[0].offsets.tolist() == [[int(cell) for cell in row[2:6]] for row in rows]
    assert [f"{each:016x}" for each in alone[0].hashes.tolist()] == [row[8] for row in rows]


def test_a_tar_may_be_larger_than_4_gib(shards_copy, icon_shards):
    number, before = 0, Shards(icon_shards, "train")

    def change(data: bytes) -> bytes:
        nonlocal number
        number += 1
        return data.replace(b"\t512\t", b"\t%d\t" % (5 << 32), 1) if number == 2 else data

    reindex(shards_copy, change)
    shards, first = Shards(shards_copy, "train"), int(before.shard_sizes[0])
    expected = before._offsets.astype(np.int64)
    assert expected[first, 0] == 512
    expected[first, 0] = 5 << 32
    assert np.array_equal(shards._offsets, expected)
    assert shards.read(first - 1) == before.read(first - 1)
    with pytest.raises(Damaged, match=rf"ends before byte {(5 << 32) + expected[first, 1]}"):
        shards.read(first)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"\tgroup\t", b"\tother\t", "no index of a shard"),
        (b"\n", b"\r\n", "no index of a shard"),
        (b"\t512\t", b"\t-512\t", "a negative offset or size"),
        (b"\t512\t", b"\tx\t", "invalid value 'x'"),
        (b"\t512\t", b"\t512\t5\t", "Expected 9 columns, got 10"),
    ],
)
def test_what_is_no_index_is_named_among_many(shards_copy, old, new, words):
    """As its maker wrote it: its sha256 is in the manifest."""
    seen = []

    def change(data: bytes) -> bytes:
        seen.append(data)
        return data.replace(old, new, 1) if len(seen) == 2 else data

    reindex(shards_copy, change)
    with pytest.raises(UserError, match=rf"train-000001\.index\.tsv: not readable \(.*{words}"):
        Shards(shards_copy, "train")


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
    shards = Shards(as_an_older_build(shards_copy), "train")
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
    with pytest.raises(UserError, match=r"val-000000\.index\.tsv: has no room for \d+ rows"):
        Shards(shards_copy, "val")
