"""Without a network: one sentence, after a few seconds, that says what is missing; what is cached loads."""

import socket
import time
from collections.abc import Iterator

import pytest
import torch
from conftest import call, save_tiny
from starting_points import save_model

import train.model.hub
from data_prep.errors import UserError
from train.model.clip import load

MAX_S = 10


@pytest.fixture(params=["refuses", "is silent", "has no address"])
def unreachable(request, monkeypatch, tmp_path) -> Iterator[str]:
    """A hub that cannot be reached in this process, and an empty cache."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            silent.listen()
        port = silent.getsockname()[1]
        place = "http://nowhere.invalid" if request.param == "has no address" else f"http://127.0.0.1:{port}"
        monkeypatch.setattr(train.model.hub, "TIMEOUT_S", 1)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        yield place


NAMES = {
    "ViT-B-16:laion2b_s34b_b88k": "ViT-B-16:laion2b_s34b_b88k: not in the cache",
    "hf-hub:nobody/nothing": "hf-hub:nobody/nothing: not in the cache",
    "hf-hub:nobody/nothing@v1": "not in the cache",
    "roberta-ViT-B-32:none": "the configuration of its text tower, roberta-base, is not in the cache",
    "ViT-B-16-SigLIP:none": "its tokenizer timm/ViT-B-16-SigLIP is not in the cache",
}


@pytest.mark.parametrize("name", NAMES)
def test_one_sentence_says_what_is_missing(name, unreachable, capfd, caplog):
    if "SigLIP" in name and "nowhere" not in unreachable:
        return  # 200 million random weights are made first; once is enough
    started = time.monotonic()
    with pytest.raises(UserError, match=NAMES[name]) as raised:
        load(name)
    assert time.monotonic() - started < MAX_S
    assert "the hub cannot be reached; where there is a network" in str(raised.value)
    assert f"python -m train.fetch {name}" in str(raised.value)
    printed = capfd.readouterr()
    assert printed.out + printed.err + caplog.text == ""


def test_a_file_of_weights_misses_its_tokenizer(unreachable, tmp_path, monkeypatch):
    import open_clip

    text = {"context_length": 12, "width": 16, "heads": 2, "layers": 1, "hf_tokenizer_name": "timm/nowhere"}
    config = {**open_clip.get_model_config("demo-vit"), "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-siglip", config)
    torch.save({}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=r"its tokenizer timm/nowhere is not in .*fetch tiny-siglip:none"):
        load(f"tiny-siglip:{tmp_path / 'file.pt'}@siglip")


def test_folders_ask_no_hub(unreachable, tmp_path, monkeypatch):
    monkeypatch.setattr(train.model.hub, "_answers", lambda: pytest.fail("the hub was asked"))
    (tmp_path / "tiny").mkdir()
    load(f"local-dir:{save_tiny(tmp_path / 'tiny')}")
    load("demo-vit:none")
    clip = load(save_model(tmp_path / "bert", "siglip"))
    (tmp_path / "saved").mkdir()
    clip.save(tmp_path / "saved")
    load(f"local-dir:{tmp_path / 'saved'}")


def test_what_is_in_the_cache_loads_without_a_network(hub, monkeypatch, tmp_path, capfd):
    folder = save_tiny(tmp_path)
    hub.put("me/clip", {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
    expected = load("hf-hub:me/clip").fingerprint()
    requests = len(hub.log)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://nowhere.invalid")
    assert load("hf-hub:me/clip").fingerprint() == expected
    assert len(hub.log) == requests
    assert capfd.readouterr().err == ""


def test_a_command_without_a_network_prints_one_line(tmp_path):
    """HF_HUB_OFFLINE is not set; open_clip would log its own ERROR:root: and the client its retries."""
    result = call(
        "train.fetch",
        "ViT-B-16:laion2b_s34b_b88k",
        expect=2,
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path),
    )
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ViT-B-16:laion2b_s34b_b88k: not in the cache")
