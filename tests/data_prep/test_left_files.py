"""What a kill leaves of a file is deleted by the next command that writes there; nothing else is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import environment
from runs import recipe, trained

from data_prep import atomic
from data_prep.atomic import PARTIAL, PLACE, atomic_file, own_partial, sweep, write_json
from eval.options import Inference
from eval.search.command import embed

WRITE = (
    "import pathlib, sys, time\nfrom data_prep.atomic import atomic_file\n"
    "with atomic_file(pathlib.Path(sys.argv[1])) as partial:\n"
    "    partial.write_text('half'); print(partial, flush=True); time.sleep(60)"
)
OTHER = "0123abcd" if PLACE != "0123abcd" else "0123abce"
# Of a person, or of another program.
FOREIGN = (".a.json.partial", "a.json.partial", ".a.json.123.partial", f"a.{PLACE}-1.partial")
FOREIGN += (".a.zip-1.partial", ".a.0123abcd-x.partial")


def writing(path: Path) -> tuple[subprocess.Popen, Path]:
    """A process in the middle of writing a file, and its partial file."""
    process = subprocess.Popen([sys.executable, "-c", WRITE, path], env=environment(), stdout=-1, text=True)
    return process, Path(process.stdout.readline().strip())


def test_a_partial_file_of_a_killed_process_is_deleted_by_the_next(tmp_path):
    for name in FOREIGN:
        (tmp_path / name).write_text("mine")
    killed, left = writing(tmp_path / "a.json")
    alive, in_use = writing(tmp_path / "a.json")
    with killed, alive:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert {left, in_use} < set(tmp_path.iterdir())
        elsewhere, old = (tmp_path / f".a.json.{OTHER}-{pid}.partial" for pid in (1, 2))
        for path in (elsewhere, old):
            path.write_text("of another machine")
        os.utime(old, (0, 0))
        write_json(tmp_path / "b.json", {})
        assert {path.name for path in tmp_path.iterdir()} == {
            *(*FOREIGN, "b.json", in_use.name, elsewhere.name)
        }
        alive.kill()
    sweep(tmp_path, is_locked=True)
    assert {path.name for path in tmp_path.iterdir()} == {*FOREIGN, "b.json"}


def test_links_and_folders_are_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for path in (outside, folder, folder / f".a.{OTHER}-1.partial"):
        path.mkdir()
    (outside / "mine").write_text("mine")
    (folder / f".a.{OTHER}-2.partial").symlink_to(outside)
    (folder / f".a.{OTHER}-1.partial" / "link").symlink_to(outside)
    sweep(folder, is_locked=True)
    assert list(folder.iterdir()) == []
    assert (outside / "mine").read_text() == "mine"
    sweep(tmp_path / "nowhere")


def test_a_name_is_the_processs_own(tmp_path):
    path = own_partial(tmp_path / "a.json")
    assert PARTIAL.fullmatch(path.name).groups() == (PLACE, str(os.getpid()))
    with atomic_file(tmp_path / "a.json") as partial:
        partial.write_text("a")
        assert partial == path
        sweep(tmp_path)
        assert path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    """A build writes thousands of shards to one folder."""
    listed = []
    monkeypatch.setattr(atomic, "sweep", listed.append)
    for number in range(3):
        write_json(tmp_path / f"{number}.json", {})
    assert listed == [tmp_path]


def test_a_run_and_an_index_begin_without_what_was_left(tmp_path, tiny_model, icon_shards):
    """Of any machine: both are locked."""
    run, unfinished = tmp_path / "run", tmp_path / ".index.unfinished"
    for folder in (run, unfinished):
        folder.mkdir()
        (folder / f".metrics.jsonl.{OTHER}-1.partial").write_text("half")
    trained(recipe(tiny_model, icon_shards, run, epochs=1, global_batch_size=96, workers=0))
    assert not list(run.glob(".*.partial"))
    embed(tiny_model, icon_shards, tmp_path / "index", split="test", inference=Inference(workers=0))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "index"}
