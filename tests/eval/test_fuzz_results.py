"""Results, heads and lists of other people, read by evaluation: values or one sentence."""

import json
from pathlib import Path

import fuzz
import numpy as np
import pytest
from safetensors.torch import save_file

import eval.arrays
from data_prep.shards import Shards
from eval.arrays import load_arrays
from eval.classify.features import read_cached
from eval.classify.heads import Head, load_head
from eval.classify.templates import read_map, read_names, read_templates
from eval.retrieval.queries import read_queries
from eval.retrieval.score import QueryScores, read_json

RESULT = {
    "model": "local-dir:base",
    "weights_sha256": "0" * 64,
    "data": "icons/shards, test",
    "data_sha256": "1" * 64,
    "n_images": 12,
    "n_texts": 12,
    "metrics": {"image_to_text/R@1": 0.5, "text_to_image/R@1": 0.25, "mean/R@1": None},
    "intervals": {"image_to_text/R@1": [0.4, 0.6]},
}


def on_file(path: Path, act):
    def written(data: bytes):
        path.write_bytes(data)
        return act(path)

    return written


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_result(count, memory_folder):
    act = on_file(memory_folder / "result.json", read_json)
    fuzz.check(count, fuzz.json_files(RESULT), act, valid=[json.dumps(RESULT).encode()])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("count", fuzz.COUNTS[:1])
def test_head(count, kind, memory_folder):
    Head(kind, ["a", "b"], 8, "0" * 64).save(memory_folder)
    file, weights = memory_folder / f"{kind}.json", memory_folder / f"{kind}.safetensors"
    whole, state = file.read_bytes(), weights.read_bytes()
    fuzz.check(count, fuzz.json_files(json.loads(whole)), on_file(file, load_head), valid=[whole])
    file.write_bytes(whole)
    act = on_file(weights, lambda _: load_head(file))
    fuzz.check(count, fuzz.changed_bytes(state[:4000] + state[-100:], state), act, valid=[state])


def test_the_width_of_a_head_takes_no_memory(memory_folder):
    Head("linear", ["a", "b"], 8, "0" * 64).save(memory_folder)
    file = memory_folder / "linear.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "width": 1 << 40}))
    with fuzz.few_addresses(), pytest.raises(fuzz.UserError, match="features of 8 numbers"):
        load_head(file)
    save_file({}, memory_folder / "linear.safetensors")
    with pytest.raises(fuzz.UserError, match="not the weights of a head"):
        load_head(file)


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_arrays(count, memory_folder):
    path = memory_folder / "a.npz"
    arrays = {"image_features": np.ones((4, 3), np.float32), "usable": np.ones(4, bool)}
    arrays |= {"image_to_text/R@1": np.ones(4), "groups/image_to_text": np.arange(4)}
    seeds = []
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays)
        seeds.append(path.read_bytes())

    def act(file: Path) -> None:
        read_cached(file, 4)
        QueryScores.load(file)

    fuzz.check(count, fuzz.changed_bytes(*seeds), on_file(path, act), valid=seeds)


def test_a_bomb_of_arrays_is_refused(memory_folder, monkeypatch):
    monkeypatch.setattr(eval.arrays, "FREE_BYTES", 1 << 20)
    np.savez_compressed(memory_folder / "a.npz", a=np.zeros(1 << 23, np.uint8))
    with pytest.raises(ValueError, match="bytes of arrays"):
        load_arrays(memory_folder / "a.npz")


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_lists_of_names(count, memory_folder):
    classes = {"a_b": "red", "c": "blue"}

    def act(file: Path) -> None:
        read_map(file)
        read_names(str(file), list(classes))

    fuzz.check(count, fuzz.json_files(classes), on_file(memory_folder / "names.json", act))
    for read in (lambda file: read_templates(str(file)), lambda file: read_names(str(file), list(classes))):
        fuzz.check(fuzz.FEW, fuzz.changed_bytes(b"a {}.\nan {} of\n"), on_file(memory_folder / "a.txt", read))


@pytest.mark.parametrize("count", fuzz.COUNTS[:1])
def test_queries_that_are_no_captions(count, icon_shards, memory_folder):
    shards = Shards(icon_shards, "test")
    lines = [
        {"text": "a bell", "keys": [shards.key(0)]},
        {"text": "a house", "keys": [shards.meta(1)["image"]]},
    ]
    whole = b"\n".join(json.dumps(line).encode() for line in lines)

    def table(choices: fuzz.Choices) -> bytes:
        if choices.number() % 2:
            return fuzz.edited(whole, choices)
        return fuzz.changed_json(lines[0], choices).replace(b"\n", b" ") + b"\n" + whole

    act = on_file(memory_folder / "queries.jsonl", lambda file: read_queries(file, shards))
    fuzz.check(count, fuzz.made_by(table), act, valid=[whole])
