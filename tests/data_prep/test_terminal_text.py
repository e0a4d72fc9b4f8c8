"""Foreign text on a terminal: captions, names of files and values are shown, and do nothing; no secret is."""

import csv
import io
import re

import pytest
from conftest import call_here, noise_images

import data_prep.__main__
import train.__main__
from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.masked import masked, one_line
from data_prep.terminal import safe, say
from eval.options import Inference
from eval.search.command import embed, search

# Sets the title of the window, clears the screen, fills the clipboard, and moves the cursor to overwrite.
EVIL = "\x1b]0;title\x07\x1b[2J\x9b1A\x1b]52;c;YQ==\x07\rover\x08\u202ereversed"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


def test_controls_are_shown_and_text_stays():
    assert safe(EVIL) == ("\\x1b]0;title\\x07\\x1b[2J\\x9b1A\\x1b]52;c;YQ==\\x07\\rover\\x08\\u202ereversed")
    text = "a bell\twith a slash\nein Glöckchen, 鐘, 🔔, 👩\u200d🚀, שלום, \u00a0"
    assert safe(text) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    say("鐘", "\udcff", EVIL, file=stream)
    stream.flush()
    written = stream.buffer.getvalue().decode(encoding)
    assert "\\udcff" in written
    assert not CONTROLS.search(written)


def test_no_command_prints_a_control_character_of_its_input(tmp_path, tiny_model, capsys):
    """A build with its rejects and warnings, an index and a search, and sentences on mistakes."""
    photos = tmp_path / "photos"
    photos.mkdir()
    noise_images(photos, 3)
    (photos / "0.png").rename(photos / (evil_name := "\x1b[2J.png"))
    (photos / "1.txt").write_text(EVIL)
    with open(tmp_path / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        rows = [(f"photos/{name}", f"a bell{EVIL}{name}", EVIL) for name in (evil_name, "1.png", "2.png")]
        rows += [(f"missing{EVIL}.png", "a missing image", "")]
        csv.writer(file).writerows([("image", "caption", "group"), *rows])
    reading, checking = Reading(group_column="group"), Checking(max_rejects=0.9)
    build([str(tmp_path / "pairs.csv")], tmp_path / "shards", reading, checking, parallelism=Parallelism(1))
    embed(tiny_model, photos, tmp_path / "index", inference=Inference(workers=0))
    search(tmp_path / "index", text="a bell", k=3)
    printed = capsys.readouterr()
    assert "\\x1b[2J.png" in printed.out
    assert "\\x1b]0;title" in printed.out
    assert not CONTROLS.search(printed.out)
    assert not CONTROLS.search(re.sub("\r|\x1b\\[A", "", printed.err))  # of progress bars


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (data_prep.__main__.main, ("build", f"{EVIL}.csv", "--out", "out")),
        (data_prep.__main__.main, ("build", "pairs.csv", "--out", "out", "--image-column", "x")),
        (data_prep.__main__.main, ("verify", "shards")),
        (train.__main__.main, ("recipe.yaml", "--data", "x", "--run", "y")),
    ],
)
def test_no_sentence_on_a_mistake_acts_on_the_terminal(main, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("image,caption,note\na.png,a,\x9b1A\n")
    (tmp_path / "recipe.yaml").write_text('"\\e]0;x": 1\n')
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text('{"format": "\x1b", "splits": ')
    printed = call_here(main, *arguments).stderr
    assert printed.startswith("error: ")
    assert not CONTROLS.search(printed), printed


TOKEN = "hf_" + "aBcDeFgH12" * 3
SECRETS = [
    f"no access with {TOKEN} to x",
    f"Invalid header value b'Bearer {'x' * 24}'",
    "https://me:secret-word@host/a.png: 404",
    f"https://{TOKEN}@host/a.png",
    "https://b.s3.amazonaws.com/a.png?X-Amz-Credential=AKIA1/x&X-Amz-Signature=0123456789abcdef: 403",
    "https://b.blob.core.windows.net/a.png?sv=1&sig=0123456789abcdef",
    "the key was 0123456789012345678901234567890123456789",
]


def test_secrets_are_masked_and_text_is_not(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789012345678901234567890123456789")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    for text in SECRETS:
        assert "***" in masked(text)
        assert not re.search("aBcDeFgH12|x{8}|secret-word|0123456789|AKIA", masked(text)), masked(text)
    for text in ("mail me@example.org", "a basic understanding", "https://host/a@2x.png", "a hf_model_name"):
        assert masked(text) == text


def test_a_secret_is_masked_before_the_text_is_cut(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "abcdefghijklmnop")
    texts = [*SECRETS[:6], "so abcdefghijklmnop it is", "own-secret-of-a-client"]
    for text in texts:
        for characters in range(len(text) + 1):
            cut = one_line(text, characters, "own-secret-of-a-client")
            assert not re.search("aBcD|x{8}|secret|01234|AKIA|abcd|own", cut), cut


def test_no_secret_is_printed(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "abcdefghijklmnop")
    say("the token is abcdefghijklmnop", "https://me:word@host")
    assert capsys.readouterr().out == "the token is *** https://***@host\n"
