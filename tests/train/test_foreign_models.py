"""A stranger's model folder, repository, recipe or index runs nothing, whatever command opens it."""

import ast
import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from labelled_formats import as_folder, labelled_images
from starting_points import save_model, save_tower

import eval.__main__
import train.__main__
import train.export.__main__
import train.fetch
import train.publish.__main__
from data_prep.errors import UserError
from eval import api
from train.model import foreign
from train.model.clip import load

CODE = "from pathlib import Path\nPath({!r}).write_text('ran')\nraise SystemExit('ran')\n"
AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}


def changed(file: Path, **values) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **values}))


def changed_text(folder: Path, tower: str = "text_cfg", **values) -> None:
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][tower] |= values
    file.write_text(json.dumps(config))


class Pickled:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "ran")


def trusts_code(folder: Path, marker: Path) -> None:
    changed_text(folder, tokenizer_kwargs={"trust_remote_code": True})
    changed(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Evil")


def asks_on_the_terminal(folder: Path, marker: Path) -> None:
    changed(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Evil")


def tower_of_its_own(folder: Path, marker: Path) -> None:
    save_tower(folder / "tower", "bert")
    changed(folder / "tower" / "config.json", auto_map=AUTO_MAP, model_type="evil")
    (folder / "tower" / "evil.py").write_text(CODE.format(str(marker)))
    changed_text(folder, hf_model_name=str(folder / "tower"))


def kernel(folder: Path, marker: Path) -> None:
    save_tower(folder / "tower", "bert")
    changed(folder / "tower" / "config.json", attn_implementation="evil/kernel")
    changed_text(folder, hf_model_name=str(folder / "tower"))


def timm_folder(folder: Path, marker: Path) -> None:
    changed_text(folder, "vision_cfg", timm_model_name=f"local-dir:{folder}")


def pickled_weights(folder: Path, marker: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Pickled(marker)))


def transformers_model(folder: Path, marker: Path) -> None:
    (folder / "open_clip_config.json").unlink()
    changed(folder / "config.json", model_type="clip", auto_map=AUTO_MAP)


WAYS = (trusts_code, asks_on_the_terminal, tower_of_its_own, kernel, timm_folder, pickled_weights)
WAYS += (transformers_model,)


def evil_model(folder: Path, way=trusts_code) -> tuple[Path, Path]:
    """A model's folder and the file that its code would write."""
    marker = folder.parent / f"{folder.name}-ran"
    save_model(folder, "siglip")
    (folder / "evil.py").write_text(CODE.format(str(marker)))
    way(folder, marker)
    return folder, marker


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_way_to_run_code_is_refused(way, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    folder, marker = evil_model(tmp_path / "evil", way)
    hub.put("me/clip", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    for name in (f"local-dir:{folder}", "hf-hub:me/clip"):
        with pytest.raises(UserError):
            load(name)
    assert not marker.exists()


def test_a_tokenizer_elsewhere_on_the_hub_is_opened_without_its_code(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    folder, marker = evil_model(tmp_path / "evil", asks_on_the_terminal)
    hub.put("you/tokenizer", {path.name: path.read_bytes() for path in folder.iterdir()})
    changed_text(folder, hf_tokenizer_name="you/tokenizer")
    names = ("open_clip_config.json", "open_clip_model.safetensors")
    hub.put("me/clip", {name: (folder / name).read_bytes() for name in names})
    with pytest.raises(UserError, match="code"):
        load("hf-hub:me/clip")
    assert not marker.exists()


@pytest.mark.parametrize("key", ["trust_remote_code", "gguf_file", "revision", "tokenizer_type"])
def test_only_known_keys_of_a_tokenizer_are_passed_on(key, tmp_path):
    save_model(tmp_path / "base", "siglip")
    changed_text(tmp_path / "base", tokenizer_kwargs={key: "x"})
    with pytest.raises(UserError, match=rf"text_cfg.tokenizer_kwargs has '{key}'.*clean"):
        load(f"local-dir:{tmp_path / 'base'}")
    changed_text(tmp_path / "base", tokenizer_kwargs={"clean": "canonicalize"})
    assert load(f"local-dir:{tmp_path / 'base'}").tokenizer(["A bell."]).shape == (1, 12)


def test_every_architecture_of_open_clip_passes():
    for file in (ROOT / "train" / "model" / "configs").glob("*.json"):
        foreign.check_model_cfg(file, json.loads(file.read_text()))
    import open_clip

    for name in open_clip.list_models():
        foreign.check_model_cfg(Path(name), open_clip.get_model_config(name))


@pytest.fixture(scope="module")
def evil(tmp_path_factory, icon_index):
    """A model, an index that names it, a recipe, and labelled images."""
    folder = tmp_path_factory.mktemp("evil")
    model, marker = evil_model(folder / "model")
    shutil.copytree(icon_index, folder / "index")
    place = {"before": "local-dir:", "relative": "../model", "absolute": str(model), "after": ""}
    changed(folder / "index" / "manifest.json", model=f"local-dir:{model}", model_place=place)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"model": f"local-dir:{model}", "global_batch_size": 16})
    )
    for seed, split in enumerate(("train", "val")):
        as_folder(folder / "images", labelled_images(seed), split=split)
    return types.SimpleNamespace(folder=folder, model=f"local-dir:{model}", marker=marker)


MAINS = {
    "train": train.__main__.main,
    "export": train.export.__main__.main,
    "fetch": train.fetch.main,
    "publish": train.publish.__main__.main,
    "eval": eval.__main__.main,
}
LINES = {
    "train": ["train", "DIR/recipe.yaml", "--data", "SHARDS", "--run", "DIR/run", "--workers", "0"],
    "train --model": [
        "train",
        "--model",
        "MODEL",
        "--data",
        "SHARDS",
        "--run",
        "DIR/run",
        "--global-batch-size",
        "16",
    ],
    "export": ["export", "MODEL", "--out", "DIR/out"],
    "fetch": ["fetch", "MODEL"],
    "publish": ["publish", "MODEL", "--repo", "me/clip", "--out", "DIR/out", "--dry-run"],
    "retrieval": ["eval", "retrieval", "MODEL", "--data", "SHARDS"],
    "zeroshot": ["eval", "zeroshot", "MODEL", "--data", "DIR/images", "--split", "val"],
    "linear-probe": ["eval", "linear-probe", "MODEL", "--data", "DIR/images", "--split", "val"],
    "confusion": ["eval", "confusion", "MODEL", "--data", "SHARDS"],
    "compare": ["eval", "compare", "demo-vit:none", "MODEL", "--data", "SHARDS", "--out", "DIR/compared"],
    "compositionality": ["eval", "compositionality", "MODEL", "--data", "SHARDS"],
    "leaks": ["eval", "leaks", "MODEL", "--data", "SHARDS", "--csv", "DIR/leaks.csv"],
    "embed": ["eval", "embed", "MODEL", "--data", "SHARDS", "--out", "DIR/new"],
    "search": ["eval", "search", "DIR/index", "--text", "a bell"],
    "serve": ["eval", "serve", "DIR/index"],
}


@pytest.mark.parametrize("name", LINES)
def test_no_command_runs_it(name, evil, icon_shards, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    command, *words = LINES[name]
    values = {"SHARDS": str(icon_shards), "MODEL": evil.model, "DIR": str(evil.folder)}
    words = [values.get(word, word.replace("DIR/", f"{evil.folder}/")) for word in words]
    monkeypatch.setattr(sys, "argv", [command, *words])
    with pytest.raises(UserError, match="trust_remote_code"):
        MAINS[command]()
    assert not evil.marker.exists()


def test_the_python_interface_runs_nothing(evil):
    for act in (lambda: api.load(evil.model), lambda: api.Index(evil.folder / "index").search("a bell")):
        with pytest.raises(UserError, match="trust_remote_code"):
            act()
    assert not evil.marker.exists()


def test_one_place_opens_models():
    """What can run a model's code is called only in train/model, where it was checked before."""
    openers = {"create_model", "create_model_and_transforms", "get_tokenizer", "AutoTokenizer", "AutoModel"}
    openers |= {"AutoConfig", "HFTokenizer", "create_model_from_pretrained", "unsafe_load", "full_load"}
    found = set()
    for path in sorted(
        path for room in ("data_prep", "train", "eval", "slurm") for path in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert keywords.get("trust_remote_code", "False") == "False", path
                assert keywords.get("weights_only", "True") == "True", path
                assert keywords.get("allow_pickle", "False") == "False", path
                if called in openers:
                    found.add((str(path.relative_to(ROOT)), called))
    assert found == {
        ("train/model/clip.py", "create_model"),
        ("train/model/clip.py", "get_tokenizer"),
        ("train/model/transformers_clip.py", "HFTokenizer"),
    }
