"""Images of the same thing share a group; all near-identical images across splits are found."""

import sqlite3

import numpy as np
import pytest
from conftest import png
from PIL import Image

from data_prep.build.groups import (
    LEAK_BITS,
    LEAK_EDGE,
    PHashIndex,
    base_name,
    find_groups,
    links,
    normal_caption,
)
from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build
from data_prep.build.split import SPLITS
from data_prep.shards import Shards


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("ArrowRight18.png", "arrow right"),
        ("sub/ArrowRight_24_N.png", "arrow right"),
        ("arrow-right-outlined@2x.png", "arrow right"),
        ("HTMLFile_32px.svg.png", "html file"),
        ("light.png", "light"),
        ("000123.jpg", ""),
        ("箭头_24.png", "箭头"),
    ],
)
def test_base_names(name, base):
    assert base_name(name) == base


def test_normal_captions():
    assert normal_caption("  A  Red ﬁsh. ") == normal_caption("a red fish") == "a red fish"


def united(images, by_name=False):
    """Groups of [(image, groups, captions, pixels)], as a set of sets of numbers."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE links (link INTEGER, ordinal INTEGER)")
    for ordinal, image in enumerate(images, 1):
        db.executemany(
            "INSERT INTO links VALUES (?, ?)", [(link, ordinal) for link in links(*image, by_name)]
        )
    groups, too_common, _ = find_groups(db, len(images), set())
    found = {}
    for ordinal in range(1, len(images) + 1):
        found.setdefault(groups.first(ordinal), set()).add(ordinal)
    assert all(first == min(members) for first, members in found.items())
    return {frozenset(members) for members in found.values()}, too_common


def test_groups_are_joined_by_every_kind_of_link_and_over_others():
    images = [
        ("a1.png", ["x"], ["one"], b"p1"),
        ("b.png", ["x"], ["two"], b"p2"),  # the group of 1
        ("c.png", [], ["TWO "], b"p3"),  # the caption of 2
        ("d.png", [], ["four"], b"p3"),  # the pixels of 3
        ("a2.png", [], ["five"], b"p5"),  # the name of 1
        ("e.png", ["two"], ["x"], b"p6"),  # a caption is not a group
    ]
    assert united(images)[0] == {frozenset({1, 2, 3, 4}), frozenset({5}), frozenset({6})}
    assert united(images, by_name=True)[0] == {frozenset({1, 2, 3, 4, 5}), frozenset({6})}


def test_a_caption_of_many_images_joins_none():
    for n in (50, 51):
        images = [(f"{number}.png", [], ["icon", f"c{number}"], b"%d" % number) for number in range(n)]
        found, too_common = united(images)
        assert len(found) == (1 if n == 50 else 51)
        assert too_common == {"captions": int(n == 51), "names": 0}


def test_groups_equal_brute_force():
    rng = np.random.default_rng(0)
    images = [
        (f"{n}.png", [f"g{rng.integers(150)}"], [f"c{rng.integers(150)}"], b"%d" % rng.integers(300))
        for n in range(200)
    ]
    related = np.array([[any(a[k] == b[k] for k in (1, 2, 3)) for b in images] for a in images])
    while True:
        further = related @ related
        if (further == related).all():
            break
        related = further
    assert united(images)[0] == {frozenset(np.flatnonzero(row) + 1) for row in related}


def test_candidates_equal_brute_force(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (60, 32), dtype=np.uint8)
    hashes = hashes[rng.integers(0, 60, 400)]
    bits = np.unpackbits(hashes, axis=1)
    for row in bits:
        row[rng.integers(0, 256, rng.integers(0, 7))] ^= 1
    splits, edges = rng.integers(1, 4, 400), rng.choice([10, 20, 30], (400, 3))
    expected = set()
    for a in range(400):
        for b in range(400):
            differing = int((bits[a] != bits[b]).sum())
            if (
                splits[a] < splits[b]
                and differing <= LEAK_BITS
                and np.abs(edges[a] - edges[b]).max() <= LEAK_EDGE
            ):
                expected.add((a, b, differing))
    assert len(expected) > 100
    for size in (2_000_000, 100):
        monkeypatch.setattr("data_prep.build.groups.SLICE", size)
        index = PHashIndex(tmp_path / "phash.bin")
        for number in range(400):
            index.add(
                np.packbits(bits[number]).tobytes() + bytes(edges[number].tolist()),
                number,
                int(splits[number]),
            )
        found = list(index.candidates())
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_a_given_split_wins_and_what_contradicts_it_is_named(tmp_path):
    """A split column: groups follow their members; images of one group with two given splits: the first row's
    wins.
    """
    rng = np.random.default_rng(0)
    lines = ["image,caption,group,split"]
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(
            png(Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)))
        )
    given = ["test", "", "val", "dev", "train", "Test", "train", "val", "", "train"]
    lines += [f"{number}.png,c{number},g{number // 2},{split}" for number, split in enumerate(given * 2)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    read = Reading(group_column="group", split_column="split")
    report = build(
        [str(tmp_path / "a.csv")], tmp_path / "out", read, Checking(max_rejects=1), parallelism=Parallelism(1)
    )
    found = {}
    for name in SPLITS:
        shards = Shards(tmp_path / "out", name)
        found |= {int(shards.read(number).meta["image"][:-4]): name for number in range(len(shards))}
    assert report["reasons"] == {"conflicting splits": 4}
    for start in (0, 10):
        expected = {0: "test", 1: "test", 2: "val", 3: "val", 4: "train", 6: "train", 8: "train", 9: "train"}
        assert {number: split for number, split in found.items() if start <= number < start + 10} == {
            start + number: split for number, split in expected.items()
        }


def test_leaks_are_listed_or_dropped(tmp_path):
    """Images with one changed pixel do not have equal pixels, so they can be in any split: those in different
    splits are listed.
    """
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(40):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (48, 48), Image.BICUBIC
        )
        for twin in range(2):
            small.putpixel((5, 5), (twin * 200, 0, 0))
            (tmp_path / f"{number}-{twin}.png").write_bytes(png(small))
            lines.append(f"{number}-{twin}.png,image {number} number {twin}")
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    places = {}
    for drop in (False, True):
        out = tmp_path / str(drop)
        split = Splitting(val=0.3, test=0.2, drop_leaks=drop)
        report = build(
            [str(tmp_path / "a.csv")], out, Reading(), Checking(max_rejects=0), split, Parallelism(1)
        )
        found = {}
        for name in SPLITS:
            shards = Shards(out, name)
            found |= {shards.read(number).meta["image"]: name for number in range(len(shards))}
        places[drop] = found
        torn = {
            number
            for number in range(40)
            if len({found.get(f"{number}-{twin}.png") for twin in range(2)}) == 2
        }
        if not drop:
            assert len(torn) == report["leaks"] > 5
            listed = (out / "leaks.csv").read_text().splitlines()[1:]
            assert {int(line.split("-")[0]) for line in listed} == torn
            leaking = torn
        else:
            assert report["reasons"] == {"near-identical to held-out": len(leaking)}
            assert {
                number
                for number in range(40)
                if sum(f"{number}-{twin}.png" in found for twin in range(2)) == 1
            } == leaking
            assert found.items() <= places[False].items()
