"""Shards behind a URL: a run is the run on local shards, bit for bit, whatever the store and the cache do."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_icons, call
from runs import assert_bit_equal, flags, newest, no_validation, recipe, trained
from stores import Proxy, forget_connections, proxied, s3, upload

import data_prep.store.remote
from data_prep.atomic import check_output
from data_prep.cli import run_place
from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.store.cache import BLOCK, PAGE, Cache, CachedFile, choose
from eval.embed import load_for_eval
from eval.options import Inference
from eval.retrieval.score import evaluate
from eval.search.command import embed as embed_corpus
from eval.search.index import Index
from slurm.submit import common_settings
from train.data.ahead import Fetched, plan
from train.data.order import WINDOW_SHARDS, Order
from train.export.reference import samples
from train.recipe import parse
from train.world import World

OPTIONS = {"epochs": 2, "save_every_minutes": 9.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all():
    """Runs of processes of their own have one, and are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def many_shards(icon_folder, tmp_path_factory):
    """The icons in about 48 shards, three windows."""
    out = tmp_path_factory.mktemp("many") / "shards"
    build_icons(icon_folder, out, images_per_shard=4)
    return out


@pytest.fixture(scope="module")
def local_run(tiny_model, many_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("local") / "run"
    return trained(recipe(tiny_model, many_shards, run, **OPTIONS), no_validation).folder


@pytest.fixture(scope="module")
def store():
    with s3() as files:
        yield files


@pytest.fixture(scope="module")
def url(store, many_shards):
    return upload(store, many_shards, "many")


def size_of_tars(folder, split="train"):
    return sum(path.stat().st_size for path in (folder / split).glob("*.tar"))


def sent_tars(proxy, split="train"):
    return sum(n for path, n in proxy.sent.items() if path.endswith(".tar") and f"/{split}/" in path)


def test_a_run_is_that_on_local_shards_and_fetches_each_shard_once(
    tiny_model, many_shards, local_run, url, tmp_path
):
    with proxied(Proxy()) as proxy:
        plan = recipe(tiny_model, url, tmp_path / "run", cache_dir=str(tmp_path / "cache"), **OPTIONS)
        trained(plan, no_validation)
    assert_bit_equal(local_run, tmp_path / "run")
    # what no batch of the two epochs reads is not fetched: an epoch is of whole batches
    assert 0.9 < sent_tars(proxy) / size_of_tars(many_shards) <= 1
    assert len(list((tmp_path / "cache/blocks").iterdir())) <= len(
        list((many_shards / "train").glob("*.tar"))
    )


def test_a_cache_of_little_more_than_a_window_changes_nothing(
    tiny_model, many_shards, local_run, url, tmp_path
):
    """A window of 16 shards fits, the three windows do not: shards give way, and come again. Without workers,
    which would read ahead by more than a window of these few samples.
    """
    most = 24 * (BLOCK + PAGE)
    with proxied(Proxy()) as proxy:
        folder = tmp_path / "cache"
        options = {"cache_dir": str(folder), "cache_gb": most / 1e9, "workers": 0, **OPTIONS}
        plan = recipe(tiny_model, url, tmp_path / "run", **options)
        trained(plan, no_validation)
    assert_bit_equal(local_run, tmp_path / "run")
    held = sum(path.stat().st_blocks * 512 for path in (folder / "blocks").iterdir())
    assert held <= most + 2 * (BLOCK + PAGE) < size_of_tars(many_shards)
    # a part of them was fetched once for both epochs
    assert 1 < sent_tars(proxy) / size_of_tars(many_shards) < 1.9


def test_failing_requests_change_nothing(tiny_model, local_run, url, tmp_path, monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(data_prep.store.remote, "FIRST_WAIT_S", 0.01)
    with proxied(Proxy(refuse=lambda path: next(numbers) % 20 == 7)) as proxy:
        plan = recipe(tiny_model, url, tmp_path / "run", cache_dir=str(tmp_path / "cache"), **OPTIONS)
        trained(plan, no_validation)
    assert proxy.n_refused > 3
    assert_bit_equal(local_run, tmp_path / "run")


def test_several_sets_and_replay_may_be_anywhere(tiny_model, icon_shards, many_shards, url, tmp_path):
    def run(name, second, **more):
        plan = recipe(
            tiny_model,
            {str(icon_shards): 0.5, str(second): 0.5},
            tmp_path / name,
            replay=str(second),
            **more,
            **OPTIONS,
        )
        trained(plan, no_validation)
        return tmp_path / name

    here, there = run("here", many_shards), run("there", url, cache_dir=str(tmp_path / "cache"))
    assert_bit_equal(here, there)


def test_evaluation_and_an_index_are_the_same(tiny_model, many_shards, url, tmp_path):
    choose(str(tmp_path / "cache"), 0)
    clip, inference = load_for_eval(tiny_model, Inference(), World()), Inference(workers=1, batch_size=16)
    here, there = (evaluate(clip, Shards(place, "val"), World(), inference) for place in (many_shards, url))
    assert here == there
    for name, place in (("here", many_shards), ("there", url)):
        embed_corpus(tiny_model, place, tmp_path / name, inference=inference)
    here, there = (Index(tmp_path / name) for name in ("here", "there"))
    assert (here.stored == there.stored).all()
    assert here.manifest["data_sha256"] == there.manifest["data_sha256"]


def test_commands_take_a_url(url, capsys):
    """Not its path, which would lose a slash."""
    run_place("data_prep.verify:verify", "verify", [url])
    assert f"{url}: all 61 shards are unchanged" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--stage /tmp: s3://bucket/many is fetched by the training itself"):
        common_settings(url, "/tmp", "train", requeue=False)


def test_a_sample_is_read_without_a_loader(many_shards, url, tmp_path):
    choose(str(tmp_path / "cache"), 0)
    here, there = (Shards(place, "train") for place in (many_shards, url))
    assert here.fingerprint == there.fingerprint
    assert [here.read(n) for n in range(len(here))] == [there.read(n) for n in range(len(there))]
    assert isinstance(there.remote_files()[0], CachedFile)


@pytest.mark.parametrize(
    ("place", "environment", "words"),
    [
        ("s3://bucket/nothing", {}, "no manifest.json so not a folder of shards"),
        ("s3://no-such-bucket/x", {}, "s3://no-such-bucket/x bucket does not exist"),
        ("s3://bucket/many", {"AWS_ACCESS_KEY_ID": None}, "refused credentials AWS_PROFILE"),
        ("zz://bucket/many", {}, "zz://bucket/many Protocol not known URLs begin with s3://"),
        ("s3://", {}, "s3:// names no bucket"),
        ("s3:/bucket/many", {}, "a URL has two slashes"),
        (
            "s3://bucket/many",
            {"AWS_ENDPOINT_URL": "127.0.0.1:1"},
            "refused Invalid endpoint AWS_ENDPOINT_URL",
        ),
        ("http://127.0.0.1:9/x", {}, "http://127.0.0.1:9/x/manifest.json no answer in attempts"),
    ],
)
def test_what_a_store_refuses_is_said_at_start(
    tiny_model, url, tmp_path, monkeypatch, place, environment, words
):
    monkeypatch.setattr(data_prep.store.remote, "FIRST_WAIT_S", 0.01)
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_connections()
    with pytest.raises(UserError) as error:
        trained(recipe(tiny_model, place, tmp_path / "run", cache_dir=str(tmp_path)), no_validation)
    assert all(word in str(error.value) for word in words.split()), error.value
    assert "\n" not in str(error.value)


def test_outputs_are_on_this_machine(tmp_path):
    """Their paths have lost a slash where commands see them."""
    with pytest.raises(UserError, match=r"--json s3:/bucket/r.json: must be on this machine"):
        check_output("--json", Path("s3://bucket/r.json"))
    for key in ("run", "cache_dir"):
        with pytest.raises(UserError, match="must be a folder of this machine"):
            parse(["--model", "m", "--data", "d", "--run", "r", f"--{key}", "s3://bucket/r"])


def test_an_export_is_compared_on_shards_of_a_url(tiny_model, url, many_shards, tmp_path):
    choose(str(tmp_path / "cache"), 0)
    here, there = (samples(place, (255, 255, 255)) for place in (many_shards, url))
    assert [image.tobytes() for image in here.images] == [image.tobytes() for image in there.images]
    assert here.captions == there.captions
    assert "of the val split of many (" in there.source


def test_a_shard_that_is_gone_or_shorter_is_named(store, tiny_model, many_shards, tmp_path):
    broken = upload(store, many_shards, "broken")
    name = "bucket/broken/train/train-000003.tar"
    whole = store.cat_file(name)
    for change, words in (
        (lambda: store.rm_file(name), "missing, but listed"),
        (lambda: store.pipe_file(name, whole[:-5000]), "ends before byte"),
    ):
        change()
        forget_connections()
        with pytest.raises(UserError, match=f"train-000003.tar: .*{words}"):
            trained(
                recipe(tiny_model, broken, tmp_path / words[:4], cache_dir=str(tmp_path / words), **OPTIONS),
                no_validation,
            )


def test_a_cache_that_is_smaller_than_a_window_is_refused(tiny_model, url, tmp_path):
    with pytest.raises(UserError, match=r"--cache-gb 1e-06: .* at least"):
        trained(
            recipe(tiny_model, url, tmp_path / "run", cache_dir=str(tmp_path), cache_gb=1e-6), no_validation
        )


def test_a_manifest_does_not_lead_out_of_its_url(store, many_shards, tmp_path):
    evil = upload(store, many_shards, "evil")
    manifest = json.loads((many_shards / "manifest.json").read_text())
    for name in ("../many/train/train-000000.tar", "/etc/passwd", "s3://other/x.tar", "a\\b", "train//x"):
        manifest["splits"]["train"]["shards"][0]["file"] = name
        store.pipe_file("bucket/evil/manifest.json", json.dumps(manifest).encode())
        with pytest.raises(UserError, match=r"leads out|no name of a file"):
            Shards(evil, "train")


def test_damage_in_the_store_is_found_and_damage_in_the_cache_is_mended(
    store, tiny_model, many_shards, local_run, url, tmp_path
):
    plan = {"cache_dir": str(tmp_path / "cache"), **OPTIONS}
    trained(recipe(tiny_model, url, tmp_path / "first", **plan), no_validation)
    shards = Shards(many_shards, "train")
    image_offset = int(shards._offsets[5, 0])
    file = Shards(url, "train").remote_files()[shards.shards_of(np.array([5]))[0]]
    with open(tmp_path / "cache/blocks" / file.digest, "r+b") as blocks:
        blocks.seek(file.start + image_offset)
        blocks.write(b"\0\0\0\0")
    trained(recipe(tiny_model, url, tmp_path / "second", **plan), no_validation)
    assert_bit_equal(local_run, tmp_path / "second")

    flipped = upload(store, many_shards, "flipped")
    name = f"bucket/flipped/{file.name}"
    data = bytearray(store.cat_file(name))
    data[image_offset] ^= 1
    store.pipe_file(name, bytes(data))
    plan |= {"cache_dir": str(tmp_path / "other")}
    with pytest.raises(UserError, match=f"{shards.key(5)}: altered since it was built"):
        trained(recipe(tiny_model, flipped, tmp_path / "third", **plan), no_validation)


@pytest.mark.slow
def test_two_ranks_of_a_node_fetch_each_shard_once(tiny_model, many_shards, url, tmp_path):
    """They share the cache, and its lock; the run is that of local shards on two ranks."""
    runs = {}
    for name, place in (("here", many_shards), ("there", url)):
        plan = recipe(tiny_model, place, tmp_path / name, cache_dir=str(tmp_path / "cache"), **OPTIONS)
        with proxied(Proxy()) as proxy:
            call(*flags(plan, tmp_path / f"{name}.yaml"), ranks=2)
        runs[name] = proxy
    assert_bit_equal(tmp_path / "here", tmp_path / "there")
    assert sent_tars(runs["here"]) == 0
    assert 0.9 < sent_tars(runs["there"]) / size_of_tars(many_shards) <= 1


@pytest.mark.slow
def test_twenty_kills_in_mid_fetch_change_nothing(tiny_model, local_run, url, tmp_path):
    """Each kill comes while shards are on their way: the store is slow, and the cache holds a window."""
    run = tmp_path / "run"
    places = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 24 * (BLOCK + PAGE) / 1e9}
    plan = recipe(tiny_model, url, run, **places, **(OPTIONS | {"save_every_minutes": 0.0}))
    context, random = multiprocessing.get_context("forkserver"), np.random.default_rng(0)
    context.set_forkserver_preload(["runs", "s3fs"])
    with proxied(Proxy(latency_s=0.02, bytes_per_s=2e5)) as proxy:
        for kills in range(1, 21):
            before = sent_tars(proxy)
            ready = context.Event()
            process = context.Process(target=in_process_group, args=(plan, dict(os.environ), ready))
            process.start()
            assert ready.wait(120)
            deadline = time.monotonic() + 2
            while sent_tars(proxy) == before and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.4))
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            if (run / "checkpoints").is_dir() and newest(local_run).name in os.listdir(run / "checkpoints"):
                print(f"finished after {kills} kills")
                break
        trained(plan, no_validation)
    assert kills > 5
    assert_bit_equal(local_run, run)


def in_process_group(plan, environment, ready):
    """Train in a group of its own, so that a kill takes the workers too."""
    os.setpgid(0, 0)
    ready.set()
    os.environ.update(environment)
    torch.set_num_threads(1)
    trained(plan, no_validation)


def test_an_index_that_points_beyond_its_tar_is_named(store, many_shards, tmp_path):
    """No block beyond the end is asked for, and none is counted."""
    evil, name = upload(store, many_shards, "beyond"), "train/train-000000.index.tsv"
    lines = (many_shards / name).read_text().splitlines()
    values = lines[1].split("\t")
    values[2] = str((1 << 62) + 5)  # the image's offset
    data = "\n".join([lines[0], "\t".join(values), *lines[2:], ""]).encode()
    store.pipe_file(f"bucket/beyond/{name}", data)
    manifest = json.loads((many_shards / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["index_sha256"] = hashlib.sha256(data).hexdigest()
    store.pipe_file("bucket/beyond/manifest.json", json.dumps(manifest).encode())
    choose(str(tmp_path / "cache"), 0)
    shards = Shards(evil, "train")
    with pytest.raises(UserError, match="ends before byte"):
        shards.read(0)
    assert shards.read(1) == Shards(many_shards, "train").read(1)


def test_files_are_held_for_one_epoch_at_a_time(many_shards, url, tmp_path):
    """With room for two windows, every file is on its way before a batch reads it, for all of several epochs:
    what is done with one makes room for the next.
    """
    choose(str(tmp_path / "cache"), 0)
    shards, batch = Shards(url, "train"), 4
    order = Order(shards.shard_sizes, batch, seed=0)
    n_steps = 3 * order.steps_per_epoch
    positions, batches = np.arange(n_steps * batch), np.repeat(np.arange(n_steps), batch)
    chunk = order.numbers(positions), batches, order.epochs(positions)
    wanted = list(plan(shards, [chunk]))
    assert [each.first for each in wanted] == sorted(each.first for each in wanted)
    read = {(number, batch) for number, batch in zip(shards.shards_of(chunk[0]), batches, strict=True)}
    files = {file.name: number for number, file in enumerate(shards.remote_files())}
    for number, at in read:
        assert any(files[each.file.name] == number and each.first <= at <= each.last for each in wanted)

    fetched, coming, n_files = Fetched(Cache(tmp_path / "none", 2 * WINDOW_SHARDS * BLOCK)), iter(wanted), 0
    following = next(coming)
    for at in range(n_steps):
        while following and fetched.has_room(following, at):
            fetched.hold(following)
            n_files, following = n_files + 1, next(coming, None)
        assert following is None or following.first > at, at
    assert n_files == len(wanted) > 2 * len(files)
