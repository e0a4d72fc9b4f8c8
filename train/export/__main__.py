"""Export a model as one folder for open_clip and transformers, and compare what was written with the model.

  python -m train.export runs/icons --out exported
      the run's best checkpoint, compared on images of its own validation split
  python -m train.export ViT-B-32:laion2b_s34b_b79k --out exported --dtype fp16 --data SHARDS --onnx
      any MODEL; half the bytes; also for onnxruntime

MODEL -> hidden folder beside FOLDER -> loaded back from its files -> compared with MODEL -> renamed to FOLDER
"""

import sys
from pathlib import Path
from typing import Literal

import tyro

from data_prep.cli import Folder, Model, OptionalShards, print_guide, run_command
from data_prep.errors import exit_on_user_error

PROG = "python -m train.export"


def command(
    model: tyro.conf.Positional[Model],
    out: Folder,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    data: OptionalShards = None,
    onnx: bool = False,
    overwrite: bool = False,
) -> None:
    """Export a model as one folder for open_clip and transformers.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder (its best checkpoint).
        out: Folder to write.
        dtype: Data type of the weights in the files. fp16 and bf16 take half the bytes; the effect of
            rounding on features is printed.
        data: Shards whose images and captions are compared. Default: the run's own if they still exist, else
            synthetic images.
        onnx: Also write image.onnx and text.onnx, for onnxruntime.
        overwrite: Replace a folder that this command wrote before.
    """
    from data_prep.atomic import check_replaceable
    from data_prep.shards import read_manifest

    check_replaceable(out, "export.json", overwrite)
    if data:
        read_manifest(data)  # fails early: opening the model takes longer

    from train.export.folder import RECORD, export, shards_of, snippets, table
    from train.model.clip import load

    record = export(load(model), out, dtype, onnx, data or shards_of(Path(model)))
    print(f"{table(record)}\n\n{snippets(record, str(out))}\n\nwritten: {out}; details in {out / RECORD}")


def main() -> None:
    if len(sys.argv) == 1:
        print_guide(f"{PROG} MODEL --out FOLDER [OPTIONS]", __doc__)
    else:
        run_command(command, PROG, guide=__doc__)


if __name__ == "__main__":
    exit_on_user_error(main)
