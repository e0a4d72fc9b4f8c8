"""Shards behind a URL: a run is the run on local shards, bit for bit, whatever the store and the cache do."""

import itertools
import json

import pytest
from conftest import build_icons
from runs import assert_bit_equal, no_validation, recipe, trained
from stores import Proxy, forget_connections, proxied, s3, upload

import data_prep.store.remote
from data_prep.cli import run_place
from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.store.cache import BLOCK, PAGE, CachedFile, choose
from eval.embed import load_for_eval
from eval.options import Inference
from eval.retrieval.score import evaluate
from eval.search.command import embed as embed_corpus
from eval.search.index import Index
from slurm.submit import common_settings
from train.world import World

OPTIONS = {"epochs": 2, "save_every_minutes": 9.0}


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
        ("zz://bucket/many", {}, "zz://bucket/many Protocol not known"),
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


def test_a_shard_that_is_gone_or_shorter_is_named(store, tiny_model, many_shards, tmp_path):
    broken = upload(store, many_shards, "broken")
    name = "bucket/broken/train/train-000003.tar"
    whole = store.cat_file(name)
    for change, words in (
        (lambda: store.rm_file(name), "missing"),
        (lambda: store.pipe_file(name, whole[:-5000]), "ends before byte"),
    ):
        change()
        forget_connections()
        with pytest.raises(UserError, match=f"train-000003.tar: {words}"):
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
