"""A build on a full disk ends in a sentence with the place, and goes on when there is room."""

import gc
import subprocess

from conftest import assert_mistake, call_here, noise_images

from data_prep.__main__ import main
from data_prep.build.pipeline import Parallelism, build


def test_a_build_names_the_full_disk_and_goes_on(small_disk, tmp_path):
    out = small_disk / "shards"
    command = ["build", noise_images(tmp_path, 400), "--out", out, "--processes", 1]
    # no room for the rows, then for the shards
    for size, place in (("100k", str(out)), ("1m", f"{out}.partial/")):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
        result = call_here(main, *command, expect=1)
        gc.collect()  # closes the database, as the end of the process does
        assert_mistake(result, f"No space left on device: '{place}", "run the same command again")
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    report = build([command[1]], out, parallelism=Parallelism(1))
    assert report["images"] == 400
