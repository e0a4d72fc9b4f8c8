"""CPU time per image of the training data path, tokenizing included: open_clip_train's tar pipeline and ours,
on the same shards.

    python -m benchmarks.loader      both, on icons and photo-like JPEGs that it makes first

User + system time of this process and of its one loader worker, the worker's start included, one thread each;
the two take turns, and medians are printed. Both crop, jitter and turn gray as spectrum_icons.yaml says; ours
leaves the last two and normalising to the device: their time on this CPU has its own row. Start-up is not
counted.
"""

import argparse
import functools
import gc
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median

import open_clip
import torch
import xxhash
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train import data as open_clip_data

from benchmarks.data_prep import draw_icon, draw_photo, make
from data_prep.shard_index import sample_hash
from data_prep.shards import Shards, as_json
from train.data.augment import N_UNIFORMS, Augmentation
from train.data.decode import decoded
from train.data.loader import TrainPairs, train_loader
from train.data.order import Order
from train.recipe import Augment, Captions
from train.world import World

SIZE_PX, BATCH, MODEL = 224, 64, "ViT-L-14"
OURS, THEIRS = "ours: loader", "open_clip_train: loader"


def build(folder: Path, shards: Path) -> None:
    if not (shards / "manifest.json").exists():
        command = [
            sys.executable,
            "-m",
            "data_prep",
            "build",
            folder / "captions.csv",
            "--out",
            shards,
            "--image-column",
            "file",
        ]
        command += ["--caption-column", "caption", "--val", 0, "--test", 0, "--images-per-shard", 200]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def ours(shards: Shards, tokenizer: Callable) -> Iterator:
    pairs = TrainPairs(shards, Order(shards.shard_sizes, BATCH, 0), (SIZE_PX, SIZE_PX), Augment(), Captions())
    return train_loader(pairs, tokenizer, 0, pairs.order.samples_per_epoch, World(), workers=1)


def theirs(shards: Shards, tokenizer: Callable) -> Iterator:
    augment = Augment()
    chosen = {
        name: getattr(augment, name)
        for name in ("scale", "color_jitter", "color_jitter_prob", "gray_scale_prob")
    }
    arguments = argparse.Namespace(
        train_data=f"{shards.folder}/train/train-{{000000..{len(shards.shard_sizes) - 1:06d}}}.tar",
        train_num_samples=len(shards) // BATCH * BATCH,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH,
        workers=1,
        seed=0,
        world_size=1,
    )
    transform = image_transform_v2(PreprocessCfg(size=SIZE_PX), is_train=True, aug_cfg=chosen)
    return iter(
        open_clip_data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader
    )


def cpu_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def ms_per_image(batches: Callable[[], Iterator]) -> float:
    own, children, images, loaded = cpu_s(resource.RUSAGE_SELF), cpu_s(resource.RUSAGE_CHILDREN), 0, batches()
    for images_of_batch, *_ in loaded:
        images += len(images_of_batch)
    own = cpu_s(resource.RUSAGE_SELF) - own
    del loaded
    gc.collect()  # the worker ends with its loader, and only then its time is counted
    return (own + cpu_s(resource.RUSAGE_CHILDREN) - children) / images * 1e3


def ms_each(work: Callable, items: list) -> float:
    started = time.process_time()
    for item in items:
        work(item)
    return (time.process_time() - started) / len(items) * 1e3


def parts(shards: Shards, tokenizer: Callable) -> dict[str, float]:
    """Parts of our path, measured alone: ms per image."""
    samples = [shards.read(number) for number in range(min(len(shards), 512))]
    images, captions = [sample.image for sample in samples], [sample.captions[0] for sample in samples]
    batch = torch.randint(0, 256, (BATCH, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    augmentation = Augmentation(Augment())
    uniforms = torch.rand(BATCH, N_UNIFORMS, generator=torch.Generator().manual_seed(0)).tolist()
    rows = torch.tensor([augmentation.draw(numbers) for numbers in uniforms])
    captions = [captions[start : start + BATCH] for start in range(0, len(captions), BATCH)]
    encoded = [(sample.image, as_json(sample.meta).encode()) for sample in samples]
    return {
        "of it comparing with the index's hash": ms_each(
            lambda one: sample_hash(xxhash.xxh3_128_digest(one[0]), one[1]), encoded
        ),
        "of it decoding": ms_each(decoded, images),
        "of it tokenising": ms_each(tokenizer, captions) / BATCH,
        "ours: what the device does, on this CPU": ms_each(lambda _: augmentation.apply(batch, rows), [0, 1])
        / BATCH,
    }


def main(icons: int = 2000, photos: int = 1000, repeats: int = 3, folder: str = "data/benchmark") -> None:
    """Make the images and their shards, measure, print a table.

    Args:
        icons: 224 px RGB PNGs; photos: 640 x 480 JPEGs.
        folder: Where they are made; they are kept and used again.
    """
    torch.set_num_threads(1)
    # webdataset 1.0 ends each tar with a marker that open_clip_train 3.3 takes for a file.
    open_clip_data.tar_file_expander = functools.partial(open_clip_data.tar_file_expander, eof_value=None)
    tokenizer, columns = open_clip.get_tokenizer(MODEL), {}
    for kind, draw, extension, count in (
        ("icon", draw_icon, "png", icons),
        ("photo", draw_photo, "jpg", photos),
    ):
        made = Path(folder).absolute() / f"{kind}s-{count}"
        make(made, draw, count, extension)
        build(made, made.with_suffix(".shards"))
        shards = Shards(made.with_suffix(".shards"), "train")
        found: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, batches in ((THEIRS, theirs), (OURS, ours)):
                found.setdefault(name, []).append(
                    ms_per_image(lambda batches=batches, shards=shards: batches(shards, tokenizer))
                )
            for name, value in parts(shards, tokenizer).items():
                found.setdefault(name, []).append(value)
        columns[kind] = {name: median(values) for name, values in found.items()}
        ratios = [their / our for their, our in zip(found[THEIRS], found[OURS], strict=True)]
        print(
            f"{kind}: theirs to ours {median(ratios):.2f}"
            f" ({', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))})",
            flush=True,
        )
    print(
        f"\n| CPU time | {' | '.join(f'ms per {kind} | to ours' for kind in columns)}"
        f" |\n|---{'|---|---' * len(columns)}|"
    )
    for name in columns["icon"]:
        print(
            f"| {name} |",
            *(f"{values[name]:.4f} | {values[name] / values[OURS]:.3f} |" for values in columns.values()),
        )
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ("torch", "torchvision", "open_clip_torch", "webdataset", "pillow", "simplejpeg", "pyspng")
    print(
        f"\n{cpu[1] if cpu else platform.machine()},"
        f" {', '.join(f'{name} {version(name)}' for name in packages)}"
    )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
