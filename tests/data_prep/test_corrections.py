"""A mistake never blocks its correction, and the correction checks nothing twice."""

import re
import sqlite3
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import PIL
import pytest
import simplejpeg
from conftest import ROOT, noise_images, png, tars
from PIL import Image

import data_prep.build.scan
from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build, merge
from data_prep.errors import UserError
from data_prep.images import check

ONE = Parallelism(1)
STRICT = Checking(max_rejects=0)


@pytest.fixture
def checked(monkeypatch) -> list:
    """The files that were decoded since; it can be cleared."""
    found = []

    def spy(data, rules):
        found.append(data)
        return check(data, rules)

    monkeypatch.setattr(data_prep.build.scan, "check", spy)
    return found


def stop(*arguments, **options) -> str:
    """A build that ends with a sentence."""
    with pytest.raises(UserError) as caught:
        build(*arguments, **{"parallelism": ONE, **options})
    assert not re.search("[0-9a-f]{32}", str(caught.value)), caught.value
    return str(caught.value)


def fresh(folder: Path, *arguments, **options) -> dict[str, str]:
    """The tars of the same command without a mistake before it."""
    build(*arguments[:1], folder, *arguments[1:], **{"parallelism": ONE, **options})
    return tars(folder)


def test_a_wrong_column_and_then_the_right_one(tmp_path, capsys):
    path = noise_images(tmp_path, 20)
    for wrong in (Reading("file"), Reading(caption_column="text"), Reading(group_column="product")):
        assert "no column" in stop([str(path)], tmp_path / "out", wrong)
        assert not (tmp_path / "out.partial").exists()
    # A column of another meaning: every image path is wrong.
    assert "missing file" in stop([str(path)], tmp_path / "out", Reading("caption", "image"))
    capsys.readouterr()
    build([str(path)], tmp_path / "out", parallelism=ONE)
    assert "another" not in capsys.readouterr().out  # nothing was checked: without a word
    assert tars(tmp_path / "out") == fresh(tmp_path / "fresh", [str(path)])


def test_what_was_checked_is_kept_when_the_input_is_corrected(tmp_path, checked, capsys):
    """Fixed images, which are spooled, and plain ones; new, changed, renamed and removed rows."""
    path = noise_images(tmp_path, 40)
    for number in range(0, 40, 4):
        image = Image.open(tmp_path / f"{number}.png").convert("RGBA")
        image.putpixel((0, 0), (0, 0, 0, 0))
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "bad.png,bad,"]) + "\n")
    assert "not an image" in stop([str(path)], tmp_path / "out", check=STRICT)
    assert len(checked) == 41
    checked.clear()
    Image.open(tmp_path / "7.png").rotate(90, expand=True).save(tmp_path / "7.png")  # another file
    Image.open(tmp_path / "8.png").rotate(90, expand=True).save(tmp_path / "8.png")
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(20, 20, 3)).save(tmp_path / "new.png")
    lines[3] = "2.png,another caption,"
    del lines[5]
    path.write_text("\n".join([*lines, "new.png,new,"]) + "\n")
    capsys.readouterr()
    build([str(path)], tmp_path / "out", check=STRICT, parallelism=ONE)
    printed = capsys.readouterr().out
    assert f"another content of {path}; 40 checked images are kept where their files are the same" in printed
    names = ("7.png", "8.png", "new.png")
    assert checked == [data for data in checked if data in [(tmp_path / name).read_bytes() for name in names]]
    assert len(checked) == 3
    assert tars(tmp_path / "out") == fresh(tmp_path / "fresh", [str(path)], check=STRICT)


def test_what_other_options_can_keep_is_kept(tmp_path, checked, capsys):
    path = noise_images(tmp_path, 20)
    (tmp_path / "0.png").unlink()
    stop([str(path)], tmp_path / "out", check=STRICT)
    assert len(checked) == 19
    # A mistake in between loses nothing.
    assert "no column" in stop([str(path)], tmp_path / "out", Reading(group_column="product"), check=STRICT)
    other = {"split": Splitting(val=0.3), "images_per_shard": 5}
    stop([str(path)], tmp_path / "out", Reading(group_column="group"), check=STRICT, **other)
    assert len(checked) == 19
    # Other checks keep nothing, and need no flag to start again.
    capsys.readouterr()
    build([str(path)], tmp_path / "out", check=Checking(min_side_px=9, max_rejects=0.1), parallelism=ONE)
    assert len(checked) == 38
    printed = capsys.readouterr().out
    assert "--min-side-px (8, now 9)" in printed
    assert "19 checked images are checked again" in printed
    expected = fresh(tmp_path / "fresh", [str(path)], check=Checking(min_side_px=9, max_rejects=0.1))
    assert tars(tmp_path / "out") == expected


def test_shards_of_other_options_are_not_taken(tmp_path, monkeypatch):
    """A build that stops after some shards, and goes on with another split."""
    path = noise_images(tmp_path, 30)
    write = data_prep.build.write.write_shard

    def full(shard, members):
        if shard.name == "train-000007.tar":
            raise OSError(28, "No space left on device")
        return write(shard, members)

    monkeypatch.setattr(data_prep.build.write, "write_shard", full)
    with pytest.raises(OSError, match="No space"):
        build([str(path)], tmp_path / "out", parallelism=ONE)
    assert list((tmp_path / "out.partial" / "train").glob("*.tar"))
    monkeypatch.undo()
    build([str(path)], tmp_path / "out", split=Splitting(seed=1), parallelism=ONE)
    assert tars(tmp_path / "out") == fresh(tmp_path / "fresh", [str(path)], split=Splitting(seed=1))


def test_a_replaced_file_is_checked_again_by_the_same_command(tmp_path, checked):
    path = noise_images(tmp_path, 20)
    good = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(good[:300])
    assert "truncated image" in stop([str(path)], tmp_path / "out")
    (tmp_path / "3.png").write_bytes(good)
    checked.clear()
    build([str(path)], tmp_path / "out", parallelism=ONE)
    assert checked == [good]
    assert tars(tmp_path / "out") == fresh(tmp_path / "fresh", [str(path)])


def test_the_advice_on_a_file_that_changes_in_the_build_works(tmp_path, checked, monkeypatch):
    path = noise_images(tmp_path, 20)
    summarize = data_prep.build.pipeline.summarize
    new = png(Image.open(tmp_path / "4.png").rotate(180))

    def change(plan):
        (tmp_path / "3.png").write_bytes(new)
        return summarize(plan)

    monkeypatch.setattr(data_prep.build.pipeline, "summarize", change)
    said = stop([str(path)], tmp_path / "out")
    assert "3.png changed after it was checked (its bytes differ); run the same command again" in said
    monkeypatch.setattr(data_prep.build.pipeline, "summarize", summarize)
    checked.clear()
    build([str(path)], tmp_path / "out", parallelism=ONE)
    assert checked == [new]
    assert tars(tmp_path / "out") == fresh(tmp_path / "fresh", [str(path)])


def test_images_in_tables_and_tasks_are_kept_too(tmp_path, checked):
    """Parquet that contains the images, in two tasks; the second command names the group column."""
    source = str(tmp_path / "pairs.parquet")
    rows = pd.read_csv(noise_images(tmp_path, 24, groups=6))
    rows["image"] = [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in rows["image"]]
    rows.to_parquet(source)
    for task in (0, 1):
        build([source], tmp_path / "out", parallelism=Parallelism(1, 2, task))
    assert len(checked) == 24
    for task in (0, 1):
        build([source], tmp_path / "out", Reading(group_column="group"), parallelism=Parallelism(1, 2, task))
    assert len(checked) == 24
    merge(tmp_path / "out", processes=1)
    assert tars(tmp_path / "out") == fresh(tmp_path / "fresh", [source], Reading(group_column="group"))


def test_remote_images_are_not_fetched_again(tmp_path, checked):
    path = noise_images(tmp_path, 12)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            if self.command == "GET":
                asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    read = Reading(images=f"http://127.0.0.1:{server.server_port}/")
    path.write_text(path.read_text() + "none.png,missing,\n")
    assert "missing file" in stop([str(path)], tmp_path / "out", read)
    asked.clear()
    checked.clear()
    path.write_text(path.read_text().replace("none.png,missing,\n", "0.png,one more,\n"))
    build([str(path)], tmp_path / "out", read, parallelism=ONE)
    server.shutdown()
    assert (asked, checked) == ([], [])
    assert tars(tmp_path / "out") == fresh(tmp_path / "fresh", [str(path)], Reading())


def test_two_commands_at_once_do_not_mix(tmp_path):
    """The first holds the lock while it writes shards, after it has closed its part."""
    path = noise_images(tmp_path, 10)
    (tmp_path / "out.partial").mkdir()
    code = (
        "import sys, pathlib, data_prep.atomic as atomic\n"
        "with atomic.locked(pathlib.Path(sys.argv[1]), 'building in'): print(flush=True); input()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out.partial")]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=-1, stdout=-1) as first:
        first.stdout.readline()
        assert "another process is building in it" in stop([str(path)], tmp_path / "out")
        first.communicate(b"\n")
    build([str(path)], tmp_path / "out", parallelism=ONE)


def test_parts_of_an_earlier_version_are_started_again(tmp_path):
    path = noise_images(tmp_path, 10)
    (tmp_path / "0.png").unlink()
    stop([str(path)], tmp_path / "out")
    part = tmp_path / "out.partial" / "part-00000-of-00001.sqlite"
    with sqlite3.connect(part) as db:
        db.executescript("DROP TABLE earlier; ALTER TABLE images DROP COLUMN source; PRAGMA user_version = 0")
    db.close()
    Image.open(tmp_path / "1.png").rotate(180).save(tmp_path / "0.png")
    build([str(path)], tmp_path / "out", parallelism=ONE)
    assert tars(tmp_path / "out") == fresh(tmp_path / "fresh", [str(path)])


def test_a_library_that_is_installed_meanwhile_keeps_what_was_checked(tmp_path, checked, monkeypatch):
    """As one that reads another format; a library of another version may decode otherwise."""
    path = noise_images(tmp_path, 10)
    (tmp_path / "0.png").unlink()
    versions = {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__}
    for found, expected in (
        ({**versions, "other": ""}, 9),
        ({**versions, "other": "1"}, 9),
        ({**versions, "other": "2"}, 18),
    ):
        monkeypatch.setattr(data_prep.build.pipeline, "library_versions", lambda found=found: found)
        stop([str(path)], tmp_path / "out")
        assert len(checked) == expected
