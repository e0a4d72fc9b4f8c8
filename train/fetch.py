"""Download base weights for machines without a network: into the cache, or into a folder.

python -m train.fetch ViT-L-14:laion2b_s32b_b82k
    into the cache (HF_HOME); NAME:PRETRAINED and hf-hub:ID then load with HF_HUB_OFFLINE=1
python -m train.fetch hf-hub:USER/NAME --out base
    config, weights and tokenizer into a folder, which loads on any machine as local-dir:base
"""

import sys

import tyro

from data_prep.cli import Model, OptionalFolder, print_guide, run_command
from data_prep.errors import exit_on_user_error

PROG = "python -m train.fetch"


def fetch(model: tyro.conf.Positional[Model], out: OptionalFolder = None) -> None:
    """Download a model and load it once, which shows that it is complete.

    Args:
        model: NAME:PRETRAINED or hf-hub:ID; also local-dir:PATH or a run, with --out.
        out: Folder to write: config, weights, tokenizer.
    """
    from train.model.fetch import fetch as fetch_model

    fetch_model(model, out)


def main() -> None:
    if len(sys.argv) == 1:
        print_guide(f"{PROG} MODEL [OPTIONS]", __doc__)
    else:
        run_command(fetch, PROG, guide=__doc__)


if __name__ == "__main__":
    exit_on_user_error(main)
