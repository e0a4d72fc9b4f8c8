"""Export of full-size models with random weights: CPU time, peak memory, sizes and differences.

    python -m benchmarks.export                          the rows of export.md
    python -m benchmarks.export --only ViT-B-32          those with this in their name

Each row is a process of its own, which writes to a temporary folder. Nothing is downloaded.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

ROWS = [  # model, dtype, onnx
    ("ViT-B-32-quickgelu:openai", "fp16", False),
    ("ViT-B-32-quickgelu:openai", "fp32", True),
    ("ViT-L-14:laion2b_s32b_b82k", "fp32", True),
    ("ViT-L-14:laion2b_s32b_b82k", "fp16", False),
]


def row(model: str, dtype: str, onnx: bool) -> dict:
    """One export in this process; architecture and preprocessing are the tag's, the weights random."""
    from train.export.folder import export
    from train.model.clip import load

    clip = load(model, weights=False)
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF)
        record = export(clip, Path(folder) / "out", dtype, onnx)
        after = resource.getrusage(resource.RUSAGE_SELF)
    weights = sum(weight.nbytes for weight in clip.towers.model.state_dict().values())
    return {
        "model": model,
        "dtype": dtype,
        "onnx": onnx,
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "peak_gb": round(after.ru_maxrss * 1024 / 1e9, 1),
        "weights_gb": round(weights / 1e9, 2),
        "gb": {
            name: round(file["bytes"] / 1e9, 2)
            for name, file in record["files"].items()
            if file["bytes"] > 2e7
        },
        "differences": record["differences"],
    }


def main(only: str = "") -> None:
    """CPU time, memory, sizes and differences of exports, each in a process of its own.

    Args:
        only: A part of the models' names.
    """
    for model, dtype, onnx in ROWS:
        if only in model:
            code = (
                f"import json; from benchmarks.export import row; print(json.dumps(row({model!r}, {dtype!r},"
                f" {onnx})))"
            )
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
            print(json.dumps(json.loads(done.stdout.splitlines()[-1]), indent=1), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
