"""Export a model as one folder for open_clip, transformers and sentence-transformers, and compare it with the
model.

  python -m train.export runs/icons --out exported
      the run's best checkpoint, compared on images of its own validation split
  python -m train.export ViT-B-32:laion2b_s34b_b79k --out exported --dtype fp16 --data SHARDS --onnx
      any MODEL; half the bytes; also for onnxruntime and transformers.js

MODEL -> hidden folder beside FOLDER -> loaded back from its files -> compared with MODEL -> renamed to FOLDER
"""

import sys
from pathlib import Path
from typing import Literal

import tyro

from data_prep.cli import Folder, Model, OptionalShards, print_guide, run_command
from data_prep.errors import exit_on_user_error
from data_prep.terminal import say

PROG = "python -m train.export"


def command(
    model: tyro.conf.Positional[Model],
    out: Folder,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    data: OptionalShards = None,
    onnx: bool = False,
    overwrite: bool = False,
) -> None:
    """Export a model as one folder for open_clip, transformers and sentence-transformers.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder (its best checkpoint).
        out: Folder to write.
        dtype: Data type of the weights in the files. fp16 and bf16 take half the bytes; the effect of
            rounding on features is printed.
        data: Shards whose images, captions and original files are compared. Default: the run's own if they
            still exist, else synthetic images.
        onnx: Also write onnx/, for onnxruntime and transformers.js, in fp32 and int8; what int8 costs is
            printed.
        overwrite: Replace a folder that this command wrote before.
    """
    from data_prep.atomic import check_replaceable, local_paths
    from data_prep.shards import read_manifest

    check_replaceable(out, "export", overwrite, local_paths(model, data))
    if data:
        read_manifest(data)  # fails early: opening the model takes longer

    from eval.validation import features_metrics
    from train.data.shares import first_of
    from train.export.folder import RECORD, export, shards_of, table
    from train.export.snippets import blocks, use
    from train.model.clip import load
    from train.recipe import flags_of, parse

    run = Path(model)
    data = data or shards_of(run)
    if data is None and (run / "recipe.yaml").is_file():
        name = first_of(parse(flags_of(run / "recipe.yaml")).data)
        say(f"the run's data {name} is not here, or has changed; to compare on it, pass --data")
    record = export(load(model), out, dtype, onnx, data, features_metrics)
    code = "\n".join(blocks(use(record, str(out)))[:2])
    say(f"{table(record)}\n\n{code}\nwritten: {out}; details in {out / RECORD}")


def main() -> None:
    if len(sys.argv) == 1:
        print_guide(f"{PROG} MODEL --out FOLDER [OPTIONS]", __doc__)
    else:
        run_command(command, PROG, guide=__doc__)


if __name__ == "__main__":
    exit_on_user_error(main)
