"""Peak memory of the steps of a build that see every row, at 1 and 10 million rows: reading, keeping results,
planning.

    python -m benchmarks.planner                     needs half a kB of disk per row, and more to sort
    python -m benchmarks.planner --rows 100000

No image is there or read: the checks are replaced by made-up results. The rows are a CSV of images with one
    to three captions;
four images are a group, some captions are shared, 1 % of images have the pixels of another, 1 % look nearly
like another. Each step is a process of its own, measured by os.wait4. Pages of mapped files count as memory
there.
"""

import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(command: list, log: Path) -> tuple[float, float, float]:
    """Run a command to its end: CPU seconds of it and all that it waited for, wall seconds, peak RSS of its
    largest process in MiB.
    """
    started = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / 1024


def call(function: Callable, *words, python: str | Path = sys.executable) -> list:
    """The command that calls a function of this folder in a process of its own, in another environment if
    `python` is of one.
    """
    module = Path(function.__code__.co_filename).stem
    return [
        python,
        "-c",
        f"from benchmarks.{module} import {function.__name__} as f; f(*{[str(word) for word in words]})",
    ]


def write_rows(path: Path, rows: int) -> int:
    """Write a CSV of made-up rows; how many images they are of."""
    rng, row, image = random.Random(0), 0, 0
    with open(path, "w", encoding="utf-8") as file:
        file.write("image,caption,group\n")
        while row < rows:
            for number in range(min(1 + image % 3, rows - row)):
                draw = rng.random()
                caption = f"caption {number} of image {image} in a made-up table of rows"
                caption = (
                    "icon"
                    if draw < 0.01
                    else (
                        f"a caption that about two share, {rng.randrange(rows // 100)}"
                        if draw < 0.03
                        else caption
                    )
                )
                file.write(f'{image // 1000:05d}/{image:08d}.png,"{caption}",group {image // 4}\n')
                row += 1
            image += 1
    return image


def made_up(images: list) -> list:
    """Replaces the checks: results by the numbers in the images' names."""
    from data_prep.build.scan import Checked
    from data_prep.images import CheckedImage

    def noise(*of) -> bytes:
        return hashlib.blake2b(repr(of).encode(), digest_size=64).digest()

    results = []
    for image in images:
        number = int(re.search(r"(\d+)\.png", image.location.name)[1])
        own = noise(number)
        pixels = noise("pixels", number // 200)[:16] if number % 100 == 0 else own[16:32]
        phash = (
            noise("phash", number // 200)[:31] + bytes([number % 200 // 100])
            if number % 100 == 50
            else own[32:]
        )
        result = CheckedImage("png", 224, 224, own[:16], pixels, phash + b"\xff\xff\xff", (), None)
        results.append(Checked(result))
    return results


def nothing(folder: str) -> None:
    import data_prep.build.pipeline  # noqa: F401


def reading(folder: str) -> None:
    from data_prep.build.options import Reading
    from data_prep.build.records import Part, load

    part = Part(Path(folder), 0, 1)
    load(part, [f"{folder}/rows.csv"], Reading(group_column="group", images=folder))
    part.close()


def keeping(folder: str) -> None:
    from data_prep.build.records import Part
    from data_prep.build.scan import scan

    part = Part(Path(folder), 0, 1)
    scan(part, [f"{folder}/rows.csv"], folder, made_up, processes=1)
    part.close()


def planning(folder: str) -> None:
    from data_prep.build.options import Splitting
    from data_prep.build.plan import Plan
    from data_prep.build.records import Part
    from data_prep.report.summary import summarize

    part = Part(Path(folder), 0, 1, read_only=True)
    plan = Plan(Path(folder), [part], Splitting(), [f"{folder}/rows.csv"], folder)
    images = sum(1 for _ in plan.images())
    summary = summarize(plan)
    assert images == summary["images"]
    print(summary["images"], "images,", summary["groups"], "groups,", summary["leaks"], "leaks")


STEPS = {
    "imports alone": nothing,
    "reading rows": reading,
    "keeping made-up results": keeping,
    "plan, images, report": planning,
}


def main(rows: tuple[int, ...] = (1_000_000, 10_000_000), folder: Path | None = None) -> None:
    """Measure each step, print a table.

    Args:
        rows: Sizes to run.
        folder: Where the work files go for as long as it takes; by default the system's temporary folder.
    """
    print(
        "| rows | images | step | seconds | CPU seconds | peak RSS | bytes per row above imports"
        " |\n|---|---|---|---|---|---|---|"
    )
    for count in rows:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            images, bare_mib = write_rows(Path(work, "rows.csv"), count), None
            for name, step in STEPS.items():
                cpu_s, wall_s, peak_mib = measure(call(step, work), Path(work, "log"))
                bare_mib = bare_mib or peak_mib
                per_row = (peak_mib - bare_mib) * 2**20 / count
                cells = (
                    f"{count:,} | {images:,} | {name} | {wall_s:.1f} | {cpu_s:.1f} | {peak_mib:.0f} MiB |"
                    f" {per_row:.1f}"
                )
                print(f"| {cells} |", flush=True)
            print(Path(work, "log").read_text().splitlines()[-1], file=sys.stderr)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
