"""Runs, exports, models and weights of changed files: read as they are, passed over, or one sentence."""

import contextlib
import json
import shutil
from pathlib import Path

import fuzz
import pytest
import torch
from conftest import save_tiny
from safetensors.torch import save

from slurm.status import status
from train.export.folder import read_record, shards_of
from train.export.snippets import use
from train.model.foreign import check_folder
from train.model.preprocessing import preprocessing_of
from train.model.source import read_config
from train.model.weights import read_weights
from train.publish.card import data_facts, int8_table, model_facts, seconds_of_steps, tags_of, training_facts
from train.publish.card_tables import read_tables
from train.publish.hub import check_export, to_upload
from train.run.checkpoint import newest
from train.run.records import read_environment, read_metrics, read_status, seal
from train.run.trackers import open_trackers
from train.tune.table import markdown, recipes_in, results

SAMPLES = 96


@pytest.fixture
def run(memory_folder) -> Path:
    """What a run of no weights has written."""
    run = memory_folder / "runs" / "a"
    checkpoint = run / "checkpoints" / f"samples-{SAMPLES:012d}"
    checkpoint.mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"model: demo-vit:none\ndata: {memory_folder / 'no'}\nrun: {run}\n")
    state = {
        "samples": SAMPLES,
        "score": [True, 0.5],
        "best": [True, 0.5],
        "best_checkpoint": checkpoint.name,
    }
    state |= {"rolled_back": False, "weights": "ema", "initial_retention": None, "sha256": {}}
    (checkpoint / "state.json").write_text(json.dumps(state | {"state_sha256": seal(state)}))
    (run / "checkpoints" / "best").symlink_to(checkpoint.name)
    lines = [
        {"samples": 0, "val/mean/R@1": 0.1},
        {"samples": 48, "train/loss": 1.5, "time/pairs_per_s": 20.0},
    ]
    lines += [{"samples": SAMPLES, "val/mean/R@1": 0.5, "ema/val/mean/R@1": 0.6, "epoch": 2}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = {"time": "2026-11-27T10:00:00+00:00", "host": "here"}
    (run / "status.json").write_text(json.dumps({"state": "running", "samples": SAMPLES, **times}))
    fitted = {"micro_batch_size": 8, "activation_checkpointing": "none", "requested": {}}
    environment = {"packages": {"torch": "2", "open_clip_torch": "3"}, "git_commit": None, "world_size": 1}
    environment |= {"device": "cpu", "threads": 2, "data_fingerprint": "0" * 64, "fitted": fitted}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def look_at(run: Path) -> None:
    """All that sweeps, the card and the status on a cluster read of a run."""
    rows = results(run.parent, recipes_in(run.parent))
    markdown(rows).encode()
    json.dumps(rows)
    training_facts(run)
    data_facts(run)
    shards_of(run)
    status(run)


@pytest.mark.parametrize("name", ["environment.json", "status.json", "checkpoints/best/state.json"])
@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_json_of_runs(count, name, run, capsys):
    file = run / name
    whole = file.read_bytes()

    def act(data: bytes) -> None:
        file.write_bytes(data)
        found = newest(run / "checkpoints", warn=False)
        if (
            name.endswith("state.json") and data != whole and found
        ):  # the seal was left out, or nothing changed
            state = json.loads(data)
            assert "state_sha256" not in state or state["state_sha256"] == seal(state)
        json.dumps([read_status(run), read_environment(run)], allow_nan=False)
        if len(data) % 50 == 0:  # some of them: the parser of recipes takes long
            look_at(run)
        capsys.readouterr()

    fuzz.check(count, fuzz.json_files(json.loads(whole)), act, valid=[whole])
    file.write_bytes(whole)
    look_at(run)


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_metrics(count, run, capsys):
    file = run / "metrics.jsonl"
    whole = file.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]

    def act(data: bytes) -> None:
        file.write_bytes(data)
        found = read_metrics(file)
        json.dumps(found, allow_nan=False)
        seconds_of_steps(found)
        markdown(results(run.parent, {"a": None}))

    def changed(choices: fuzz.Choices) -> bytes:
        if choices.number() % 2:
            return fuzz.edited(whole, choices)
        return whole + fuzz.changed_json(choices.of(lines), choices).replace(b"\n", b" ") + b"\n"

    fuzz.check(count, fuzz.made_by(changed), act, valid=[whole])


def test_the_names_of_a_tracked_run(run):
    recipe = recipes_in(run.parent)["a"]
    file = run / "trackers.json"

    def act(data: bytes) -> None:
        file.write_bytes(data)
        open_trackers(run, recipe, 0)

    fuzz.check(fuzz.FEW, fuzz.json_files({"name": "a", "id": "0f"}), act)


MODEL = {
    "model": "base",
    "weights_sha256": "0" * 64,
    "metrics": {"image_to_text/R@1": 0.5, "calibration_error": 0.1},
}
MODEL |= {
    "intervals": {"image_to_text/R@1": [0.4, 0.6]},
    "differences": {"image_to_text/R@1": [0.1, 0.0, 0.2, 0.04]},
}
DATA = {"data": "icons/shards, test", "data_sha256": "1" * 64, "n_images": 12, "n_texts": 12}
COMPARISON = {**DATA, "models": [MODEL, {**MODEL, "weights_sha256": "2" * 64}]}
COMPARISON["retention"] = {**COMPARISON, "data_sha256": "3" * 64}


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_results_for_the_card(count, memory_folder):
    file = memory_folder / "result.json"

    def act(data: bytes) -> None:
        file.write_bytes(data)
        for found in read_tables((file,), "0" * 64):
            found.markdown(), found.calibration(), found.eval_results([]), found.eval_entries(["a/b"], "c")

    whole = json.dumps(COMPARISON).encode()
    fuzz.check(count, fuzz.json_files(COMPARISON, {**DATA, **MODEL}), act, valid=[whole])


FIGURES = {f"{direction}/R@{k}": 0.5 for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)}


@pytest.fixture
def export(memory_folder) -> Path:
    """What an export of the tiny model has written, without the other formats."""
    (memory_folder / "export").mkdir()
    folder = save_tiny(memory_folder / "export")
    names = ("open_clip_config.json", "open_clip_model.safetensors")
    differences = {"open_clip": {"weights": 0.0, "image_features": 0.0, "text_features": None}}
    record = {
        "weights_sha256": "0" * 64,
        "dtype": "fp32",
        "background": "#ffffff",
        "differences": differences,
    }
    record |= {"files": {name: {"format": "open_clip", "bytes": 1, "sha256": "0"} for name in names}}
    record |= {
        "compared_on": "images",
        "compared_files": {"original": 3},
        "open_clip_only": "",
        "in_folder": [],
    }
    record |= {"int8": {"n_images": 3, "min_cosine": 0.9, "fp32": FIGURES, "int8": FIGURES}}
    (folder / "export.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_record_of_an_export(count, export):
    file = export / "export.json"
    whole = file.read_bytes()

    def act(data: bytes) -> None:
        file.write_bytes(data)
        record = read_record(export)
        for found in to_upload(export).values():
            assert found.resolve().is_relative_to(export.resolve())
        use(record, str(export)), tags_of(record), int8_table(record), model_facts(export)
        check_export(export)

    fuzz.check(count, fuzz.json_files(json.loads(whole)), act)


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_the_configuration_of_a_model(count, export):
    file = export / "open_clip_config.json"
    whole = file.read_bytes()
    transformers = {"model_type": "clip", "text_config": {"auto_map": {"a": "b"}}, "vision_config": {}}

    def act(files: tuple[bytes, bytes]) -> None:
        file.write_bytes(files[0])
        (export / "config.json").write_bytes(files[1])
        for read in (lambda: read_config(file), lambda: check_folder(export)):
            with contextlib.suppress(fuzz.UserError):
                read()
        preprocessing_of("ViT-B-32", export / "open_clip_model.safetensors")

    def changed(choices: fuzz.Choices) -> tuple[bytes, bytes]:
        return fuzz.changed_json(json.loads(whole), choices), fuzz.changed_json(transformers, choices)

    fuzz.check(count, fuzz.made_by(changed, 60), act)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_weights(count, suffix, memory_folder):
    file = memory_folder / f"a{suffix}"
    state = {"visual.proj": torch.ones(3, 2), "logit_scale": torch.ones(())}
    if suffix == ".safetensors":
        seeds = [save(state)]
    else:
        seeds = []
        for value in (state, {"state_dict": state, "epoch": 3, "args": Path("x")}):
            torch.save(value, file, _use_new_zipfile_serialization=suffix == ".pt")
            seeds.append(file.read_bytes())

    def act(data: bytes) -> None:
        file.write_bytes(data)
        for tensor in read_weights(file).values():
            tensor.shape  # noqa: B018 a property

    fuzz.check(count, fuzz.changed_bytes(*seeds), act, valid=seeds[:1])
    shutil.rmtree(memory_folder)
    memory_folder.mkdir()
