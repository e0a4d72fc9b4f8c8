"""Base weights for machines without a network: into the cache, or into a folder.

python -m train.fetch ViT-L-14:laion2b_s32b_b82k
    downloads into the cache (HF_HOME), from which NAME:TAG and hf-hub:ID load with HF_HUB_OFFLINE=1
python -m train.fetch hf-hub:USER/NAME --out base
    writes config, weights and tokenizer to a folder, which loads anywhere as local-dir:base
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from huggingface_hub import constants

from data_prep.atomic import atomic_folder
from data_prep.errors import UserError
from train.model.clip import NOTATION, load


def fetch(model: Annotated[str, tyro.conf.Positional], out: Path | None = None) -> None:
    """Downloads a model and loads it once, so that it is known to be whole.

    Args:
        model: NAME:PRETRAINED or hf-hub:ID; also local-dir:PATH or a run, to write as a folder.
        out: Folder to write: config, weights, tokenizer.
    """
    if ":" not in model and not Path(model).is_dir():
        raise UserError(f"{model}: nothing to fetch; {NOTATION}")
    if out and out.exists():
        raise UserError(f"{out}: there already; pass another --out")
    clip = load(model)
    parameters = sum(parameter.numel() for parameter in clip.towers.parameters())
    print(
        f"{model}: {parameters / 1e6:.1f} million parameters, sha256 of the weights {clip.fingerprint()[:12]}"
    )
    if out is None:
        print(f"it is in the cache, {constants.HF_HOME}; without a network:")
        print(f"  HF_HUB_OFFLINE=1 python -m train RECIPE.yaml --model {model} --data SHARDS --run RUN")
        return
    with atomic_folder(out) as folder:
        clip.save(folder)
    written = load(f"local-dir:{out}").fingerprint()
    assert written == clip.fingerprint(), (written, clip.fingerprint())
    print(f"{out} holds all of it and wants no network; type next:")
    print(f"  python -m train RECIPE.yaml --model local-dir:{out} --data SHARDS --run RUN")


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    tyro.cli(fetch, prog="python -m train.fetch", config=(tyro.conf.FlagConversionOff,))
