"""What arrives on the hub is what was exported, once, in one commit; whatever is cut goes on; mistakes are
sentences.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import call, call_here, environment, noise_images
from hub import Hub, Repo
from hub_answers import ORGANISATION, TOKEN
from PIL import Image

import train.publish.hub
from data_prep.errors import UserError
from data_prep.shards import sha256_of
from train.export.folder import export
from train.model.clip import load
from train.publish.hub import listing, next_version, publish, to_upload


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "export"
    export(load(tiny_model), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def head(hub, name: str = "me/clip") -> dict[str, bytes]:
    repo = hub.repos[name]
    return {path: data for path, data in repo.commits[repo.head].items() if path != ".gitattributes"}


def test_one_commit_one_tag_and_nothing_twice(hub, folder, capsys):
    publish(str(folder), "me/clip", license="mit")
    repo, first = hub.repos["me/clip"], hub.repos["me/clip"].head
    assert head(hub) == {name: path.read_bytes() for name, path in to_upload(folder).items()}
    assert (len(repo.commits), repo.tags) == (2, {"v1": first})
    sent = hub.count("PUT")
    assert "me/clip v1 (commit" in capsys.readouterr().out

    publish(str(folder), "me/clip", license="mit")
    assert "nothing has changed" in capsys.readouterr().out
    assert (len(repo.commits), repo.tags, hub.count("PUT")) == (2, {"v1": first}, sent)

    publish(str(folder), "me/clip", license="apache-2.0", version="final")  # the card alone has changed
    assert "1 of " in capsys.readouterr().out
    assert (len(repo.commits), hub.count("PUT")) == (3, sent)
    assert repo.tags == {"v1": first, "final": repo.head}
    with pytest.raises(UserError, match="has a version v1 already, of other files"):
        publish(str(folder), "me/clip", license="apache-2.0", version="v1")
    publish(str(folder), "me/clip", license="cc-by-4.0")
    assert repo.tags["v2"] == repo.head
    with pytest.raises(UserError, match="--version v 3: letters"):
        publish(str(folder), "me/clip", version="v 3")


def test_what_an_earlier_version_had_goes_and_what_others_put_there_stays(hub, folder, tmp_path):
    noise_images(tmp_path, 1)
    publish(str(folder), "me/clip", pictures=(tmp_path / "0.png",))
    manifest = json.loads((folder / "export.json").read_text())
    hub.put("me/clip", {**head(hub), "notes.txt": b"by hand"})
    (folder / "more.json").write_text("{}")
    manifest["files"]["more.json"] = {"sha256": sha256_of(folder / "more.json"), "bytes": 2}
    (folder / "export.json").write_text(json.dumps(manifest))
    publish(str(folder), "me/clip")
    assert {"more.json", "notes.txt"} <= head(hub).keys()
    assert "pictures/0.png" not in head(hub)
    del manifest["files"]["more.json"]
    (folder / "export.json").write_text(json.dumps(manifest))
    publish(str(folder), "me/clip")
    assert "notes.txt" in head(hub)
    assert "more.json" not in head(hub)
    assert sorted(hub.repos["me/clip"].tags) == ["v1", "v2", "v3"]


@pytest.mark.parametrize("nth", [1, 2])
def test_an_upload_that_was_cut_goes_on(hub, folder, tmp_path, monkeypatch, nth):
    """Two large files or more; the network ends in one of them, stays away for all that the client tries
    again, and comes back.
    """
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    noise_images(tmp_path, 1)
    hub.cut = (nth, 100)
    with pytest.raises(UserError, match=r"the hub was lost.*give the same command again, and it goes on"):
        publish(str(folder), "me/clip", pictures=(tmp_path / "0.png",))
    assert len(hub.repos["me/clip"].commits) == 1
    assert not hub.repos["me/clip"].tags
    large = {
        sha256_of(path) for name, path in to_upload(folder).items() if name.endswith((".safetensors", ".png"))
    }
    assert len(hub.blobs) < len(large)
    hub.down = False
    publish(str(folder), "me/clip", pictures=(tmp_path / "0.png",))
    assert head(hub).keys() == to_upload(folder).keys()
    assert sorted(line for line in hub.log if line.startswith("PUT")) == sorted(
        f"PUT {each}" for each in large
    )
    assert [line.split()[2:] for line in hub.log if line.startswith("CUT")] == [["after", "100"]]


def test_what_came_back_is_compared(hub, folder):
    hub.spoiled = {"open_clip_config.json"}
    with pytest.raises(UserError, match=r"gives back for open_clip_config\.json is not what was sent"):
        publish(str(folder), "me/clip")
    assert not hub.repos["me/clip"].tags
    hub.spoiled = set()
    publish(str(folder), "me/clip")
    assert (len(hub.repos["me/clip"].commits), list(hub.repos["me/clip"].tags)) == (2, ["v1"])


def test_an_organisation_and_a_private_repository(hub, folder):
    publish(str(folder), f"{ORGANISATION}/clip", private=True)
    assert hub.repos[f"{ORGANISATION}/clip"].private
    hub.repos["me/clip"] = Repo()
    hub.put("me/clip", {})
    with pytest.raises(UserError, match="is there already, and public"):
        publish(str(folder), "me/clip", private=True)
    assert not head(hub)


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("", "me/clip", "no token for .*hf auth login"),
        ("hf_wrong", "me/clip", "does not know this token.*hf auth login.*HF_TOKEN"),
        ("hf_\u00e4\u00e4", "me/clip", "characters that no token has"),
        (TOKEN, "nobody/clip", "may not write there, or there is no such user or organisation"),
        (TOKEN, "clip", "USER/NAME or ORGANISATION/NAME is wanted"),
        (TOKEN, "me/a/b", "USER/NAME is wanted"),
        (TOKEN, "me/my clip", "USER/NAME is wanted"),
    ],
)
def test_mistakes_are_sentences(hub, folder, monkeypatch, token, repo, said):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=said) as raised:
        publish(str(folder), repo)
    assert not token or token not in str(raised.value)
    assert raised.value.__cause__ is None
    assert not hub.repos


def test_no_network_is_a_sentence(hub, folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.down = True
    with pytest.raises(UserError, match="the hub was lost"):
        publish(str(folder), "me/clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 forbids the network"):
        publish(str(folder), "me/clip")


def test_metadata_that_the_hub_refuses_is_a_sentence(hub, folder, monkeypatch):
    """The hub checks the card before anything is uploaded."""
    monkeypatch.setattr(
        train.publish,
        "write_card",
        lambda folder, *_: (folder / "README.md").write_text("---\nmodel-index: [{}]\n---\n"),
    )
    with pytest.raises(UserError, match="the hub refuses it"):
        publish(str(folder), "me/clip")
    assert not head(hub)


def test_files_that_were_changed_after_the_export_are_refused(hub, folder):
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"open_clip_config\.json: not what was exported"):
        publish(str(folder), "me/clip")
    (folder / "export.json").unlink()
    with pytest.raises(UserError, match="pass --out"):
        publish(f"local-dir:{folder}", "me/clip")
    with pytest.raises(UserError, match="there already, and not an export"):
        publish("demo-vit:none", "me/clip", out=folder)
    assert not hub.repos


def test_a_dry_run_wants_neither_token_nor_network(hub, tuned_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    run = Path(shutil.copytree(tuned_run[0], tmp_path / "run", symlinks=True))
    publish(str(run), "me/clip", results=(tuned_run[1],), dry_run=True)
    printed = capsys.readouterr().out
    assert (run / "export" / "README.md").read_text() in printed
    assert listing(to_upload(run / "export")) in printed
    assert (
        f"{(run / 'export' / 'open_clip_model.safetensors').stat().st_size:,}  open_clip_model.safetensors"
        in printed
    )
    assert "pass --license mit" in printed
    assert not hub.log
    publish(str(run), "me/clip", license="mit", dry_run=True)
    assert "exported before, from these weights" in capsys.readouterr().out
    shutil.rmtree(run / "export")
    export(load("demo-vit:none"), run / "export")
    with pytest.raises(UserError, match="other weights than the best of"):
        publish(str(run / "export"), "me/clip", dry_run=True)


def test_versions_are_counted():
    assert next_version({}) == "v1"
    assert next_version({"v1": "", "v10": "", "v2-old": "", "final": ""}) == "v11"


def test_the_command_explains_itself():
    assert "--repo" in call_here(train.publish.main, "train.publish", "demo-vit:none").stderr


@pytest.fixture(scope="module")
def published(tuned_run, tmp_path_factory):
    """The whole story: a run that was trained here, published by the command line; the loopback hub stays up."""
    run, results = tuned_run
    folder = tmp_path_factory.mktemp("published")
    arguments = [
        "train.publish",
        run,
        "--repo",
        "me/icons-clip",
        "--results",
        results,
        "--license",
        "mit",
        "--dataset",
        "me/icons",
    ]
    with Hub() as hub:
        said = call(*arguments, **hub.environment(folder / "hf"))
        yield hub, folder, said


def snippets(hub) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```",
        head(hub, "me/icons-clip")["README.md"].decode(),
        flags=re.MULTILINE | re.DOTALL,
    )


def run_snippet(code: str, hub, folder: Path) -> str:
    """What a snippet of the card prints; its picture has the model's size, because the libraries resize by
    different filters.
    """
    Image.effect_noise((16, 16), 80).convert("RGB").save(folder / "picture.png")
    there = environment(**hub.environment(folder / "fresh"))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=there, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_published_run_gives_the_features_of_the_run(published, tuned_run, one_thread):
    hub, folder, _ = published
    code = snippets(hub)[0] + "torch.save([image_features, text_features], 'features.pt')\n"
    assert "tensor([[" in run_snippet(code, hub, folder)
    found = torch.load(folder / "features.pt", weights_only=True)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tuned_run[0]}/checkpoints/best")
    model.eval()
    with torch.no_grad():
        pixels = preprocess(Image.open(folder / "picture.png").convert("RGB"))[None]
        tokens = open_clip.get_tokenizer(f"local-dir:{tuned_run[0]}/checkpoints/best")(["a bell", "a house"])
        expected = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_published_run_loads_by_its_name_in_transformers(published, tuned_run):
    hub, folder, _ = published
    if "config.json" not in head(hub, "me/icons-clip"):
        pytest.skip("this export wrote no files for transformers")
    by_name, by_pipeline = snippets(hub)[1:]
    code = (
        by_name + "out = model(**inputs)\ntorch.save([out.image_embeds.detach(), out.text_embeds.detach()],"
        " 'embeds.pt')\n"
    )
    run_snippet(
        snippets(hub)[0]
        + "torch.save([image_features, text_features], 'features.pt')\n"
        + code
        + by_pipeline,
        hub,
        folder,
    )
    for found, expected in zip(
        *(torch.load(folder / name, weights_only=True) for name in ("embeds.pt", "features.pt")), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_neither_the_token_nor_a_path_of_this_machine_is_published(published, tuned_run):
    hub, folder, said = published
    run = tuned_run[0]
    assert TOKEN not in said.stdout + said.stderr
    written = [path for place in (run, folder) for path in place.rglob("*") if path.is_file()]
    assert (run / "export" / "README.md") in written
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    for name, data in head(hub, "me/icons-clip").items():
        for word in (TOKEN, str(run), str(folder), str(Path.home()), str(run.parent.parent)):
            assert word.encode() not in data, (name, word)
    assert list(hub.repos["me/icons-clip"].tags) == ["v1"]
