"""Base weights for machines without a network: into the cache, or into a folder (python -m train.fetch)."""

from pathlib import Path
from shlex import quote

from huggingface_hub import constants

from data_prep.atomic import atomic_folder
from data_prep.errors import UserError
from data_prep.terminal import say
from train.model.clip import load
from train.model.source import NOTATION


def fetch(model: str, out: Path | None = None) -> None:
    """Download a model and load it once, which shows that it is complete.

    Args:
        model: NAME:PRETRAINED or hf-hub:ID; also local-dir:PATH or a run, to write as a folder.
        out: folder to write: config, weights, tokenizer.

    Raises:
        UserError: not the name of a model, `out` exists, or the model cannot be loaded.
    """
    if ":" not in model and not Path(model).is_dir():
        raise UserError(f"{model}: not a model; {NOTATION}")
    if out and out.exists():
        raise UserError(f"{out}: already exists; pass another --out")
    clip = load(model)
    parameters = sum(parameter.numel() for parameter in clip.towers.parameters())
    say(
        f"{model}: {parameters / 1e6:.1f} million parameters, sha256 of the weights {clip.fingerprint()[:12]}"
    )
    if out is None:
        say(f"in the cache, {constants.HF_HOME}; to train without a network:")
        say(f"  HF_HUB_OFFLINE=1 python -m train RECIPE --model {quote(model)} --data SHARDS --run RUN")
        return
    with atomic_folder(out) as folder:
        clip.save(folder)
    written = load(f"local-dir:{out}").fingerprint()
    assert written == clip.fingerprint(), (written, clip.fingerprint())
    say(f"written: {out}; it loads without a network:")
    say(f"  python -m train RECIPE --model {quote(f'local-dir:{out}')} --data SHARDS --run RUN")
