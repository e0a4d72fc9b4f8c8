"""The hub holds what was exported, in one commit; an interrupted upload resumes; mistakes are sentences."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import assert_mistake, call_here, environment, noise_images
from hub import Hub, Repo
from hub_answers import ORGANISATION, TOKEN
from PIL import Image

import train.publish.__main__
from data_prep.errors import UserError
from data_prep.shards import sha256_of
from train.export.folder import export
from train.export.snippets import blocks
from train.model.clip import load
from train.publish.__main__ import main
from train.publish.hub import listing, next_version, to_upload


def publish(model: object, repo: str, **options) -> None:
    """As a script does, which has no terminal to answer on."""
    train.publish.__main__.publish(str(model), repo, **{"yes": True, **options})


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


def test_one_commit_one_tag_and_no_file_twice(hub, folder, capsys):
    publish(folder, "me/clip", license="mit")
    repo, first = hub.repos["me/clip"], hub.repos["me/clip"].head
    assert head(hub) == {name: path.read_bytes() for name, path in to_upload(folder).items()}
    assert (len(repo.commits), repo.tags) == (2, {"v1": first})
    sent = hub.count("PUT")
    assert "me/clip v1 (commit" in capsys.readouterr().out

    publish(folder, "me/clip", license="mit")
    assert "nothing has changed" in capsys.readouterr().out
    assert (len(repo.commits), repo.tags, hub.count("PUT")) == (2, {"v1": first}, sent)

    publish(folder, "me/clip", license="apache-2.0", version="final")  # the card alone has changed
    assert "1 of " in capsys.readouterr().out
    assert (len(repo.commits), hub.count("PUT")) == (3, sent)
    assert repo.tags == {"v1": first, "final": repo.head}
    with pytest.raises(UserError, match="version v1 already exists with other files"):
        publish(folder, "me/clip", license="apache-2.0", version="v1")
    publish(folder, "me/clip", license="cc-by-4.0")
    assert repo.tags["v2"] == repo.head
    with pytest.raises(UserError, match="--version v 3: must consist of letters"):
        publish(folder, "me/clip", version="v 3")


def test_files_of_an_earlier_version_are_deleted_and_others_kept(hub, folder, tmp_path):
    noise_images(tmp_path, 1)
    publish(folder, "me/clip", images=(tmp_path / "0.png",))
    manifest = json.loads((folder / "export.json").read_text())
    hub.put("me/clip", {**head(hub), "notes.txt": b"by hand"})
    (folder / "more.json").write_text("{}")
    manifest["files"]["more.json"] = {
        "format": "open_clip",
        "sha256": sha256_of(folder / "more.json"),
        "bytes": 2,
    }
    (folder / "export.json").write_text(json.dumps(manifest))
    publish(folder, "me/clip")
    assert {"more.json", "notes.txt"} <= head(hub).keys()
    assert "images/0.png" not in head(hub)
    del manifest["files"]["more.json"]
    (folder / "export.json").write_text(json.dumps(manifest))
    publish(folder, "me/clip")
    assert "notes.txt" in head(hub)
    assert "more.json" not in head(hub)
    assert sorted(hub.repos["me/clip"].tags) == ["v1", "v2", "v3"]


@pytest.mark.parametrize("nth", [1, 2])
def test_an_interrupted_upload_resumes(hub, folder, tmp_path, monkeypatch, nth):
    """The connection breaks in one of two large files, and comes back after the client's retries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    noise_images(tmp_path, 1)
    hub.cut = (nth, 100)
    with pytest.raises(
        UserError, match=r"connection to the hub was lost.*the same command again: it resumes the upload"
    ):
        publish(folder, "me/clip", images=(tmp_path / "0.png",))
    assert len(hub.repos["me/clip"].commits) == 1
    assert not hub.repos["me/clip"].tags
    large = {
        sha256_of(path) for name, path in to_upload(folder).items() if name.endswith((".safetensors", ".png"))
    }
    assert len(hub.blobs) < len(large)
    hub.down = False
    publish(folder, "me/clip", images=(tmp_path / "0.png",))
    assert head(hub).keys() == to_upload(folder).keys()
    assert sorted(line for line in hub.log if line.startswith("PUT")) == sorted(
        f"PUT {sha256}" for sha256 in large
    )
    assert [line.split()[2:] for line in hub.log if line.startswith("CUT")] == [["after", "100"]]


def test_the_download_is_compared(hub, folder):
    hub.spoiled = {"open_clip_config.json"}
    with pytest.raises(UserError, match=r"returns other content for open_clip_config\.json"):
        publish(folder, "me/clip")
    assert not hub.repos["me/clip"].tags
    hub.spoiled = set()
    publish(folder, "me/clip")
    assert (len(hub.repos["me/clip"].commits), list(hub.repos["me/clip"].tags)) == (2, ["v1"])


def test_an_organisation_and_a_private_repository(hub, folder):
    publish(folder, f"{ORGANISATION}/clip", private=True)
    assert hub.repos[f"{ORGANISATION}/clip"].private
    hub.repos["me/clip"] = Repo()
    hub.put("me/clip", {})
    with pytest.raises(UserError, match="already exists and is public"):
        publish(folder, "me/clip", private=True)
    assert not head(hub)


@pytest.mark.parametrize(
    ("token", "repo", "problem"),
    [
        ("", "me/clip", "no token for .*hf auth login"),
        ("hf_wrong", "me/clip", "does not accept this token.*hf auth login.*HF_TOKEN"),
        ("hf_\u00e4\u00e4", "me/clip", "characters that are not valid in a token"),
        (TOKEN, "nobody/clip", "has no write access, or there is no such user or organisation"),
        (TOKEN, "clip", "has no owner; must be USER/NAME or ORGANISATION/NAME"),
        (TOKEN, "me/a/b", "must be USER/NAME"),
        (TOKEN, "me/my clip", "must be USER/NAME"),
    ],
)
def test_mistakes_are_sentences(hub, folder, monkeypatch, token, repo, problem):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=problem) as raised:
        publish(folder, repo)
    assert not token or token not in str(raised.value)
    assert raised.value.__cause__ is None
    assert not hub.repos


def test_no_network_is_a_sentence(hub, folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.down = True
    with pytest.raises(UserError, match="connection to the hub was lost"):
        publish(folder, "me/clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 disables the network"):
        publish(folder, "me/clip")


def test_metadata_that_the_hub_refuses_is_a_sentence(hub, folder, monkeypatch):
    """The hub checks the card before anything is uploaded."""
    monkeypatch.setattr(
        "train.publish.card.write_card",
        lambda folder, *_: (folder / "README.md").write_text("---\nmodel-index: [{}]\n---\n"),
    )
    with pytest.raises(UserError, match="the hub refuses it"):
        publish(folder, "me/clip")
    assert not head(hub)


def test_files_that_were_changed_after_the_export_are_refused(hub, folder):
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"open_clip_config\.json: has changed since the export"):
        publish(folder, "me/clip")
    (folder / "export.json").unlink()
    with pytest.raises(UserError, match="pass --out"):
        publish(f"local-dir:{folder}", "me/clip")
    (folder / ".made.json").unlink()
    with pytest.raises(UserError, match="not made by this command, and is not deleted"):
        publish("demo-vit:none", "me/clip", out=folder)
    assert not hub.repos


def test_a_dry_run_needs_neither_token_nor_network(hub, tuned_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    run = Path(shutil.copytree(tuned_run[0], tmp_path / "run", symlinks=True))
    publish(run, "me/clip", results=(tuned_run[1],), yes=False, dry_run=True)
    printed = capsys.readouterr().out
    assert (run / "export" / "README.md").read_text() in printed
    assert listing(to_upload(run / "export")) in printed
    size = (run / "export" / "open_clip_model.safetensors").stat().st_size
    assert re.search(rf"\| open_clip_model.safetensors +\| +{size:,} \|", printed)
    assert "pass --license mit" in printed
    assert not hub.log
    publish(run, "me/clip", license="mit", yes=False, dry_run=True)
    assert "already exported from these weights" in capsys.readouterr().out
    shutil.rmtree(run / "export")
    other = tuned_run[1].read_text().replace('"weights_sha256": "', '"weights_sha256": "0')
    (tmp_path / "other.json").write_text(other)
    for options, words in (
        ({"results": (tmp_path / "gone.json",)}, r"--results .*gone\.json: not a result"),
        ({"results": (tmp_path / "other.json",)}, "none of which has the weights to publish"),
        ({"images": (tmp_path / "gone.png",)}, r"--images .*gone\.png: must be an existing file"),
    ):
        with pytest.raises(UserError, match=words):
            publish(run, "me/clip", yes=False, dry_run=True, **options)
        assert not (run / "export").exists()  # found before the export
    export(load("demo-vit:none"), run / "export")
    with pytest.raises(UserError, match="not those of the best checkpoint"):
        publish(run / "export", "me/clip", yes=False, dry_run=True)


def test_versions_are_counted():
    assert next_version({}) == "v1"
    assert next_version({"v1": "", "v10": "", "v2-old": "", "final": ""}) == "v11"


@pytest.mark.parametrize(("answer", "uploads"), [("y", True), ("", False), ("no", False), (EOFError, False)])
def test_a_terminal_is_asked_before_the_upload(hub, folder, monkeypatch, capsys, answer, uploads):
    def answered(question: str) -> str:
        print(question)
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answered)
    if uploads:
        publish(folder, "me/clip", yes=False)
    else:
        with pytest.raises(UserError, match="nothing was uploaded to me/clip"):
            publish(folder, "me/clip", yes=False)
    printed = capsys.readouterr().out
    assert f"upload these files to {hub.url}/me/clip? [y/N]" in printed
    assert listing(to_upload(folder)) in printed
    assert ("me/clip" in hub.repos) == uploads


def test_without_a_terminal_it_needs_yes(hub, folder):
    """Before the export, which takes minutes."""
    result = call_here(main, folder, "--repo", "me/clip")
    assert_mistake(result, "asks before it uploads", "not a terminal", "--yes", "--dry-run")
    assert not hub.log


def test_the_missing_option_is_named():
    assert "--repo USER/NAME" in call_here(main, "demo-vit:none").stderr


@pytest.fixture(scope="module")
def published(tuned_run, tmp_path_factory):
    """A run that was trained here, published by the command line; the hub, a folder, and what was printed."""
    run, results = tuned_run
    folder = tmp_path_factory.mktemp("published")
    line = f"publish {run} --repo me/icons-clip --results {results} --license mit --dataset me/icons --yes"
    printed = io.StringIO()
    with Hub() as hub:
        with (
            hub.in_this_process(folder / "hf"),
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            patch.setattr("sys.argv", line.split())
            main()
        yield hub, folder, printed.getvalue()


@pytest.fixture(scope="module")
def features(published) -> dict[str, list[torch.Tensor]]:
    """Image and text features by library, from the card's snippets in a fresh process. The image is
    transparent, and has the model's size, because the libraries' resize filters differ.
    """
    hub, folder, _ = published
    image = Image.effect_noise((16, 16), 80).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((16, 16)))
    image.save(folder / "image.png")
    card = head(hub, "me/icons-clip")["README.md"].decode()
    by_open_clip, by_sentence_transformers, by_transformers, by_pipeline = blocks(card)
    by_sentence_transformers += "torch.save([*map(torch.tensor, (image_features, text_features))],"
    by_sentence_transformers += " 'sentence_transformers.pt')\n"
    by_open_clip += "torch.save([image_features, text_features], 'open_clip.pt')\n"
    by_transformers += "out = model(**inputs)\n"
    by_transformers += (
        "torch.save([out.image_embeds.detach(), out.text_embeds.detach()], 'transformers.pt')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", by_open_clip + by_sentence_transformers + by_transformers + by_pipeline],
        cwd=folder,
        env=environment(**hub.environment(folder / "fresh")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "tensor([[" in result.stdout
    names = ("open_clip", "transformers", "sentence_transformers")
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in names}


def test_a_published_run_gives_the_features_of_the_run(published, features, tuned_run, one_thread):
    _, folder, _ = published
    best = f"local-dir:{tuned_run[0]}/checkpoints/best"
    model, _, preprocess = open_clip.create_model_and_transforms(best)
    model.eval()
    with torch.no_grad():
        image = Image.open(folder / "image.png")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        pixels = preprocess(white)[None]
        tokens = open_clip.get_tokenizer(best)(["a bell", "a house"])
        expected = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    assert torch.equal(features["open_clip"][0], expected[0])
    assert torch.equal(features["open_clip"][1], expected[1])


@pytest.mark.parametrize("library", ["transformers", "sentence_transformers"])
def test_a_published_run_gives_the_same_features_in_other_libraries(features, library):
    for ours, expected in zip(features[library], features["open_clip"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_neither_the_token_nor_a_local_path_is_published(published, tuned_run):
    hub, folder, printed = published
    run = tuned_run[0]
    assert "me/icons-clip v1 (commit" in printed
    assert TOKEN not in printed
    written = [path for parent in (run, folder) for path in parent.rglob("*") if path.is_file()]
    assert (run / "export" / "README.md") in written
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    for name, data in head(hub, "me/icons-clip").items():
        for word in (TOKEN, str(run), str(folder), str(Path.home()), str(run.parent.parent)):
            assert word.encode() not in data, (name, word)
    assert list(hub.repos["me/icons-clip"].tags) == ["v1"]
