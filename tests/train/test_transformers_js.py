"""transformers.js opens an exported folder and finds the same images; skipped without node or npm."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image

from data_prep.shards import Shards
from train.data.decode import decode
from train.export.folder import export
from train.export.snippets import blocks, use
from train.model.clip import load

SCRIPT = Path(__file__).with_name("transformers_js.mjs")
VERSION = "4.3.1"


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """The folder of npm's @huggingface/transformers: that of TRANSFORMERS_JS, or installed by npm."""
    if not shutil.which("node"):
        pytest.skip("no node")
    place = Path(os.environ.get("TRANSFORMERS_JS") or tmp_path_factory.mktemp("npm"))
    module = place / "node_modules" / "@huggingface" / "transformers"
    if not module.is_dir():
        # Without scripts: that of onnxruntime-node would download CUDA's libraries.
        package = f"@huggingface/transformers@{VERSION}"
        install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(place)]
        try:
            subprocess.run([*install, package], check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError):
            pytest.skip("npm cannot install transformers.js")
    return module


@pytest.fixture(scope="module")
def exported(quick, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("js") / "model"
    export(load(quick[0]), out, onnx=True)
    return out


def node(*arguments: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        ["node", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def best(texts: np.ndarray, images: np.ndarray) -> list[set[int]]:
    """The ten best images of each text."""
    return [set(row[:10].tolist()) for row in np.argsort(-texts @ images.T, axis=1, kind="stable")]


@pytest.mark.slow
def test_the_same_ten_best_images(library, exported, quick, icon_shards, tmp_path):
    shards, size = Shards(icon_shards, "val"), (32, 32)  # of the model: resizing is another in each library
    samples = [shards.read(number) for number in range(len(shards))]
    images, captions = [], [sample.captions[0] for sample in samples]
    for number, sample in enumerate(samples):
        images.append(tmp_path / f"{number}.png")
        decode(sample.image).resize(size, Image.BICUBIC).save(images[-1])
    job = {"captions": captions, "images": list(map(str, images))}
    (tmp_path / "job.json").write_text(json.dumps(job))
    entry = (
        library / json.loads((library / "package.json").read_text())["exports"]["node"]["import"]["default"]
    )
    answer = json.loads(node(SCRIPT, entry, exported, tmp_path / "job.json"))

    clip = load(quick[0])
    clip.towers.eval()
    with torch.no_grad():
        pixels = torch.stack([clip.eval_transform(Image.open(path)) for path in images])
        expected_images = clip.towers.image_features(pixels).numpy()
        expected_texts = clip.towers.text_features(clip.tokenizer(captions)).numpy()
    exact, int8 = (
        [np.array(answer[dtype][name]) for name in ("text_embeds", "image_embeds")]
        for dtype in ("fp32", "q8")
    )
    np.testing.assert_allclose(exact[0], expected_texts, atol=1e-5)
    np.testing.assert_allclose(exact[1], expected_images, atol=1e-5)
    assert best(*exact) == best(expected_texts, expected_images)
    assert min((a * b).sum(1).min() for a, b in zip(exact, int8, strict=True)) > 0.95


@pytest.mark.slow
def test_the_snippet_of_the_card(library, exported, quick, tmp_path):
    """On a transparent file; the very snippet, with the library and the folder where they are here."""
    image = noise_image(32, 32).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((32, 32)))
    image.save(tmp_path / "image.png")
    record = json.loads((exported / "export.json").read_text())
    (code,) = blocks(use(record, "me/clip"), "js")
    code = code.replace("console.log(", 'console.log("ANSWER", ')
    code = f'import {{ env }} from "@huggingface/transformers";\nenv.localModelPath = "{tmp_path}/";\n{code}'
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "clip").symlink_to(exported)
    (tmp_path / "node_modules").symlink_to(library.parent.parent)
    (tmp_path / "snippet.mjs").write_text(code)
    printed = node("snippet.mjs", cwd=tmp_path)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    clip = load(quick[0])
    features, texts, _ = clip.towers.eval()(
        clip.eval_transform(white.convert("RGB"))[None], clip.tokenizer(["a bell", "a house"])
    )
    answer = [
        float(number)
        for number in printed.split("ANSWER")[1].replace("[", " ").replace("]", " ").replace(",", " ").split()
    ]
    np.testing.assert_allclose(answer, (features @ texts.T)[0].tolist(), atol=0.01)
