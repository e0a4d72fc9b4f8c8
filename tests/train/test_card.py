"""Every figure of the card comes from a file, it contains no local path, and the hub reads its metadata."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import noise_images
from huggingface_hub import ModelCard, parse_eval_result_entries

from data_prep.errors import UserError
from train.export.folder import export
from train.model.clip import load, public_name
from train.publish.card import (
    base_of,
    draw_curve,
    hub_id,
    recipe_table,
    seconds_of_steps,
    weights_in_words,
    write_card,
)
from train.publish.card_tables import read_tables
from train.publish.hub import to_upload


@pytest.fixture(scope="module")
def exported(tuned_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "export"
    export(load(str(tuned_run[0])), folder)
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def lines_of(text: str, title: str) -> list[list[str]]:
    """The lines of the card's tables with this title, as cells."""
    return [cells(line) for line in text.splitlines() if line.startswith(f"| {title} ")]


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def test_the_figures_are_those_of_the_files(tuned_run, icon_shards, folder, tmp_path):
    run, results = tuned_run
    noise_images(tmp_path, 1)
    text = write_card(folder, "me/clip", run, (results,), (tmp_path / "0.png",), ("me/icons",), "mit")
    assert text == (folder / "README.md").read_text()
    compared = json.loads(results.read_text())
    base, tuned = compared["models"]
    assert f"by {100 * tuned['metrics']['calibration_error']:.1f} points on average" in text
    expected = []
    for model in (base, tuned):
        value, interval = model["metrics"]["text_to_image/R@1"], model["intervals"]["text_to_image/R@1"]
        expected.append("{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * x for x in (value, *interval))))
    value, low, high = (100 * x for x in tuned["differences"]["text_to_image/R@1"][:3])
    row, of_retention_set = lines_of(text, "text to image, R@1")
    assert row[2:] == [*expected, f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"]
    assert of_retention_set != row
    titles = next(cells(line) for line in text.splitlines() if "**this model**" in line)
    base_name = public_name(base["model"])
    assert titles == ["", "chance", base_name, "**this model**", f"difference from {base_name}"]
    report = json.loads((icon_shards / "report.json").read_text())["splits"]["train"]
    assert lines_of(text, "train") == [
        ["train", *(str(report[name]) for name in ("images", "captions", "groups"))]
    ]
    state = json.loads((run / "checkpoints" / "best" / "state.json").read_text())
    assert f"\n{state['samples']:,} pairs seen at this checkpoint" in text
    assert lines_of(text, "optim.lr") == [["optim.lr", "`0.001`"]]
    assert json.loads((run / "environment.json").read_text())["data_fingerprint"] in text
    assert "Built from `icons.csv`." in text
    assert "(images/validation.png)" in text
    assert "(images/0.png)" in text
    assert {path.name for path in (folder / "images").iterdir()} == {"validation.png", "0.png"}
    for path in (tmp_path, run, icon_shards, Path.home()):
        assert str(path) not in text


def test_the_metadata_is_what_the_hub_reads(tuned_run, folder):
    run, results = tuned_run
    write_card(folder, "me/clip", run, (results,), dataset=("me/icons",), license="mit")
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "mit",
        "open_clip",
        "zero-shot-image-classification",
    )
    assert data.datasets == ["me/icons"]
    tuned = json.loads(results.read_text())["models"][1]["metrics"]
    values = {
        (result.task_type, result.metric_type, result.dataset_split): result.metric_value
        for result in data.eval_results
    }
    assert values["text-to-image-retrieval", "R@1", "test"] == tuned["text_to_image/R@1"]
    assert values["image-to-text-retrieval", "median_rank", "test"] == tuned["image_to_text/median_rank"]
    assert len(values) == 2 * 3 * 6


def test_results_on_a_data_set_of_the_hub_are_in_its_new_format_too(tuned_run, folder):
    run, results = tuned_run
    write_card(folder, "me/clip", run, (results,), dataset=("me/icons",))
    (file,) = (folder / ".eval_results").iterdir()  # not of the retention set, which is other data
    assert file.name.endswith("-test.yaml")
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    tuned = json.loads(results.read_text())["models"][1]["metrics"]
    values = {entry.task_id: entry.value for entry in entries}
    assert len(values) == 3 * 6
    assert values["text_to_image/R@1"] == tuned["text_to_image/R@1"]
    for entry in entries:
        assert (entry.dataset_id, entry.source_name) == ("me/icons", "Model card")
        assert entry.source_url.endswith("/me/clip")
        assert entry.notes.startswith("test split, ")
    assert to_upload(folder)[f".eval_results/{file.name}"] == file
    write_card(folder, "me/clip", run, (results,))  # the format names data by its id on the hub
    assert not (folder / ".eval_results").exists()


def test_the_tags_are_the_libraries_that_load_it(folder):
    write_card(folder, "me/clip")
    tags = ModelCard.load(folder / "README.md").data.tags
    assert {"open_clip", "transformers", "sentence-transformers"} < {*tags}
    assert "onnx" not in tags
    record = json.loads((folder / "export.json").read_text())
    record["files"] |= {"onnx/vision_model.onnx": {"format": "onnx", "bytes": 1, "sha256": ""}}
    record["int8"] = {
        "n_images": 500,
        "fp32": {"text_to_image/R@1": 0.5},
        "int8": {"text_to_image/R@1": 0.49},
    }
    (folder / "export.json").write_text(json.dumps(record))
    text = write_card(folder, "me/clip")
    assert {"onnx", "transformers.js"} < {*ModelCard.load(folder / "README.md").data.tags}
    assert lines_of(text, "text to image, R@1") == [["text to image, R@1", "50.0 %", "49.0 %"]]
    assert "```js\nimport {\n  AutoProcessor" in text


def test_the_background_is_in_the_card(folder):
    record = json.loads((folder / "export.json").read_text())
    assert 'Image.new("RGBA", image.size, "white")' in write_card(folder, "me/clip")
    (folder / "export.json").write_text(json.dumps(record | {"background": "#102030"}))
    text = write_card(folder, "me/clip")
    assert 'Image.new("RGBA", image.size, "#102030")' in text
    assert "transparent parts on `#102030`" in text


def test_unknown_facts_are_left_out(folder):
    text = write_card(folder, "me/clip")
    for word in (
        "## Data",
        "## Training",
        "## Results",
        "## License",
        "images/",
        "None",
        "fine-tuned from",
        "license",
        "model-index",
    ):
        assert word not in text, word
    assert not (folder / "images").exists()
    assert "hf-hub:me/clip" in text


def test_a_run_whose_shards_are_gone_still_has_their_sha256(tuned_run, folder, tmp_path):
    run = Path(shutil.copytree(tuned_run[0], tmp_path / "run", symlinks=True))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        "\n".join(f"data: {tmp_path}/gone" if "data:" in line else line for line in recipe.splitlines())
    )
    text = write_card(folder, "me/clip", run)
    assert "sha256 of the data: `" in text
    assert not lines_of(text, "train")
    assert str(tmp_path) not in text


def test_results_of_separate_files_share_a_table(tuned_run, folder, tmp_path):
    compared = json.loads(tuned_run[1].read_text())
    files = []
    for number, model in enumerate(compared["models"]):
        shared = {name: compared[name] for name in ("data", "data_sha256", "n_images", "n_texts")}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({**model, **shared}))
    (table,) = read_tables(tuple(files), compared["models"][1]["weights_sha256"])
    assert [public_name(model["model"]) for model in table.models] == [
        public_name(model["model"]) for model in compared["models"]
    ]
    assert "difference" not in table.markdown()["table"]
    with pytest.raises(UserError, match="none of which has the weights to publish"):
        write_card(folder, "me/clip", None, (files[0],))
    with pytest.raises(UserError, match="none of which has the weights to publish"):
        read_tables(tuple(files), "0" * 64)


def test_mistakes_are_sentences(folder, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    for name, problem in (("gone.json", "No such file"), ("other.json", "must be the JSON of")):
        with pytest.raises(UserError, match=problem):
            write_card(folder, "me/clip", None, (tmp_path / name,))
    for name in ("gone.png", "other.json"):
        with pytest.raises(UserError, match=r"\.png, \.jpg"):
            write_card(folder, "me/clip", None, (), (tmp_path / name,))
    noise_images(tmp_path, 1)
    with pytest.raises(UserError, match=r"another image is called 0\.png"):
        write_card(folder, "me/clip", None, (), (tmp_path / "0.png", tmp_path / "0.png"))


@pytest.mark.parametrize(
    ("model", "shown", "repository"),
    [
        ("ViT-L-14:laion2b_s32b_b82k", "ViT-L-14:laion2b_s32b_b82k", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"),
        ("ViT-B-32-quickgelu:openai", "ViT-B-32-quickgelu:openai", "timm/vit_base_patch32_clip_224.openai"),
        ("demo-vit:none", "demo-vit:none", None),
        ("ViT-B-32:/home/me/weights.pt", "ViT-B-32:weights.pt", None),
        ("hf-hub:me/clip@v2", "me/clip@v2", "me/clip"),
        ("local-dir:/home/me/base", "base", None),
        ("/home/me/runs/icons", "icons", None),
        ("local-dir:/home/me/runs/icons/checkpoints/best", "icons", None),
    ],
)
def test_names_have_no_local_folders(model, shown, repository):
    assert public_name(model) == shown
    assert hub_id(model) == repository


def test_the_recipe_names_no_local_folders():
    table = recipe_table(
        {
            "model": "local-dir:/home/me/base",
            "data": "/home/me/d",
            "retention_set": "/home/me/general",
            "replay": "/home/me/old",
            "replay_texts": "/home/me/sentences.txt",
            "lock": "text",
        }
    )
    assert "/home" not in table
    names = ("base", "general", "old", "sentences.txt", "text")
    assert all(f"`{name}`" in table for name in names)


def test_the_base_of_a_chain_of_runs(tmp_path):
    for name, model in (("one", "ViT-B-32:laion2b_s34b_b79k"), ("two", tmp_path / "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"model: {model}\n")
    assert base_of(str(tmp_path / "two")) == "ViT-B-32:laion2b_s34b_b79k"


def test_the_time_of_the_logged_steps():
    log = [
        {"samples": 0, "val/mean/R@1": 0.1},
        {"samples": 200, "time/pairs_per_s": 50},
        {"samples": 300, "time/pairs_per_s": 10},
    ]
    assert seconds_of_steps(log) == 200 / 50 + 100 / 10
    assert seconds_of_steps([]) == 0


def test_weights_are_named_as_in_papers():
    names = [weights_in_words(weights) for weights in ("trained", "ema", "wise_ft 0.50")]
    assert names == ["", "exponential moving average (EMA)", "WiSE-FT, alpha 0.50"]


def test_the_curve_is_small_and_reproducible(tmp_path):
    log = [
        {"samples": n * 384, "val/image_to_text/R@1": n % 7 / 10, "val/text_to_image/R@1": n % 5 / 10}
        for n in range(400)
    ]
    assert draw_curve(log, tmp_path / "a.png")
    assert draw_curve(log, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size < 200_000
    assert not draw_curve(log[:1], tmp_path / "c.png")
