"""Folders and tars as people have them: every file is a record, a reject or ignored; damage is named."""

import csv
import gzip
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import png
from evil import encoded, noise
from other_formats import HALF, drawing, heic
from test_inputs import images_of, tar_of

from data_prep.build.pipeline import Checking, Parallelism, Reading, build, index
from data_prep.errors import UserError
from data_prep.inputs.formats import read
from data_prep.inputs.rows import Columns
from data_prep.inputs.tars import tar_samples
from eval.classify.labelled import read_labelled
from eval.search.corpus import FolderCorpus
from train.data.decode import decoded


def built(source, out, max_rejects=0.0, **reading) -> dict:
    return build(
        [str(source)], out, Reading(**reading), Checking(max_rejects=max_rejects), parallelism=Parallelism(1)
    )


def rows(source, **options) -> list[tuple[str, str]]:
    """(image, caption or the problem) of each row of an input."""
    return [
        (row.image, f"{row.problem.reason}: {row.problem.detail}" if row.problem else row.caption)
        for row in read(str(source), Columns(), **options)
    ]


def ignored(folder) -> dict[str, str]:
    with open(folder / "ignored.csv", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


IMAGES = {
    "a.jfif": encoded(noise(seed=1), "JPEG"),
    "b.jpe": encoded(noise(seed=2), "JPEG"),
    "c.avif": encoded(noise(seed=3), "AVIF"),
    "d.heic": heic(noise(seed=4)),
    "e.ico": encoded(noise(seed=5), "ICO"),
    "f.jp2": encoded(noise(seed=6), "JPEG2000"),
    "g.svg": drawing(HALF),
    "h": png(noise(seed=7)),
    "i.dat": png(noise(seed=8)),
    "sub/j.JPG": png(noise(seed=9)),
}
SYSTEM = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._a.jfif": b"\0\5\26\7",
    "__MACOSX/._b.jpe": b"\0\5\26\7",
    "__MACOSX/a.png": png(noise(seed=20)),
    ".ipynb_checkpoints/g-checkpoint.svg": drawing(),
    "sub/Thumbs.db": b"\xd0\xcf",
}


def filled(folder, files: dict[str, bytes]):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_every_file_of_a_folder_is_a_record_a_reject_or_ignored(tmp_path):
    captions = {f"{name.rpartition('.')[0] or name}.txt": f"image {name}".encode() for name in IMAGES}
    rejected = {
        "paper.pdf": (b"%PDF-1.7", "PDF is not supported"),
        "page.png": (b"<!doctype html>", "HTML page, not an image"),
        "noise.xyz": (b"?", "not an image"),
    }
    others = {"README.md": b"# read me", "a.json": b"{}", "pdf_without_caption.pdf": b"%PDF-1.7"}
    files = IMAGES | captions | SYSTEM | {name: data for name, (data, _) in rejected.items()} | others
    files |= {"paper.txt": b"a paper", "page.txt": b"a page", "noise.txt": b"noise", "lost.txt": b"no image"}
    folder = filled(tmp_path / "set", files | {"wordless.png": png(noise(seed=10))})
    report = built(folder, tmp_path / "out", max_rejects=0.5)
    reasons = Counter(reason for _, reason in rejected.values()) + Counter(["no caption file"])
    assert report["reasons"] == dict(reasons)
    assert report["images"] == len(IMAGES)
    assert ignored(tmp_path / "out") == {
        **dict.fromkeys(SYSTEM, "hidden or system file"),
        **dict.fromkeys(others, "not an image"),
        "lost.txt": "caption without an image",
    }
    assert report["ignored"] == dict(Counter(ignored(tmp_path / "out").values()).most_common())
    found = [caption for (caption,) in images_of(tmp_path / "out").values()]
    assert sorted(found) == sorted(f"image {name}" for name in IMAGES)
    everything = report["images"] + report["rejects"] + len(ignored(tmp_path / "out"))
    assert everything + len(captions) + 3 == len(files) + 1  # captions of records, and of three rejects


def test_training_reads_what_build_makes_of_every_format(tmp_path):
    folder = filled(
        tmp_path / "set", IMAGES | {f"{name.partition('.')[0]}.txt": b"an image" for name in IMAGES}
    )
    built(folder, tmp_path / "out")
    found = images_of(tmp_path / "out")
    assert {data[:2] for data in found} == {b"\x89P", b"\xff\xd8"}
    assert len(found) == len(IMAGES)
    assert {decoded(data).shape[2] for data in found} == {3}


def test_a_folder_of_nothing_that_is_read_says_what_it_has(tmp_path):
    folder = filled(tmp_path / "set", {"a.pdf": b"%PDF-1.7", ".DS_Store": b"", "b.docx": b"PK\3\4"})
    with pytest.raises(
        UserError, match=r"no rows; ignored: 1 x hidden or system file; ignored: 2 x not an image; an input"
    ):
        built(folder, tmp_path / "out")
    folder = filled(tmp_path / "tars", {"0.tar": b"", "1.tar": b"", "more/a.csv.gz": b"", "README.md": b""})
    with pytest.raises(UserError) as error:
        built(folder, tmp_path / "out")
    assert f"4 x not an image; these are tars or tables: pass {folder}/*.tar {folder}/more/*.csv.gz" in str(
        error.value
    )
    folder = filled(tmp_path / "wordless", {"bell.png": png(noise(seed=1)), "house.png": png(noise(seed=2))})
    with pytest.raises(
        UserError, match=r"the first is 'bell\.png': no caption file, bell\.txt does not exist"
    ):
        built(folder, tmp_path / "out")


def test_links_to_folders_are_listed_and_not_followed(tmp_path):
    filled(tmp_path / "elsewhere", {"b.png": png(noise(seed=1)), "b.txt": b"another"})
    folder = filled(tmp_path / "set", {"a.png": png(noise()), "a.txt": b"one"})
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    assert built(folder, tmp_path / "out")["images"] == 1
    assert ignored(tmp_path / "out") == {"more": "link to a folder, not followed"}


def test_the_table_of_an_imagefolder_is_not_listed(tmp_path):
    files = {"train/metadata.jsonl": b'{"file_name": "a.png", "text": "one"}\n', "train/a.png": png(noise())}
    folder = filled(tmp_path / "set", files | {"README.md": b"", "train/metadata.txt": b""})
    assert built(folder, tmp_path / "out")["images"] == 1
    assert ignored(tmp_path / "out") == {
        "README.md": "not an image",
        "train/metadata.txt": "caption without an image",
    }


def test_other_captions_beside_images(tmp_path):
    folder = filled(tmp_path / "set", {"a.png": png(noise()), "a.Caption": b"", "a.caption": b"one\ntwo\n"})
    assert rows(folder)[0][1] == "no caption file: a.txt does not exist; see --caption-ext"
    report = built(folder, tmp_path / "out", caption_ext=".caption")
    assert (report["records"], report["images"]) == (2, 1)


def test_labelled_folders_and_searched_folders_have_the_same_images(tmp_path):
    folder = filled(tmp_path / "set", {f"class/{name}": data for name, data in (IMAGES | SYSTEM).items()})
    expected = sorted(f"class/{name}" for name in IMAGES)
    data = read_labelled(folder)
    assert sorted(data.names) == expected
    assert sorted(FolderCorpus(folder).names) == expected
    from eval.classify.features import in_rgb

    assert {in_rgb(data.read(number)).mode for number in range(len(data))} == {"RGB"}


def members(n: int = 4) -> list[tuple[str, bytes]]:
    images = [png(noise(seed=number)) for number in range(n)]
    pairs = [
        [(f"{number:03}.png", data), (f"{number:03}.txt", b"thing %d" % number)]
        for number, data in enumerate(images)
    ]
    return [member for pair in pairs for member in pair]


def test_members_of_file_managers_are_ignored_in_tars(tmp_path):
    """macOS writes ._x before x, so that no sample's members are adjacent."""
    made = []
    for name, data in members():
        made += [(f"._{name}", b"\0\5\26\7"), (name, data), (f"__MACOSX/._{name}", b"\0\5\26\7")]
    made += [(".DS_Store", b""), ("README.md", b"# read me"), ("set/.ipynb_checkpoints/a.png", png(noise()))]
    report = built(tar_of(tmp_path / "a.tar", made), tmp_path / "out")
    assert (report["images"], report["rejects"]) == (4, 0)
    assert report["ignored"] == {"hidden or system file": 18, "no image beside it": 1}
    assert ignored(tmp_path / "out")["README.md"] == "no image beside it"


def test_images_of_a_tar_are_known_by_content(tmp_path):
    made = []
    for name, data in IMAGES.items():
        stem = name.partition(".")[0]
        made += [(name if "." in name else f"{name}.img", data), (f"{stem}.txt", name.encode())]
    made += [("paper.pdf", b"%PDF-1.7"), ("paper.txt", b"a paper"), ("x.bin", b"?"), ("x.txt", b"unknown")]
    report = built(tar_of(tmp_path / "a.tar", made), tmp_path / "out", max_rejects=0.5)
    assert report["images"] == len(IMAGES)
    assert report["reasons"] == {"PDF is not supported": 1, "not an image": 1}


def test_samples_of_one_name_are_those_of_webdataset(tmp_path):
    """s.jpg, s.seg.png and s.txt are one sample; where each last dot has its pair, it counts."""
    images = [png(noise(seed=number)) for number in range(4)]
    made = []
    for number, data in enumerate(images):
        group = [("png", data), ("seg.png", images[0]), ("txt", b"thing %d" % number), ("depth.npy", b"?")]
        order = np.random.default_rng(number).permutation(len(group))
        made += [(f"dir.1/s{number}.{group[at][0]}", group[at][1]) for at in order]
    path = tar_of(tmp_path / "a.tar", made)
    with open(path, "rb") as file:
        ours = {
            sample.key: {name: member.data for name, member in sample.members.items()}
            for sample in tar_samples(file)
        }
    theirs = webdataset.WebDataset(path, shardshuffle=False, empty_check=False)
    assert ours == {
        sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in theirs
    }
    report = built(path, tmp_path / "out")
    assert (report["images"], report["rejects"]) == (4, 0)
    assert images_of(tmp_path / "out") == {data: [f"thing {number}"] for number, data in enumerate(images)}
    masks = built(path, tmp_path / "masks", image_ext="seg.png")
    assert masks["images"] == 4


def test_dots_in_names_are_no_members(tmp_path):
    images = [png(noise(seed=number)) for number in range(3)]
    names = ["Cancel_20", "Cancel_20.5", "Cancel_20.6.final"]
    made = []
    for name, data in zip(names, images, strict=True):
        made += [(f"{name}.png", data), (f"{name}.txt", name.encode())]
    for order in (made, made[2:] + made[:2]):
        built(tar_of(tmp_path / "a.tar", order), out := tmp_path / f"out{len(order[0][0])}")
        assert images_of(out) == {data: [name] for name, data in zip(names, images, strict=True)}
    unpaired = tar_of(tmp_path / "b.tar", [("x.5.png", images[0]), ("x.6.txt", b"of another image")])
    assert [problem.partition(":")[0] for _, problem in rows(unpaired)] == ["empty caption"]


def test_captions_of_a_tar(tmp_path):
    image, text = png(noise()), "\ufeffa caf\u00e9".encode()
    samples = {
        "bom": ([("txt", text)], ["a café"]),
        "lines": ([("txt", b"one\ntwo\n")], ["one", "two"]),
        "list": ([("json", b'["one", "two"]')], ["one", "two"]),
        "column_list": ([("json", b'{"caption": ["one", "two"]}')], ["one", "two"]),
        "column": ([("json", '\ufeff{"caption": "one"}'.encode())], ["one"]),
        "boxes": ([("json", b"[[1, 2]]"), ("txt", b"one")], ["one"]),
        "number": ([("json", b'{"caption": 3}')], ["caption is not text: 3; text must be a string"]),
        "nothing": (
            [("cap", b"one"), ("json", b"{}")],
            ["empty caption: the sample has png, cap, json; see --caption-ext and --caption-column"],
        ),
        "empty": ([("txt", b" \n")], [""]),
    }
    made = []
    for name, (others, _) in samples.items():
        made += [(f"{name}.png", image), *((f"{name}.{extension}", data) for extension, data in others)]
    path = tar_of(tmp_path / "a.tar", made)
    expected = [(f"a.tar/{name}", caption) for name, (_, captions) in samples.items() for caption in captions]
    assert rows(path) == expected
    assert rows(path, caption_ext="cap")[-2] == ("a.tar/nothing", "one")


def test_other_names_of_members(tmp_path):
    made = []
    for number in range(3):
        made += [(f"{number}.img", png(noise(seed=number))), (f"{number}.Cap.Text", b"thing %d" % number)]
        made += [(f"{number}.mask.png", png(noise(seed=9)))]
    path = tar_of(tmp_path / "a.tar", made)
    report = built(path, tmp_path / "out", image_ext=".IMG", caption_ext="cap.text")
    assert (report["images"], report["rejects"]) == (3, 0)
    again = build(
        [path],
        tmp_path / "out",
        Reading(image_ext="img", caption_ext=".cap.text"),
        Checking(max_rejects=0.0),
        parallelism=Parallelism(1),
        overwrite=True,
    )
    assert again["images"] == 3


def test_a_sample_with_two_images_asks_for_one(tmp_path):
    made = [("a.png", png(noise())), ("a.jpg", encoded(noise(seed=1), "JPEG")), ("a.txt", b"two")]
    path = tar_of(tmp_path / "a.tar", made)
    assert rows(path)[0][1] == "several images in a sample: it has png, jpg, txt; see --image-ext"
    assert rows(path, image_ext="jpg") == [("a.tar/a", "two")]


def damaged(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_tar_is_never_read_in_part(tmp_path, suffix):
    """Of these, tarfile, webdataset and open_clip take five for the end of the tar."""
    path = tar_of(tmp_path / "good.tar", members(8))
    data = Path(path).read_bytes()
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
    fourth, end = headers[6], headers[-1] + 1024
    assert data[end : end + 1024] == bytes(1024)
    garbage = np.random.default_rng(0).integers(0, 256, 512, dtype=np.uint8).tobytes()
    bit = bytes([data[fourth + 3] ^ 1])
    kinds = {  # the file, what is said, and how many samples were seen to be complete
        "cut at a member": (data[:fourth], f"byte {fourth}: it ends without the two blocks of zeros", 2),
        "cut in a header": (data[: fourth + 100], f"byte {fourth}: it ends without", 2),
        "cut in an image": (data[: fourth + 700], f"byte {fourth}: unexpected end of data of 003.png", 3),
        "garbage for a header": (damaged(data, fourth, garbage), f"byte {fourth}: no header of a member", 2),
        "one bit of a header": (damaged(data, fourth + 3, bit), f"byte {fourth}: no header", 2),
        "zeros over members": (damaged(data, fourth, bytes(2048)), f"byte {fourth + 2048}: something", 3),
        "no end": (data[:end], f"byte {end}: it ends without", 7),
        "half an end": (data[: end + 512], f"byte {end + 512}: it ends without the second", 8),
        "garbage after the end": (data + garbage, f"byte {len(data)}: something follows", 8),
        "two tars in one": (data + data, f"byte {len(data)}: something follows", 8),
    }
    for name, (content, message, complete) in kinds.items():
        broken = tmp_path / f"broken.tar{suffix}"
        broken.write_bytes(gzip.compress(content) if suffix else content)
        with pytest.raises(UserError) as caught:
            rows(broken)
        text = str(caught.value)
        assert f"{broken}: cannot be read ({message}" in text, name
        assert f", after {complete} samples, the last of them {complete - 1:03}); get" in text, name


def test_a_damaged_tar_ends_build_and_index_and_its_correction_starts(tmp_path):
    path = tar_of(tmp_path / "a.tar", members(8))
    good = Path(path).read_bytes()
    for command in (build, index):
        out = tmp_path / command.__name__
        (tmp_path / "a.tar").write_bytes(good[:-11_000])
        with pytest.raises(UserError, match=r"a\.tar: cannot be read"):
            command([path], out, parallelism=Parallelism(1))
        (tmp_path / "a.tar").write_bytes(good)
        assert command([path], out, parallelism=Parallelism(1))["images"] == 8


def test_all_damaged_tars_are_named_at_once(tmp_path):
    paths = [tar_of(tmp_path / f"{number}.tar", members(4)) for number in range(4)]
    for path in paths[1::2]:
        Path(path).write_bytes(Path(path).read_bytes()[:3000])
    with pytest.raises(UserError) as caught:
        build(paths, tmp_path / "out", parallelism=Parallelism(1))
    said = str(caught.value).splitlines()
    assert [line.partition(": cannot be read")[0] for line in said] == paths[1::2]
    assert not (tmp_path / "out").exists()


def test_tars_of_other_writers_are_whole(tmp_path):
    """GNU tar pads to 10 KiB and has long names; webdataset, Python's formats and ours end in two blocks."""
    folder = filled(tmp_path / "set", {f"{'long/' * 40}{name}": data for name, data in members()})
    subprocess.run(["tar", "-cf", tmp_path / "gnu.tar", "--sort=name", "-C", folder, "."], check=True)
    subprocess.run(
        ["tar", "-cf", tmp_path / "pax.tar", "--format=posix", "--sort=name", "-C", folder, "."], check=True
    )
    with webdataset.TarWriter(str(tmp_path / "web.tar")) as writer:
        for number in range(4):
            writer.write(
                {"__key__": f"{number:03}", "png": members()[2 * number][1], "txt": f"thing {number}"}
            )
    for name in ("gnu.tar", "pax.tar", "web.tar"):
        assert [caption for _, caption in rows(tmp_path / name)] == [
            f"thing {number}" for number in range(4)
        ], name


def test_a_joined_tar_is_read_after_tar_concatenate(tmp_path):
    first = tar_of(tmp_path / "a.tar", members(3))
    second = tar_of(tmp_path / "b.tar", [(f"x{name}", data) for name, data in members(2)])
    subprocess.run(["tar", "--concatenate", "--file", first, second], check=True)
    assert len(rows(first)) == 5


def test_a_sparse_or_huge_member_is_not_read_into_memory(tmp_path):
    with open(tmp_path / "hole.png", "wb") as file:
        file.truncate(1 << 40)
    subprocess.run(["tar", "-S", "-cf", tmp_path / "a.tar", "-C", tmp_path, "hole.png"], check=True)
    assert rows(tmp_path / "a.tar")[0][1].startswith(
        "not a regular file: hole.png is a link, a device or a sparse"
    )
