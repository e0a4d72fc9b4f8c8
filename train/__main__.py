"""A recipe and shards become a run.

  python -m train train/recipes/demo.yaml --data data/icons/shards --run runs/icons
      one process; on one GPU if there is one
  torchrun --nproc_per_node 2 -m -- train train/recipes/demo.yaml --data data/icons/shards --run runs/icons
      one process per GPU, or two on the CPU; the same batches, the same loss
      (the -- keeps torchrun from taking --run for its own --run-path)

Any key of the recipe can be typed as a flag and then wins: --optim.lr 1e-5 --global_batch_size 128. All of them: --help.
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
from eval.retrieval.score import DIRECTIONS, evaluate, metric_names
from train.loop import fit
from train.model.activation_memory import uncompiled
from train.model.clip import Clip
from train.recipe import Recipe, parse
from train.retain.select import TRAINED, Validate, check_best_metric, prefix
from train.run.folder import Run
from train.world import World, joined_world


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    recipe = parse(sys.argv[1:])
    with joined_world(recipe.timeout_minutes) as world:
        validate = world.all_or_raise(lambda: validator(recipe, world))
        run = fit(recipe, world, validate)
        if world.is_first:
            print(closing_words(run))


def validator(recipe: Recipe, world: World) -> Validate:
    """Retrieval on the shards' val split, as metrics under val/, and on the control set; on shards without a
    val split, nothing.
    """
    held_out = {}
    if has_split(recipe.data, "val"):
        held_out["val"] = Shards(recipe.data, "val")
        if shared := np.intersect1d(held_out["val"].groups, Shards(recipe.data, "train").groups).size:
            raise UserError(
                f"{recipe.data}: {shared} groups are in train and in val, so validation would flatter; build"
                " the shards again"
            )
        if recipe.retention_set:
            held_out["control"] = Shards(
                recipe.retention_set, "val" if has_split(recipe.retention_set, "val") else "test"
            )
    for shards in held_out.values():
        shards.verify(world.rank, world.world_size)
    check_best_metric(recipe, [f"{name}/{metric}" for name in held_out for metric in metric_names()])

    @uncompiled()
    def validate(clip: Clip, world: World) -> dict[str, float]:
        inference = Inference(
            64 if recipe.micro_batch_size == "auto" else recipe.micro_batch_size, recipe.workers
        )
        metrics = {}
        for name, shards in held_out.items():
            result = evaluate(clip, shards, world, inference)
            metrics |= {
                f"{name}/{metric}": value
                for metric, value in result["metrics"].items()
                if not metric.startswith("chance/")
            }
        return metrics

    return validate


def has_split(data: str, split: str) -> bool:
    return bool(read_manifest(Path(data))["splits"].get(split, {}).get("samples"))


def closing_words(run: Run) -> str:
    """What to know and do at the end of a run, or at its interruption."""
    recipe_file = run.folder / "recipe.yaml"
    status = json.loads((run.folder / "status.json").read_text())
    if status["state"] != "finished":
        return (
            f"stopped after {status['samples']} pairs; this goes on from there: python -m train {recipe_file}"
        )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "val/mean/R@1" in line]
    reason = f", {status['reason']}" if "reason" in status else ""
    words = [f"{run.folder} is finished: {status['samples']} pairs{reason}; a new run wants a new --run"]
    best = json.loads((run.folder / "checkpoints" / "best" / "state.json").read_text())
    weights = best.get("weights", TRAINED)  # the state of an older run has no such key
    for line in validations[
        1:
    ]:  # the first is of the weights before training, which are no checkpoint of this run
        if line["samples"] != best["samples"]:
            continue
        of = "" if weights == TRAINED else f", of the {weights}"
        for direction in DIRECTIONS:
            key = f"val/{direction}/R@1"
            before, after = f"{100 * validations[0][key]:.1f} %", f"{100 * line[prefix(weights) + key]:.1f} %"
            words.append(
                f"  {direction} R@1 on val: {before} before, {after} at its best, after {best['samples']}"
                f" pairs{of}"
            )
    words.append(f"numbers: python -m eval retrieval {run.folder} --data {run.recipe.data} --split test")
    words.append(f"curves:  tensorboard --logdir {run.folder}")
    return "\n".join(words)


if __name__ == "__main__":
    exit_on_user_error(main)
