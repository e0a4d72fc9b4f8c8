"""What the tests share: drawn icons, their shards, and a tiny real CLIP in a folder; all made anew, nothing downloaded."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_prep.build import Checking, Reading, Splitting, Work, build
from data_prep.errors import exit_on_user_error
from data_prep.icons import icons
from data_prep.shards import sha256_of

ROOT = Path(__file__).parent.parent

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def icon_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("icons") / "icons"
    icons(folder, limit=240)
    return folder


@pytest.fixture(scope="session")
def icon_shards(icon_folder) -> Path:
    """About 190 training icons in several shards, 25 for validation, 25 for the test."""
    build_icons(icon_folder, icon_folder.parent / "shards")
    return icon_folder.parent / "shards"


ICONS = Reading(image_column="file_path", caption_column="caption", group_column="group")


def build_icons(icon_folder: Path, out: Path, processes: int = 1, **options) -> dict:
    """Shards of the drawn icons; options are those of Splitting, Checking and build."""
    split = Splitting(**{name: options.pop(name) for name in list(options) if name in Splitting.__dataclass_fields__})
    check = Checking(**{name: options.pop(name) for name in list(options) if name in Checking.__dataclass_fields__})
    options = {"images_per_shard": 40, "min_shards": 1, **options}
    return build([str(icon_folder / "icons.csv")], out, ICONS, check, split, Work(processes), **options)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A MODEL: weights and config as open_clip publishes them, with a mean and std of their own."""
    return f"local-dir:{save_tiny(tmp_path_factory.mktemp('tiny'))}"


def save_tiny(folder: Path, **changes) -> Path:
    torch.manual_seed(1)
    config = {**TINY, **changes}
    model = open_clip.model.CLIP(**config)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def noise_images(folder: Path, n: int, groups: int = 0, mode: str = "RGB") -> Path:
    """0.png, 1.png, ... of noise, and pairs.csv (image, caption, group) with a caption of its own for each."""
    rng = np.random.default_rng(0)
    lines = ["image,caption,group"]
    for number in range(n):
        Image.fromarray(rng.integers(0, 256, (12, 16, len(mode)), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,caption {number},{f'g{number % groups}' if groups else ''}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def tars(folder: Path) -> dict[str, str]:
    """The sha256 of every tar in a folder."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*.tar"))}


def png(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def command(*arguments, ranks: int = 0, **environment) -> list[str]:
    """A command line of ours; under torchrun where `ranks` is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return [sys.executable, *launcher, "-m", *(["--"] if ranks else []), *map(str, arguments)]


def environment(**more) -> dict:
    """One thread, so that runs compare bit for bit; no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}


def call(*arguments, ranks: int = 0, expect: int = 0, cwd: Path = ROOT, **more) -> subprocess.CompletedProcess:
    result = subprocess.run(command(*arguments, ranks=ranks), cwd=cwd, env=environment(**more), capture_output=True, text=True, check=False)
    assert result.returncode == expect, f"{' '.join(map(str, arguments))}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def call_here(main, *arguments, expect: int = 2) -> subprocess.CompletedProcess:
    """The same in this process, for mistakes that are found at once: a start costs seconds."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr("sys.argv", ["python -m", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            exit_on_user_error(main)
    assert ended.value.code == expect, errors.getvalue()
    return subprocess.CompletedProcess(arguments, expect, "", errors.getvalue())


def assert_mistake(result: subprocess.CompletedProcess, *words: str) -> None:
    """A sentence with these words, and no traceback."""
    assert "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)
