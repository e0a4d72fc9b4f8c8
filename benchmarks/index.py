"""Requests and bytes that `data_prep index` needs for a tar behind a URL, by the size of its images.

    python -m benchmarks.index

The tars are made up: random bytes of half to one and a half times the size, each with a .json and a .txt. The
store is a file:// URL, whose requests are those of any other; how long they take is not measured.
"""

import io
import random
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from data_prep.inputs.rows import Input
from data_prep.inputs.tars import read_tar

IMAGES = {5_000: 2000, 50_000: 400, 500_000: 80, 2_000_000: 20}  # of a tar, by their bytes


def write_tar(path: Path, n: int, n_bytes: int) -> None:
    rng = random.Random(0)
    with tarfile.open(path, "w") as tar:
        for number in range(n):
            caption = f"thing {number}"
            sample = {
                "jpg": b"\xff\xd8\xff" + rng.randbytes(int(n_bytes * rng.uniform(0.5, 1.5))),
                "json": f'{{"caption": "{caption}", "url": "https://example.org/{number}"}}'.encode(),
                "txt": caption.encode(),
            }
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def main() -> None:
    print("| images of | size of a tar | requests | bytes read |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for n_bytes, n in IMAGES.items():
            path, fetched = Path(folder) / f"{n_bytes}.tar", Counter()
            write_tar(path, n, n_bytes)
            assert sum(1 for _ in read_tar(Input(f"file://{path}", fetched=fetched))) == n
            size, read = path.stat().st_size / 1e6, fetched["bytes"] / 1e6
            print(f"| {n_bytes:,} B | {size:.1f} MB | {fetched['requests']} | {read:.1f} MB |")


if __name__ == "__main__":
    main()
