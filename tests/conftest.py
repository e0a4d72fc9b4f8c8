"""What the tests share: drawn icons, their shards, and a tiny real CLIP in a folder; all made anew, nothing
downloaded.
"""

import contextlib
import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hub import Hub
from PIL import Image
from safetensors.torch import load_file, save_file
from wheel import installed  # noqa: F401, a fixture

from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build
from data_prep.errors import exit_on_user_error
from data_prep.icons import icons
from data_prep.shards import sha256_of
from eval.compare.command import compare
from eval.options import Inference
from eval.search.command import embed as embed_corpus
from eval.validation import validator
from train.loop import fit
from train.model.clip import load
from train.recipe import Optim, Recipe
from train.world import World

ROOT = Path(__file__).parent.parent

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def pytest_collection_modifyitems(items) -> None:
    """The longest files first: two at once then end at about the same time. Tests marked cuda need a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
    items.sort(
        key=lambda item: (
            item.path.name
            not in ("test_slurm_lab.py", "test_survival.py", "test_nonfinite.py", "test_loop.py")
        )
    )


def pytest_terminal_summary(terminalreporter) -> None:
    """Say which tests were skipped for want of a GPU, so that nobody takes them for passed."""
    skipped = [each for each in terminalreporter.stats.get("skipped", []) if "cuda" in each.keywords]
    if skipped:
        files = ", ".join(sorted({each.nodeid.partition("::")[0] for each in skipped}))
        terminalreporter.write_line(f"no GPU: {len(skipped)} tests marked cuda are skipped ({files})")


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
    split = Splitting(
        **{name: options.pop(name) for name in list(options) if name in Splitting.__dataclass_fields__}
    )
    check = Checking(
        **{name: options.pop(name) for name in list(options) if name in Checking.__dataclass_fields__}
    )
    options = {"images_per_shard": 40, "min_shards": 1, **options}
    return build(
        [str(icon_folder / "icons.csv")], out, ICONS, check, split, Parallelism(processes), **options
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A MODEL: weights and config as open_clip publishes them, with a mean and std of their own."""
    return f"local-dir:{save_tiny(tmp_path_factory.mktemp('tiny'))}"


@pytest.fixture(scope="session")
def icon_index(tmp_path_factory, tiny_model, icon_shards) -> Path:
    """An index of all splits of the icons by the tiny model."""
    out = tmp_path_factory.mktemp("index") / "icons"
    with contextlib.redirect_stdout(io.StringIO()):
        embed_corpus(tiny_model, icon_shards, out, inference=Inference(workers=0))
    return out


@pytest.fixture(scope="session")
def narrow_index(tmp_path_factory, icon_shards) -> Path:
    """The same icons by another model, of fewer dimensions."""
    folder = tmp_path_factory.mktemp("narrow")
    with contextlib.redirect_stdout(io.StringIO()):
        embed_corpus(
            f"local-dir:{save_tiny(folder, embed_dim=8)}",
            icon_shards,
            folder / "narrow",
            inference=Inference(workers=0),
        )
    return folder / "narrow"


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """One browser for all tests; each page gets a fresh profile, see browser.opened."""
    from browser import chromium  # here, because most tests need no browser

    with chromium() as browser:
        yield browser


def save_tiny(folder: Path, **changes) -> Path:
    torch.manual_seed(1)
    config = {**TINY, **changes}
    model = open_clip.model.CLIP(**config)
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.5, 0.25, 0.2],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> tuple[str, Path, dict]:
    """An OpenAI-shaped model in small (quick_gelu, 77 tokens): a MODEL, its export in fp32, and what the
    export returned.
    """
    from train.export.folder import export

    folder = tmp_path_factory.mktemp("quick")
    vision, text = (
        {**TINY["vision_cfg"], "image_size": 32, "layers": 2},
        {**TINY["text_cfg"], "context_length": 77},
    )
    weights = load_file(
        save_tiny(folder, quick_gelu=True, vision_cfg=vision, text_cfg=text) / "open_clip_model.safetensors"
    )
    # so that the activation matters
    larger = {name: 5 * tensor if ".mlp.c_fc." in name else tensor for name, tensor in weights.items()}
    save_file(larger, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}", folder / "out", export(load(f"local-dir:{folder}"), folder / "out")


def noise_image(width: int = 48, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory, tiny_model, icon_shards) -> tuple[Path, Path]:
    """A run of a few steps with its validations, and eval's comparison of it with the model it came from."""
    folder = tmp_path_factory.mktemp("tuned")
    small = {
        "epochs": 3,
        "global_batch_size": 48,
        "micro_batch_size": 48,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "workers": 0,
    }
    recipe = Recipe(
        tiny_model, str(icon_shards), str(folder / "run"), optim=Optim(lr=1e-3), log_every_steps=1, **small
    )
    fit(recipe, World(), validator(recipe, World()))
    with contextlib.redirect_stdout(io.StringIO()):
        compare(
            (tiny_model, str(folder / "run")),
            icon_shards,
            retention_set=icon_shards,
            retention_split="val",
            out=folder / "comparison",
            inference=Inference(workers=0),
        )
    return folder / "run", folder / "comparison" / "compare.json"


@pytest.fixture
def one_thread():
    """As environment() has it for other processes: their numbers and ours are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise_images(
    folder: Path, n: int, groups: int = 0, mode: str = "RGB", size: tuple[int, int] = (16, 12)
) -> Path:
    """Noise images 0.png, 1.png, ..., and pairs.csv (image, caption, group) with distinct captions."""
    rng = np.random.default_rng(0)
    lines = ["image,caption,group"]
    for number in range(n):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
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
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    )
    return [sys.executable, *launcher, "-m", *(["--"] if ranks else []), *map(str, arguments)]


def environment(**more) -> dict:
    """One thread, so that runs compare bit for bit; no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}


def call(
    *arguments, ranks: int = 0, expect: int = 0, cwd: Path = ROOT, **more
) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command(*arguments, ranks=ranks),
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == expect, (
        f"{' '.join(map(str, arguments))}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    )
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


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    """A hub on the loopback; huggingface_hub's client in this process uses it, with an empty cache."""
    with Hub() as hub, hub.in_this_process(tmp_path / "hf"):
        yield hub


@pytest.fixture
def served(tmp_path):
    """A folder behind a web server on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        failures = 0

        def log_message(self, *_):
            pass

        def do_GET(self):
            if "busy" in self.path and Quiet.failures == 0:
                Quiet.failures += 1
                self.send_error(503)
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def memory_folder(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there is one: on a disk, a file takes longer to write than to read."""
    folder = tempfile.mkdtemp(dir="/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where one can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (not root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
