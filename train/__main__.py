"""A recipe and shards become a run.

  python -m train train/recipes/demo.yaml --data data/icons/shards --run runs/icons
      one process; on one GPU if there is one
  torchrun --nproc_per_node 2 -m -- train train/recipes/demo.yaml --data data/icons/shards --run runs/icons
      one process per GPU, or two on the CPU; the same batches, the same loss
      (the -- keeps torchrun from taking --run for its own --run-path)

Any key of the recipe can be typed as a flag and then wins: --optim.lr 1e-5 --batch 128. All of them: --help.
The same command again goes on with an unfinished run, from the very step of its last checkpoint.
To stop a run cleanly: touch RUN/stop, or Ctrl-C. To watch it: tensorboard --logdir RUN.
"""

import json
import sys
from pathlib import Path

import numpy as np

from data_prep.errors import UserError, exit_on_user_error
from data_prep.shards import Shards, read_manifest
from eval.embed import Inference
from eval.retrieval import DIRECTIONS, evaluate
from train.loop import Validate, fit
from train.memory import uncompiled
from train.model import Clip
from train.recipe import Recipe, parse
from train.run import Run
from train.world import World, joined_world


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    recipe = parse(sys.argv[1:])
    with joined_world(recipe.timeout_minutes) as world:
        validate = world.together(lambda: validator(recipe, world))
        run = fit(recipe, world, validate)
        if world.is_first:
            print(closing_words(run))


def validator(recipe: Recipe, world: World) -> Validate:
    """Retrieval on the shards' val split, as metrics under val/; on shards without one, nothing."""
    splits = read_manifest(Path(recipe.data))["splits"]
    if not splits.get("val", {}).get("samples"):
        return lambda clip, world: {}
    shards = Shards(recipe.data, "val")
    shards.verify(world.rank, world.world_size)
    if shared := np.intersect1d(shards.groups, Shards(recipe.data, "train").groups).size:
        raise UserError(f"{recipe.data}: {shared} groups are in train and in val, so validation would flatter; build the shards again")

    @uncompiled()
    def validate(clip: Clip, world: World) -> dict[str, float]:
        result = evaluate(clip, shards, world, Inference(64 if recipe.micro_batch == "auto" else recipe.micro_batch, recipe.workers))
        return {f"val/{name}": value for name, value in result["metrics"].items() if not name.startswith("chance/")}

    return validate


def closing_words(run: Run) -> str:
    """What to know and do at the end of a run, or at its interruption."""
    recipe_file = run.folder / "recipe.yaml"
    status = json.loads((run.folder / "status.json").read_text())
    if status["state"] != "finished":
        return f"stopped after {status['samples']} pairs; this goes on from there: python -m train {recipe_file}"
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "val/mean/R@1" in line]
    words = [f"{run.folder} is finished: {status['samples']} pairs; a new run wants a new --run"]
    if len(validations) > 1:  # the first is of the weights before training, which are no checkpoint of this run
        best = max(validations[1:], key=lambda line: line["val/mean/R@1"])
        for direction in DIRECTIONS:
            key = f"val/{direction}/R@1"
            before, after = f"{100 * validations[0][key]:.1f} %", f"{100 * best[key]:.1f} %"
            words.append(f"  {direction} R@1 on val: {before} before, {after} at its best, after {best['samples']} pairs")
    words.append(f"numbers: python -m eval retrieval {run.folder} --data {run.recipe.data} --split test")
    words.append(f"curves:  tensorboard --logdir {run.folder}")
    return "\n".join(words)


if __name__ == "__main__":
    exit_on_user_error(main)
