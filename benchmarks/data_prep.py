"""CPU time per image of ways to make WebDataset tars from the same files: GNU tar, webdataset, img2dataset,
and ours.

    python -m benchmarks.data_prep                 all of them, on 20,000 icons and 5,000 photo-like JPEGs
    python -m benchmarks.data_prep --only ours     those with "ours" in their name

CPU time is user + system of the whole process tree (os.wait4), start-up included; the files are in the page
cache.
"""

import csv
import functools
import hashlib
import io
import json
import platform
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import Pool
from pathlib import Path

from benchmarks.planner import call, measure

ICON_PX, VARIANTS, PHOTO_PX, QUALITY, PER_SHARD = 224, 4, (640, 480), 88, 1000
WORDS = [
    "quiet",
    "small",
    "bright",
    "wooden",
    "dusty",
    "harbor",
    "bridge",
    "garden",
    "window",
    "market",
    "kettle",
    "street",
    "river",
]
OURS, KINDS = "ours, all checks", ("icon", "photo", "transparent icon")


@functools.cache
def _icon_fonts() -> tuple[list, dict, Callable]:
    from data_prep.icons import all_glyphs, draw, font_files

    glyphs = all_glyphs()
    random.Random(0).shuffle(glyphs)
    return glyphs, font_files(), draw


def draw_icon(file: Path, number: int, transparent: bool = False) -> str:
    """An icon in a dark color on a light one, four of each glyph, or in black on nothing; its name."""
    from PIL import Image

    glyphs, fonts, draw = _icon_fonts()
    rng, at, shape = random.Random(number), number if transparent else number // VARIANTS, None
    while shape is None:  # a few glyphs draw nothing
        glyph, at = glyphs[at % len(glyphs)], at + 1
        shape = draw(fonts[glyph.font], glyph.character, ICON_PX)
    light, dark = (tuple(rng.randrange(*span) for _ in range(3)) for span in ((160, 256), (0, 120)))
    icon = Image.new("RGB", shape.size, light)
    icon.paste(dark, (0, 0), shape)
    (shape if transparent else icon).save(file)
    return glyph.names[0].replace("-", " ")


def draw_photo(file: Path, number: int) -> str:
    """Shapes under noise of many scales, fainter where finer: a JPEG as large as a photo's; a made-up
    caption.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(number)

    def noise(finest: int, amplitude: float) -> np.ndarray:
        layer = Image.new("F", (1, 1))
        for at in range(7, finest - 1, -1):
            layer = np.asarray(layer.resize([side >> at for side in PHOTO_PX], Image.BICUBIC))
            layer = Image.fromarray(
                layer + amplitude * 0.66 ** (7 - at) * rng.standard_normal(layer.shape, np.float32)
            )
        return np.asarray(layer.resize(PHOTO_PX, Image.BILINEAR))

    shapes = Image.new("L", PHOTO_PX, 128)
    for _ in range(12):
        x, y, width, height, gray = (
            int(value) for value in rng.integers((0, 0, 20, 20, 60), (*PHOTO_PX, 200, 200, 200))
        )
        ImageDraw.Draw(shapes).ellipse((x, y, x + width, y + height), fill=gray)
    planes = (
        plane.clip(0, 255).astype(np.uint8)
        for plane in (shapes + noise(0, 50), 128 + noise(3, 12), 128 + noise(3, 12))
    )
    Image.merge("YCbCr", [Image.fromarray(plane) for plane in planes]).save(file, "JPEG", quality=QUALITY)
    return " ".join([f"photo {number}", *rng.choice(WORDS, 6)])


def make(folder: Path, draw: Callable, count: int, extension: str) -> None:
    """Images with a .txt and a .json of the same name, images.txt with their names, urls.csv, and
    captions.csv (file, caption).
    """
    if (folder / "captions.csv").exists():
        return
    names = [f"{number // 1000:03d}/{number:06d}.{extension}" for number in range(count)]
    for name in names[::1000]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        captions = pool.starmap(
            draw, ((folder / name, number) for number, name in enumerate(names)), chunksize=64
        )
    for name, caption in zip(names, captions, strict=True):
        meta = {
            "image": name,
            "captions": [caption],
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        (folder / name).with_suffix(".txt").write_text(caption)
        (folder / name).with_suffix(".json").write_text(json.dumps(meta))
    (folder / "images.txt").write_text("\n".join(names))
    urls = [(folder / name).as_uri() for name in names]
    # where captions.csv is, all is
    for table, column, places in (("urls", "url", urls), ("captions", "file", names)):
        with open(folder / f"{table}.csv", "w", newline="") as file:
            csv.writer(file).writerows([(column, "caption"), *zip(places, captions, strict=True)])


def with_webdataset(folder: str, out: str, decode: str) -> None:
    """Copy the files to shards; unless `decode` is empty, each is decoded in full by Pillow first."""
    import webdataset
    from PIL import Image

    with (
        webdataset.ShardWriter(f"{out}/%06d.tar", maxcount=PER_SHARD, verbose=0) as writer,
        open(f"{folder}/captions.csv") as table,
    ):
        for number, row in enumerate(csv.DictReader(table)):
            data = Path(folder, row["file"]).read_bytes()
            if decode:
                Image.open(io.BytesIO(data)).load()
            writer.write(
                {"__key__": f"{number:08d}", row["file"][-3:]: data, "json": row, "txt": row["caption"]}
            )


def with_img2dataset(folder: str, out: str, encode: str) -> None:
    """Let img2dataset read the files by file:// URLs; with an empty `encode` it leaves them as they are."""
    from img2dataset import download

    options = {} if encode else {"disable_all_reencoding": True, "resize_mode": "no"}
    options |= {
        "input_format": "csv",
        "caption_col": "caption",
        "output_format": "webdataset",
        "number_sample_per_shard": PER_SHARD,
    }
    download(f"{folder}/urls.csv", output_folder=out, processes_count=1, thread_count=4, **options)


def tools(folder: Path, out: Path, other: Path) -> dict[str, list[list]]:
    """Name -> commands that are run one after the other."""
    tar, hashing = (
        ["tar", "--create", "--file", out / "all.tar", "--directory", folder],
        ["sha256sum", out / "all.tar"],
    )
    build = [
        sys.executable,
        "-m",
        "data_prep",
        "build",
        folder / "captions.csv",
        "--out",
        out / "shards",
        "--processes",
        1,
    ]
    build += ["--image-column", "file", "--caption-column", "caption", "--images-per-shard", PER_SHARD]
    return {
        "GNU tar, images alone": [[*tar, "--files-from", folder / "images.txt"]],
        "GNU tar, images with .txt and .json": [[*tar, "."]],
        "GNU tar plus hashing (sha256sum)": [[*tar, "."], hashing],
        "webdataset, nothing decoded": [call(with_webdataset, folder, out, "")],
        "webdataset, decoded by Pillow": [call(with_webdataset, folder, out, "decode")],
        "img2dataset, no re-encoding": [call(with_img2dataset, folder, out, "", python=other)],
        "img2dataset, as it comes (JPEG of 256 px)": [
            call(with_img2dataset, folder, out, "encode", python=other)
        ],
        "ours, --skip-decode": [[*build, "--skip-decode"]],
        OURS: [build],
    }


def ms_per_image(commands: list[list], out: Path, count: int) -> float:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    cpu_s = sum(measure(command, out.with_suffix(".log"))[0] for command in commands)
    listed = b"".join(
        subprocess.check_output(["tar", "--list", "--file", path]) for path in out.rglob("*.tar")
    )
    assert listed.count(b".png\n") + listed.count(b".jpg\n") == count, (
        f"{commands}: not every image is in the tars"
    )
    return cpu_s / count * 1e3


def about(other: Path, log: Path) -> str:
    """The machine, the versions, and what start-up alone takes."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    tar = subprocess.check_output(["tar", "--version"], text=True).partition("\n")[0]
    shown = [cpu[1] if cpu else platform.machine(), f"Python {platform.python_version()}", tar]
    shown += [f"{name} {version(name)}" for name in ("webdataset", "pillow", "simplejpeg", "pyspng")]
    show = "import importlib.metadata as m; print(', img2dataset', m.version('img2dataset'), end='')"
    other_version = subprocess.check_output([other, "-c", show], text=True) if other.exists() else ""
    starts = {"webdataset": sys.executable, "img2dataset": other, "data_prep.__main__": sys.executable}
    took = [
        f"{name} {measure([at, '-c', f'import {name}'], log)[0]:.1f} s"
        for name, at in starts.items()
        if Path(at).exists()
    ]
    return f"{', '.join(shown)}{other_version}. Start-up alone, which is in the figures: {', '.join(took)}."


def main(
    icons: int = 20_000,
    photos: int = 5_000,
    folder: str = "data/benchmark",
    img2dataset_env: str = "",
    only: str = "",
) -> None:
    """Make the files, run each tool on them, print a table.

    Args:
        icons: 224 px opaque RGB PNGs. Ours alone also gets a tenth as many transparent ones, which it has to
            encode anew.
        photos: 640 x 480 JPEGs.
        folder: Where files are made; images are kept, and used again.
        img2dataset_env: Its environment, made by venv and pip if it is not there; by default one in `folder`.
        only: Only tools with this in their name.
    """
    base = Path(folder).absolute()
    other, out = Path(img2dataset_env or base / "img2dataset-env").absolute() / "bin" / "python", base / "out"
    if not other.exists() and any(
        only in name for name in tools(base, out, other) if name.startswith("img2dataset")
    ):
        subprocess.run([sys.executable, "-m", "venv", other.parent.parent], check=True)
        subprocess.run(
            [other, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "img2dataset"],
            check=True,
        )
    draws = (
        (draw_icon, "png", icons),
        (draw_photo, "jpg", photos),
        (functools.partial(draw_icon, transparent=True), "png", icons // 10),
    )
    times: dict[str, dict[str, float]] = {}
    for kind, (draw, extension, count) in zip(KINDS, draws, strict=True):
        made = base / f"{kind.replace(' ', '-')}s-{count}"
        make(made, draw, count, extension)
        # in the page cache from here on
        kilobytes = sum(len(file.read_bytes()) for file in made.rglob("*.*")) / 1e3
        print(f"{count} {kind}s, {kilobytes / count:.1f} kB each with .txt and .json")
        for name, commands in tools(made, out, other).items():
            if only in name and (kind != KINDS[2] or name == OURS):
                times.setdefault(name, {})[kind] = ms_per_image(commands, out, count)
                print(f"{name}: {times[name][kind]:.3f} ms per {kind}", file=sys.stderr)
    print(
        f"\n| CPU time | {' | '.join(f'ms per {kind} | to ours' for kind in KINDS)}"
        f" |\n|---{'|---' * 2 * len(KINDS)}|"
    )
    for name, found in times.items():
        ratios = {kind: found[kind] / times.get(OURS, {}).get(kind, float("nan")) for kind in found}
        print(
            f"| {name} |",
            *(f"{found[kind]:.3f} | {ratios[kind]:.2f} |" if kind in found else " | |" for kind in KINDS),
        )
    print(
        f"\n{about(other, out.with_suffix('.log'))}\n`python -m benchmarks.data_prep"
        f" {' '.join(sys.argv[1:])}`"
    )
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
