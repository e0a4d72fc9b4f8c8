"""A build to a URL: the same bytes as a local build, each tar once, the manifest last, whatever is killed."""

import gc
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_mistake, call_here, environment, noise_images
from stores import Proxy, objects, proxied, s3

import data_prep.__main__
from data_prep.build import target
from data_prep.build.pipeline import Parallelism, Reading, build, merge
from data_prep.errors import UserError
from data_prep.store.remote import Store

URL, FOLDER = "s3://bucket/data/shards", "bucket/data/shards"


@pytest.fixture(scope="module")
def bucket():
    with s3() as files:
        yield files


@pytest.fixture
def store(bucket):
    """The empty bucket."""
    if bucket.find("bucket"):
        bucket.rm("bucket", recursive=True)
        bucket.mkdir("bucket")
    return bucket


@pytest.fixture(autouse=True)
def builds(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(target, "BUILDS", tmp_path / "builds")
    return tmp_path / "builds"


def pairs(folder: Path, n: int = 24) -> str:
    folder.mkdir()
    return str(noise_images(folder, n, groups=n, mode="RGBA"))


def run(source: str, out, processes: int = 1, **options) -> dict:
    options = {"images_per_shard": 8, "min_shards": 1, "parallelism": Parallelism(processes), **options}
    return build([source], out, Reading(group_column="group"), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def puts(monkeypatch) -> list[str]:
    """Names of the files that this process uploads, in order."""
    names, put = [], Store.put

    def noted(self, file, name):
        put(self, file, name)
        names.append(name)

    monkeypatch.setattr(Store, "put", noted)
    return names


def test_it_is_the_local_build_and_its_manifest_comes_last(store, tmp_path, builds, puts, capsys):
    source = pairs(tmp_path / "images")
    report = run(source, tmp_path / "local")
    local = capsys.readouterr().out
    assert run(source, URL) == report
    said = local.replace(f"open {tmp_path / 'local'}", f"the report is {URL}")
    assert capsys.readouterr().out == said
    assert objects(store, FOLDER) == contents(tmp_path / "local")
    assert puts[-1] == "manifest.json"
    assert sorted({*puts} - {".made.json"}) == sorted([name for name in puts if name != ".made.json"])
    assert not list(builds.iterdir())


def test_processes_and_tasks_upload_the_same(store, tmp_path):
    source = pairs(tmp_path / "images")
    run(source, tmp_path / "local")
    run(source, f"{URL}/by-two", processes=2)
    assert objects(store, f"{FOLDER}/by-two") == contents(tmp_path / "local")
    for task in range(2):
        parallelism = Parallelism(1, num_tasks=2, task=task)
        assert run(source, f"{URL}/by-tasks", parallelism=parallelism, work=tmp_path / "work") is None
        run(source, tmp_path / "by-tasks", parallelism=parallelism)
    merge(f"{URL}/by-tasks", processes=1, work=tmp_path / "work")
    merge(tmp_path / "by-tasks", processes=1)
    assert objects(store, f"{FOLDER}/by-tasks") == contents(tmp_path / "by-tasks")
    assert not (tmp_path / "work").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_request_lets_the_same_command_end_it(step, store, tmp_path, monkeypatch, builds):
    """Before and after each request that changes something. A tar is written and uploaded twice at most, and
    what an unfinished build has left is deleted.
    """
    source = pairs(tmp_path / "images", 8)
    run(source, tmp_path / "local")
    expected = contents(tmp_path / "local") | {"README.md": b"mine"}
    store.pipe_file(
        f"{FOLDER}/.made.json", b'{"kind": "shards", "files": ["train/train-000099.tar", "../a"]}'
    )
    store.pipe_file(f"{FOLDER}/train/train-000099.tar", b"of a build that was not finished")
    store.pipe_file(f"{FOLDER}/README.md", b"mine")
    store.pipe_file("bucket/data/a", b"mine, too")
    uploads, left, moment = [], [0], 0

    def killed(act, is_after: bool):
        def one(*arguments):
            left[0] -= 1
            if left[0] == 0 and not is_after:
                raise Killed
            result = act(*arguments)
            uploads.extend(map(str, arguments[2:]))
            if left[0] == 0:
                raise Killed
            return result

        return one

    gc.freeze()  # so that it is fast below
    while not (tmp_path / "finished").exists():
        with monkeypatch.context() as patch:
            for owner, name in ((Store, "put"), (Store, "delete"), (target.os, "replace")):
                patch.setattr(owner, name, killed(getattr(owner, name), bool(moment % 2)))
            left[0] = 1 + moment // 2
            try:
                run(source, URL)
                (tmp_path / "finished").touch()
            except Killed:
                moment += step
            except UserError as error:  # it was killed after the very last step
                assert "exists already" in str(error)  # noqa: PT017
                (tmp_path / "finished").touch()
        gc.collect()  # a process that is killed has no database open
        assert len(list(builds.rglob("*.tar"))) <= 1
        if (there := objects(store, FOLDER)).keys() >= {"manifest.json"}:
            assert there == expected
    gc.unfreeze()
    assert there == expected
    assert moment > 20
    assert not [path for path in builds.rglob("*") if path.is_file() and ".done" not in str(path)]
    assert store.cat_file("bucket/data/a") == b"mine, too"
    tars = [name for name in uploads if name.endswith(".tar")]
    assert {tars.count(name) for name in tars} <= {1, 2}


SCRIPT = """
import sys
from data_prep.build.pipeline import Parallelism, Reading, build
options = {"parallelism": Parallelism(2), "images_per_shard": 8, "min_shards": 1}
build([sys.argv[1]], sys.argv[2], Reading(group_column="group"), **options)
"""


@pytest.mark.slow
def test_kill_9_while_two_processes_upload(store, tmp_path):
    source = pairs(tmp_path / "images", 120)
    run(source, tmp_path / "local")
    kills = 0
    with proxied(Proxy(latency_s=0.05)):  # so that a build takes a second, on any machine
        for n_files in (2, 6, 12, sys.maxsize):  # in the store when it is killed
            process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, source, URL],
                cwd=ROOT,
                env=environment(XDG_CACHE_HOME=str(tmp_path / "cache")),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            while process.poll() is None and len(store.find(FOLDER)) < n_files:
                time.sleep(0.01)
            if process.poll() is None:
                process.kill()
                kills += 1
            errors = process.communicate()[1].decode()
            assert process.returncode in (0, -signal.SIGKILL), errors
    assert process.returncode == 0
    assert kills >= 2
    assert objects(store, FOLDER) == contents(tmp_path / "local")


def test_an_older_data_set_is_replaced_when_asked(store, tmp_path, builds):
    source, fewer = pairs(tmp_path / "images"), pairs(tmp_path / "fewer", 12)
    run(source, URL)
    old = objects(store, FOLDER)
    with pytest.raises(UserError, match="exists already; pass another --out, or --overwrite"):
        run(fewer, URL)
    assert objects(store, FOLDER) == old
    store.pipe_file(f"{FOLDER}/notes.txt", b"mine")
    run(fewer, URL, overwrite=True)
    run(fewer, tmp_path / "local")
    assert objects(store, FOLDER) == contents(tmp_path / "local") | {"notes.txt": b"mine"}
    store.pipe_file(f"{FOLDER}/train/other.tar", b"mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds train/other\.tar, which was not made by this command"):
            run(source, URL, overwrite=overwrite)
    store.rm(f"{FOLDER}/train/other.tar")
    with pytest.raises(UserError, match=r"would overwrite .*, which this command reads"):
        build([f"{URL}/train/train-000000.tar"], URL, overwrite=True)


def test_an_object_that_was_lost_or_replaced_is_uploaded_again(store, tmp_path, builds, monkeypatch):
    source = pairs(tmp_path / "images")
    run(source, tmp_path / "local")
    with monkeypatch.context() as patch:
        patch.setattr(target.StoreTarget, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(source, URL)
    (work,) = builds.iterdir()
    (work / "manifest.json").unlink()
    store.rm(f"{FOLDER}/train/train-000000.index.tsv")
    store.pipe_file(f"{FOLDER}/val/val-000000.tar", b"cut")
    with open(work / "uploaded.jsonl", "a") as journal:
        journal.write('{"name": "test/test-0000')  # a kill came
    run(source, URL)
    assert objects(store, FOLDER) == contents(tmp_path / "local")


def test_what_a_store_refuses_is_said_before_images_are_checked(store, tmp_path, monkeypatch):
    source = pairs(tmp_path / "images", 4)
    monkeypatch.setattr("data_prep.build.pipeline.scan", None)
    main = data_prep.__main__.main
    for url, words in {
        "https://host/shards": "cannot be uploaded over HTTP; pass --out s3://",
        "s3://no-such-bucket/shards": "make the bucket or repository first",
        "zz://bucket/shards": "zz://bucket/shards",
    }.items():
        assert_mistake(call_here(main, "build", source, "--out", url), words)
    assert_mistake(
        call_here(main, "build", source, "--out", tmp_path / "out", "--work", tmp_path / "work"),
        "is for an --out that is a URL",
    )
    assert_mistake(call_here(main, "index", "a.tar", "--out", URL), "index writes a folder of this machine")
    assert not objects(store, FOLDER)
    monkeypatch.setattr("data_prep.store.remote.Store._file_system", refusing)
    assert_mistake(call_here(main, "build", source, "--out", URL), "refused", "AWS_PROFILE")


def test_a_repository_on_the_hub(hub, tmp_path):
    hub.put("me/shards", {"README.md": b"mine"})
    source = pairs(tmp_path / "images", 8)
    run(source, tmp_path / "local")
    run(source, "hf://me/shards")
    repo = hub.repos["me/shards"]
    assert repo.commits[repo.head] == contents(tmp_path / "local") | {"README.md": b"mine"}


def refusing(self):
    class Files:
        def __getattr__(self, name):
            raise PermissionError("Access Denied")

    return Files()
