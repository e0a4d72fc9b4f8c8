"""--overwrite deletes only what a command of the same kind made, and only after the new folder is whole."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import build_icons, noise_images, tars

from data_prep import atomic
from data_prep.atomic import MARK, check_output, check_replaceable, replace_folder
from data_prep.build.pipeline import Parallelism, Reading, build, merge
from data_prep.errors import UserError
from data_prep.icons import icons
from data_prep.sheets import check_csv
from eval.compare.command import compare
from eval.options import Inference
from eval.search.command import embed
from train.export.__main__ import command as export


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def commands(tmp_path, icon_folder, icon_shards, tiny_model) -> dict:
    """Each command that replaces a folder; it takes the folder."""
    inference = Inference(workers=0)
    tar = next((icon_shards / "val").glob("*.tar"))
    from data_prep.build.pipeline import index

    return {
        "build": lambda out: build_icons(icon_folder, out, overwrite=True),
        "index": lambda out: index([str(tar)], out, parallelism=Parallelism(1), overwrite=True),
        "icons": lambda out: icons(out, limit=5, overwrite=True),
        "embed": lambda out: embed(tiny_model, icon_shards, out, "val", overwrite=True, inference=inference),
        "export": lambda out: export(tiny_model, out, data=icon_shards, overwrite=True),
    }


def test_what_another_command_made_is_not_deleted(commands, tmp_path, icon_shards, icon_index):
    shutil.copytree(icon_shards, tmp_path / "shards")
    shutil.copytree(icon_index, tmp_path / "index")
    (tmp_path / "foreign").mkdir()
    for name in ("manifest.json", "export.json", "icons.csv", "thesis.tex"):
        (tmp_path / "foreign" / name).write_text("{}")
    folders = {"shards": {"icons", "embed", "export"}, "index": {"build", "index", "icons", "export"}}
    for name, which in {**folders, "foreign": set(commands)}.items():
        before = contents(tmp_path / name)
        for each in sorted(which):
            with pytest.raises(UserError, match="not made by this command, and is not deleted"):
                commands[each](tmp_path / name)
        assert contents(tmp_path / name) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "index", "shards"]


def test_a_folder_to_make_is_not_below_a_device(commands):
    for command in commands.values():
        with pytest.raises(
            UserError, match="/dev/null is a device or pipe, not a folder; pass another --out"
        ):
            command(Path("/dev/null/out"))


@pytest.mark.parametrize("out", [".", "/", "..", "a/.."])
def test_a_folder_to_make_has_a_name(out, commands, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (*commands.values(), merge):
        with pytest.raises(UserError, match=r"must end in the name of a folder to make, such as .*new$"):
            command(Path(out))
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("name", ["build", "index", "icons", "embed"])
def test_a_file_that_was_added_stops_it_and_its_own_folder_is_replaced(name, commands, tmp_path):
    out = tmp_path / "out"
    commands[name](out)
    made = contents(out)
    (out / "decisions.csv").write_text("mine")
    with pytest.raises(UserError, match=r"out: holds decisions.csv, which was not made by .*move it away"):
        commands[name](out)
    assert contents(out) == {**made, "decisions.csv": b"mine"}
    os.rename(out / "decisions.csv", tmp_path / "decisions.csv")
    commands[name](out)
    assert contents(out).keys() == made.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decisions.csv", "out"]


def test_inputs_are_not_deleted(tmp_path, tiny_model, icon_shards):
    (tmp_path / "images").mkdir()
    csv_file = noise_images(tmp_path / "images", 12)
    build([str(csv_file)], tmp_path / "out", parallelism=Parallelism(1))
    shutil.copytree(tmp_path / "images", tmp_path / "out" / "images")
    (tmp_path / "link").symlink_to(tmp_path / "out" / "images")
    images, before = tmp_path / "out" / "images", contents(tmp_path / "out")
    for source, reading in (
        (images / csv_file.name, Reading()),
        (tmp_path / "link" / csv_file.name, Reading()),
        (csv_file, Reading(images=str(images))),
    ):
        with pytest.raises(UserError, match=r"--overwrite would delete .*, which this command reads"):
            build([str(source)], tmp_path / "out", reading, parallelism=Parallelism(1), overwrite=True)
    for tar in (tmp_path / "out").glob("train/*.tar"):  # not even what the command has made
        with pytest.raises(UserError, match="which this command reads"):
            build([str(tar)], tmp_path / "out", parallelism=Parallelism(1), overwrite=True)
    for data, out in ((icon_shards, icon_shards), (tmp_path / "out", tmp_path / "out")):
        with pytest.raises(UserError, match="which this command reads"):
            embed(tiny_model, data, out, overwrite=True)
    model = Path(tiny_model.partition(":")[2])
    with pytest.raises(UserError, match="which this command reads"):
        export(tiny_model, model, overwrite=True)
    shutil.copytree(model, tmp_path / "compared" / "wise_ft")
    own = f"local-dir:{tmp_path / 'compared' / 'wise_ft'}"
    with pytest.raises(UserError, match="which this command reads"):
        compare([own, tiny_model], icon_shards, "val", tmp_path / "compared", save=0.5)
    with pytest.raises(UserError, match="is a link to"):
        build([str(csv_file)], tmp_path / "link", parallelism=Parallelism(1), overwrite=True)
    assert contents(tmp_path / "out") == before


def test_tasks_and_merge_keep_to_it(tmp_path):
    (tmp_path / "images").mkdir()
    csv_file = noise_images(tmp_path / "images", 12)
    out = tmp_path / "out"
    build([str(csv_file)], out, parallelism=Parallelism(1))
    for task in range(2):
        build([str(csv_file)], out, parallelism=Parallelism(1, 2, task), overwrite=True)
    (out / "decisions.csv").touch()
    with pytest.raises(UserError, match=r"holds decisions\.csv"):
        merge(out, processes=1, overwrite=True)
    (out / "decisions.csv").unlink()
    merge(out, processes=1, overwrite=True)
    assert len(tars(out))


class Killed(BaseException):
    pass


def test_a_kill_at_any_moment_lets_the_same_command_end_it(tmp_path, monkeypatch):
    """At each rename and deletion of a replacement: old or new is whole, and the command works again."""
    icons(tmp_path / "first", limit=4)
    old = contents(tmp_path / "first")
    icons(tmp_path / "second", limit=3, seed=1)
    new = contents(tmp_path / "second")
    finished = moment = 0
    while not finished:
        out = tmp_path / f"at-{moment}" / "icons"
        shutil.copytree(tmp_path / "first", out)
        left = [moment]

        def killed(act, left=left):
            def one(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return act(*arguments, **options)

            return one

        shutil.copytree(tmp_path / "second", out.with_name("partial"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed(os.replace))
            patch.setattr(Path, "unlink", killed(Path.unlink))
            patch.setattr(atomic.shutil, "rmtree", killed(shutil.rmtree))
            try:
                replace_folder(out.with_name("partial"), out)
                finished = True
            except Killed:
                pass
        whole = [contents(folder) for folder in (out, out.with_name(".icons.replaced")) if folder.exists()]
        assert old in whole or new in whole
        icons(out, limit=3, seed=1, overwrite=True)
        assert contents(out) == new
        assert {path.name for path in out.parent.iterdir()} <= {"icons", "partial"}
        moment += 1
    assert moment > len(old)


def test_a_file_that_is_added_while_it_is_replaced_is_kept(tmp_path, capsys):
    icons(tmp_path / "out", limit=4)
    icons(tmp_path / "new", limit=3)
    (tmp_path / "out" / "decisions.csv").write_text("mine")  # after check_replaceable
    replace_folder(tmp_path / "new", tmp_path / "out")
    assert contents(tmp_path / ".out.replaced").keys() == {"decisions.csv", MARK}
    assert ".out.replaced: holds decisions.csv" in capsys.readouterr().err
    for limit in (2, 1):  # and stays through later ones
        icons(tmp_path / "out", limit=limit, overwrite=True)
    assert (tmp_path / ".out.replaced" / "decisions.csv").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.replaced", "out"]


def test_a_strangers_mark_deletes_nothing_elsewhere(tmp_path):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "other")
    listed = ["../thesis.tex", "link/data", "link", str(tmp_path / "thesis.tex")]
    atomic.write_json(tmp_path / "out" / MARK, {"kind": "icons", "files": listed})
    check_replaceable(tmp_path / "out", "icons", overwrite=True)
    icons(tmp_path / "out", limit=2, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()
    assert (tmp_path / "other" / "data").exists()
    for text in ("[]", "{", '{"kind": 1, "files": []}', '{"kind": "icons", "files": [1]}', "[" * 100_000):
        (tmp_path / "out" / MARK).write_text(text)
        with pytest.raises(UserError, match=f"has no {MARK}"):
            check_replaceable(tmp_path / "out", "icons", overwrite=True)


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("Bild;Text\n")
    for option in ("--page", "--json"):
        with pytest.raises(UserError, match=f"{option} .*it begins with 'Bild;Text'"):
            check_output(option, table)
    with pytest.raises(UserError, match=r"--csv .*did not write"):
        check_csv("--csv", table, ["key", "path"])
    for option, text in (
        ("--page", "\ufeff<!doctype html>\n<html>"),
        ("--json", '{"a": 1}'),
        ("--page", "\n"),
    ):
        table.write_text(text)
        check_output(option, table)
    table.write_text('\ufeff"key","path"\r\n1,a.png\r\n')  # as a spreadsheet saves it
    check_csv("--csv", table, ["key", "path"])
    check_csv("--csv", None, ["key", "path"])
    check_csv("--csv", tmp_path / "new.csv", ["key", "path"])
