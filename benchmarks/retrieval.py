"""What retrieval costs: both directions by counting, against the bare matrix product, and against open_clip's
get_clip_metrics.

    python -m benchmarks.retrieval --pairs 25000
    python -m benchmarks.retrieval --pairs 100000 --no-peers

Each is a process of its own, on the same made-up features (768 dimensions, fp32): CPU seconds of the part
that is timed, and peak memory above that of the features.
"""

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

D, TILE_ROWS = 768, 320


def features(n: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    image_features = torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=1)
    text_features = torch.nn.functional.normalize(
        image_features + 0.3 * torch.randn(n, D, generator=generator), dim=1
    )
    return image_features, text_features


def timed(work: Callable[[], dict]) -> None:
    """Print what it took, and its result, as JSON."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of making the features
    resident_kb = peak_kb()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    found = work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps(
            {
                "cpu_s": cpu_s,
                "wall_s": time.monotonic() - started,
                "peak_mb": (peak_kb() - resident_kb) / 1e3,
                **found,
            }
        )
    )


def peak_kb() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def bare_product(n: int) -> None:
    image_features, text_features = features(n)

    def work() -> dict:
        for rows in image_features.split(TILE_ROWS):
            _ = rows @ text_features.T
        return {}

    timed(work)


def ours(n: int) -> None:
    from eval.retrieval.ranking import Relevance, ranks, summarize

    image_features, text_features = features(n)
    relevance = Relevance.diagonal(n)

    def work() -> dict:
        image_to_text, text_to_image = ranks(image_features, text_features, relevance)
        return {"R@1": [summarize(image_to_text)["R@1"], summarize(text_to_image)["R@1"]]}

    timed(work)


def open_clip(n: int) -> None:
    import torch
    from open_clip_train.train import get_clip_metrics

    image_features, text_features = features(n)

    def work() -> dict:
        found = get_clip_metrics(image_features, text_features, torch.tensor(1.0))
        return {"R@1": [float(found["image_to_text_R@1"]), float(found["text_to_image_R@1"])]}

    timed(work)


def main(pairs: int = 25_000, peers: bool = True) -> None:
    """Run each, print a table.

    Args:
        pairs: Images and texts, one for one.
        peers: Run open_clip too, which needs 8 * pairs^2 bytes and more.
    """
    print(f"{pairs:,} pairs of {D} dimensions\n")
    print(
        "| | CPU s | to the bare product | peak MB beside the features | R@1 both ways"
        " |\n|---|---|---|---|---|"
    )
    base = None
    for name, function in (
        ("bare fp32 product", bare_product),
        ("ours, both directions", ours),
        ("open_clip, get_clip_metrics", open_clip),
    ):
        if function is open_clip and not peers:
            continue
        code = f"from benchmarks.retrieval import {function.__name__} as f; f({pairs})"
        found = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1])
        base = base or found["cpu_s"]
        shown = " / ".join(f"{value:.4f}" for value in found.get("R@1", []))
        print(
            f"| {name} | {found['cpu_s']:.1f} | {found['cpu_s'] / base:.2f} | {found['peak_mb']:.0f} |"
            f" {shown} |",
            flush=True,
        )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
