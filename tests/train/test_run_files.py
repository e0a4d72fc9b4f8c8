"""What a run wrote about itself must be whole: else an older checkpoint is used, or a sentence said."""

import json
import os
import shutil

import pytest
from conftest import assert_mistake, call_here
from runs import assert_bit_equal, checkpoint, no_validation, recipe, state_of, trained

from data_prep.errors import UserError
from slurm.status import status
from train.__main__ import main, summary
from train.recipe import parse, to_yaml
from train.run.checkpoint import newest
from train.run.folder import Run
from train.run.records import read_metrics, read_status, seal
from train.world import World

JUNK = ("", "{", "[]", "null", "3", '"text"', "[" * 100_000, '{"a": NaN}', "\ud800")


def write(path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def whole(tiny_model, icon_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    plan = recipe(tiny_model, icon_shards, folder, epochs=2, workers=0, keep_checkpoints=3)
    return trained(plan, no_validation).folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run", symlinks=True)


def test_a_changed_state_is_passed_over(run, capsys):
    folder = run / "checkpoints"
    assert newest(folder, warn=True)[0].name == "samples-000000000288"
    path = checkpoint(run, 288) / "state.json"
    state = state_of(path.parent)
    resealed = [{"samples": 264}, {"samples": True}, {"best": [1, 0.5]}, {"best_checkpoint": "../../x"}]
    resealed += [
        {"sha256": {"../../recipe.yaml": "0"}},
        {"score": [True, "a"]},
        {"sha256": []},
        {"weights": 1},
    ]
    texts = [json.dumps({**state, "samples": 312}), json.dumps({**state, "rolled_back": True})]
    for change in resealed:
        changed = {**state, **change}
        texts.append(json.dumps({**changed, "state_sha256": seal(changed)}))
    texts += [json.dumps({key: value for key, value in state.items() if key != name}) for name in state]
    texts.remove(json.dumps({key: value for key, value in state.items() if key != "state_sha256"}))
    texts = [text for text in texts if '"weights"' in text and '"initial_retention"' in text]
    for text in (*JUNK, *texts):
        write(path, text)
        assert newest(folder, warn=True)[0].name == "samples-000000000264", text[:300]
        assert "samples-000000000288 is damaged" in capsys.readouterr().err
    write(path, json.dumps({name: value for name, value in state.items() if name != "state_sha256"}))
    assert newest(folder, warn=True)[0].name == "samples-000000000288"  # of an earlier version


def test_added_and_missing_files_are_passed_over(run):
    folder, last = run / "checkpoints", checkpoint(run, 288)
    listed = state_of(last)["sha256"]
    assert {path.name for path in last.iterdir()} == {*listed, "state.json"}
    (last / "ema.safetensors").write_bytes(b"other weights")
    assert newest(folder, warn=True)[0].name == "samples-000000000264"
    (last / "ema.safetensors").unlink()
    (last / "notes.txt").write_text("mine")
    assert newest(folder, warn=True)[0] == last
    for name in listed:
        os.rename(last / name, last / "kept")
        (last / name).mkdir()
        assert newest(folder, warn=True)[0].name == "samples-000000000264"
        (last / name).rmdir()
        os.rename(last / "kept", last / name)
    assert newest(folder, warn=True)[0] == last


def test_a_damaged_status_is_written_again(run, whole, capsys):
    for text in (*JUNK, '{"state": 3, "samples": 1}', '{"state": "finished", "samples": "all"}'):
        write(run / "status.json", text)
        assert read_status(run) == {}
        status(run)
        assert f"{run}: not started" in capsys.readouterr().out
    plan = parse([str(run / "recipe.yaml")])
    assert "is finished: 288 pairs" in summary(trained(plan, no_validation))
    assert_bit_equal(run, whole)


def test_damaged_environment_and_metrics_are_a_sentence(run):
    (run / "status.json").unlink()
    for text in (*JUNK[:-2], JUNK[-1], '{"fitted": []}'):
        before = (run / "environment.json").read_bytes()
        write(run / "environment.json", text)
        assert_mistake(call_here(main, run / "recipe.yaml"), "environment.json: damaged", "restore it")
        (run / "environment.json").write_bytes(before)
    whole = (run / "metrics.jsonl").read_text()
    for text in (*JUNK[:-2], '{"samples": "1"}', '{"loss": 1}'):
        write(run / "metrics.jsonl", f"{text}\n{whole}")
        assert_mistake(
            call_here(main, run / "recipe.yaml"), "metrics.jsonl:1: not a line", "remove this line"
        )
    write(run / "metrics.jsonl", JUNK[-1])
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_metrics(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text(whole + '{"samples": 28')
    assert len(read_metrics(run / "metrics.jsonl")) == whole.count("\n")


def test_a_copied_run_is_its_own_run(run, whole, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    shutil.rmtree(checkpoint(run, 288))
    (run / "status.json").unlink()
    assert parse([str(run / "recipe.yaml")]).run == str(run)
    monkeypatch.chdir(run)
    assert parse(["recipe.yaml"]).run == "."
    assert parse(["recipe.yaml", "--run", "elsewhere"]).run == "elsewhere"
    monkeypatch.undo()
    found = Run(parse([str(run / "recipe.yaml")]), World())
    assert (found.folder, found.samples) == (run, 264)
    found.close()
    trained(parse([str(run / "recipe.yaml")]), no_validation)
    assert_bit_equal(run, whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    plain = tmp_path / "recipe.yaml"  # in no run
    plain.write_text(to_yaml(parse([str(whole / "recipe.yaml")])))
    assert parse([str(plain)]).run == str(whole)
