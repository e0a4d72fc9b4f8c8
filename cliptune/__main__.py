"""Fine-tune CLIP on your own image-caption pairs.

Captions become shards:
  build         checks every image of a CSV, folder or tar, splits by group, writes shards and a report
  review        a page to look through the images, drop some and edit captions
  index-tars    checks existing WebDataset tars, for training in place
  merge         writes shards and manifest after a build in several tasks
  verify        compares all files of shards with their sha256
  icons         draws a demo set of real UI icons, with a CSV

A recipe and shards become a run:
  train         trains, or resumes an unfinished run: cliptune train icons --data SHARDS --run RUN
  lr, sweep     search for a learning rate; train a grid of recipe values
  forecast      what a run will reach, and what is short, from three short runs
  bench         measures speed and memory
  fetch         downloads base weights, for machines without a network
  export        one folder for open_clip and transformers, compared with the model
  publish       puts it on the Hugging Face hub, with a model card

A model gets its numbers:
  retrieval     R@1, 5, 10, ranks, MRR, mAP, nDCG with intervals
  zeroshot      zero-shot classification; linear-probe: heads on frozen features
  compare       models side by side, what got better and worse, retention, WiSE-FT
  bases         which model to start from; suspects: captions that are probably wrong
  confusion     each image's caption among others; compositionality: counting, binding, swapped words
  leaks         images of val and test that are nearly the same as a training image

An index of a corpus:
  embed         makes it; search, serve, cluster and export-index use it; compress makes it smaller;
                site writes the search page as static files
  align         searches it with a new model, without embedding its images again

On a Slurm cluster:
  submit        trains until the run is finished; submit-sweep, submit-pipeline, submit-job; status RUN

Five steps:
  cliptune build pairs.csv --out shards --image-column file --caption-column text
  cliptune train icons --data shards --run runs/mine
  cliptune retrieval runs/mine --data shards
  cliptune embed runs/mine --data photos/ --out index
  cliptune search index --text "a bell with a slash"

A recipe is a name (cars, demo, icons, lego_bricks, retrieval, spectrum_icons) or a file of your own.
On several GPUs: torchrun --nproc_per_node 8 -m -- cliptune train icons --data shards --run runs/mine
"""

import difflib
import importlib
import importlib.util
import re
import sys
from importlib.metadata import version

from cliptune.commands import COMMANDS
from data_prep.cli import run_place
from data_prep.errors import UserError, exit_on_user_error
from data_prep.rooms import CLONE, importable
from data_prep.terminal import say

REST = {"slurm": "flags"}  # rooms whose commands take words after `--`


def main() -> None:
    """Run the command that sys.argv[1] names; without one, print the guide.

    Raises:
        UserError: no such command.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        say(f"usage: cliptune COMMAND [OPTIONS]      cliptune COMMAND --help\n\n{__doc__.strip()}")
        return
    if name in ("--version", "-V", "version"):
        say(f"cliptune {_version()}")
        return
    known = name.replace("_", "-")
    if known not in COMMANDS:
        near = difflib.get_close_matches(known, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"cliptune {name}: no such command; {hint}It can be {', '.join(COMMANDS)}")
    module, *command = COMMANDS[known].split()
    if command:
        place = importlib.import_module(importable(f"{module}.__main__")).COMMANDS[command[0]]
        run_place(place, f"cliptune {known}", arguments, REST.get(module, ""))
        return
    full = importable(module)
    if importlib.util.find_spec(full).submodule_search_locations:
        full += ".__main__"
    sys.argv = [f"cliptune {known}", *arguments]
    importlib.import_module(full).main()


def _version() -> str:
    """That of pyproject.toml in the clone, which need not be installed; else of the installed package."""
    if CLONE is None:
        return version("cliptune")
    text = (CLONE / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"', text, flags=re.MULTILINE)[1]


def cli() -> None:
    """The console command."""
    exit_on_user_error(main)


if __name__ == "__main__":
    cli()
