"""An index opens its model from any folder, also when both are moved, or the index alone."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import noise_images, save_tiny
from safetensors.torch import load_file, save_file

import eval.search.indexing as indexing
from data_prep.errors import UserError
from eval.options import Inference
from eval.search.command import embed, search
from eval.search.index import Index
from train.world import World

HERE = Inference(workers=0)
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a model and images, in which commands are typed with short paths."""
    folder = tmp_path / "project"
    (folder / "models" / "tiny").mkdir(parents=True)
    (folder / "photos").mkdir()
    noise_images(folder / "photos", 3)
    save_tiny(folder / "models" / "tiny")
    monkeypatch.chdir(folder)
    return folder


def as_run(folder: Path) -> str:
    """The model as one that training has written."""
    checkpoint = folder / "runs" / "a" / "checkpoints" / "samples-000000000010"
    checkpoint.parent.mkdir(parents=True)
    shutil.copytree(folder / "models" / "tiny", checkpoint)
    (checkpoint.parent / "best").symlink_to(checkpoint.name)
    (folder / "runs" / "a" / "recipe.yaml").write_text("model: demo-vit:none\n")
    return "runs/a"


def as_file(folder: Path) -> str:
    """The model as NAME:FILE@NAME, with a link to its file."""
    (folder / "models" / "linked.safetensors").symlink_to(Path("tiny", WEIGHTS))
    return "demo-vit:./models/linked.safetensors@laion"


MODELS = {
    "folder": lambda _: "local-dir:models/tiny",
    "long way": lambda _: "local-dir:./models/../models/tiny/",
    "run": as_run,
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_index_is_searched_from_another_folder(kind, project, tmp_path, monkeypatch, capsys):
    embed(MODELS[kind](project), Path("photos"), Path("indexes/a"), inference=HERE)
    search(Path("indexes/a"), text="a bell", json=Path("here.json"))
    (found := json.loads(Path("here.json").read_text()))["index"] = ""
    for folder, index in ((tmp_path, "project/indexes/a"), (project / "photos", "../indexes/a")):
        monkeypatch.chdir(folder)
        search(Path(index), text="a bell", json=tmp_path / "there.json")
        assert {**json.loads((tmp_path / "there.json").read_text()), "index": ""} == found
        assert len(Index(Path(index)).thumbnail(0)) > 20
    # the project is moved with all that is in it; then its index alone
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    search(Path("moved/indexes/a"), text="a bell")
    (tmp_path / "moved").rename(project)
    shutil.copytree(project / "indexes" / "a", tmp_path / "elsewhere" / "deep" / "alone")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    search(Path("link/alone"), text="a bell")
    assert "| 1 " in capsys.readouterr().out


def test_an_index_in_its_run_is_moved_alone(project, tmp_path, monkeypatch, capsys):
    run = as_run(project)
    embed(run, Path("photos"), Path(run, "index"), inference=HERE)
    shutil.copytree(project / run / "index", tmp_path / "alone" / "index")
    monkeypatch.chdir(tmp_path)
    search(Path("alone/index"), text="a bell")
    assert "| 1 " in capsys.readouterr().out


def test_the_model_is_still_the_one_that_made_the_index(project, tmp_path, monkeypatch):
    embed("local-dir:models/tiny", Path("photos"), Path("a"), inference=HERE)
    weights = {name: 2 * tensor for name, tensor in load_file(project / "models" / "tiny" / WEIGHTS).items()}
    save_file(weights, project / "models" / "tiny" / WEIGHTS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="their features do not compare") as error:
        search(project / "a", text="a bell")
    assert f"--data {project / 'photos'}" in str(error.value)  # a command for this folder, too


def test_a_file_of_weights_has_a_place(project):
    model = as_file(project)
    place = indexing.place_of(model, Path("indexes/a"))
    assert place == {
        "before": "demo-vit:",
        "relative": f"../../models/tiny/{WEIGHTS}",
        "absolute": str(project / "models" / "linked.safetensors"),
        "after": "@laion",
    }
    for name in ("demo-vit:none", "ViT-B-32:openai", "hf-hub:me/clip"):
        assert indexing.place_of(name, Path("a")) is None


def test_a_damaged_place_is_passed_over(project):
    embed("local-dir:models/tiny", Path("photos"), Path("a"), inference=HERE)
    manifest = json.loads((project / "a" / "manifest.json").read_text())
    nul = {"relative": "\0", "absolute": "\0", "before": "", "after": ""}
    for place in (None, 1, [], {}, {"relative": 1}, nul, {**nul, "relative": "", "absolute": ""}):
        (project / "a" / "manifest.json").write_text(json.dumps({**manifest, "model_place": place}))
        assert Index(Path("a")).made_by == "local-dir:models/tiny"


def test_an_embedding_resumes_from_another_folder(project, tmp_path, monkeypatch, capsys):
    model, out = "local-dir:models/tiny", Path("a")
    corpus, clip = indexing.prepare(model, Path("photos"), out, "", False, HERE, World())
    unfinished = project / ".a.unfinished"
    indexing.start(unfinished, indexing.describe(model, corpus, clip, HERE, out))
    indexing.write_blocks(indexing.block_files(unfinished, corpus, HERE), [0], corpus, clip, HERE, World())
    monkeypatch.chdir(tmp_path)
    embed("local-dir:project/models/tiny", Path("project/photos"), Path("project/a"), inference=HERE)
    printed = capsys.readouterr().out
    assert "resuming" in printed
    assert "all embedded before" in printed
