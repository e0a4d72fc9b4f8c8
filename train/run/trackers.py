"""Where a run's numbers are shown: TensorBoard, Trackio, Weights & Biases, each by its own library.

A resumed run continues its curves: TensorBoard discards what will be repeated, and the other two, which
cannot, are not given it again (see Logger.write).
"""

import dataclasses
import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.atomic import write_json
from data_prep.errors import UserError
from data_prep.masked import one_line
from data_prep.strict_json import read_json
from train.recipe import Recipe, leaves

PROJECT = "cliptune"  # unless WANDB_PROJECT says otherwise
NAMES_FILE = "trackers.json"  # under what name and id the run is known outside
# TensorBoard sorts groups of curves by name; a group is what precedes the first slash.
GROUPS = {
    "train/loss": "1_loss",
    "val/": "2_validation",
    "retention/": "3_retention",
    "train/": "5_training",
    "epoch": "5_training",
    "time/": "7_time",
}
OTHER_WEIGHTS, BY_INSTANCE = "4_other_weights", "6_by_instance"
# How to look at the curves of a run; W&B prints its page.
SHOW = {"tensorboard": "tensorboard --logdir {run}", "trackio": f"trackio show --project {PROJECT}"}


def check_installed(names: Sequence[str]) -> None:
    """Check that the libraries are there.

    Raises:
        UserError: one is missing.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        others = " ".join(name for name in names if name not in missing) or "and no name"
        raise UserError(
            f"--log {' '.join(names)}: {' and '.join(missing)} not installed; pip install"
            f" {' '.join(missing)}, or pass --log {others}"
        )


class TensorBoard:
    """RUN/tensorboard."""

    def __init__(self, folder: Path, recipe: Recipe, names: dict, samples: int):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = samples + 1 if samples else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def log(self, values: Mapping[str, float], samples: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(tensorboard_tag(name), value, samples)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """Trackio's local database (TRACKIO_DIR), or a Space (TRACKIO_SPACE_ID); to look at it: trackio show."""

    def __init__(self, folder: Path, recipe: Recipe, names: dict, samples: int):
        import trackio

        config = leaves(dataclasses.asdict(recipe))
        # Trackio knows a run by its name, so the name has a part that no other run has.
        name = f"{names['name']}-{names['id']}"
        self.run = trackio.init(PROJECT, name=name, config=config, resume="allow", embed=False)

    def log(self, values: Mapping[str, float], samples: int) -> None:
        self.run.log(dict(values), step=samples)

    def flush(self) -> None:
        """It sends twice a second."""

    def close(self) -> None:
        self.run.finish()


class Wandb:
    """Weights & Biases; RUN/wandb holds what was not sent (WANDB_MODE=offline, then: wandb sync)."""

    def __init__(self, folder: Path, recipe: Recipe, names: dict, samples: int):
        import wandb

        try:
            self.run = wandb.init(
                project=None if wandb.Settings().project else PROJECT,
                name=names["name"],
                id=names["id"],
                resume="allow",
                dir=str(folder),
                config=leaves(dataclasses.asdict(recipe)),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"--log wandb: {one_line(error, 600)}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        # Its own step counts calls and must not go back; the axis of the curves is `samples`.
        self.run.define_metric("samples", hidden=True)
        self.run.define_metric("*", step_metric="samples")

    def log(self, values: Mapping[str, float], samples: int) -> None:
        self.run.log({"samples": samples, **values})

    def flush(self) -> None:
        """It sends as it goes."""

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}
Tracker = TensorBoard | Trackio | Wandb


def open_trackers(folder: Path, recipe: Recipe, samples: int) -> dict[str, Tracker]:
    """The trackers of a recipe by name, at `samples` of the run in `folder`.

    Raises:
        UserError: one is not installed, or cannot be reached.
    """
    check_installed(recipe.log)
    path = folder / NAMES_FILE
    if path.is_file():
        names = read_json(path, {"name": str, "id": str}, "restore it from a copy, or delete it")
    else:
        names = {"name": folder.absolute().name, "id": secrets.token_hex(4)}
        if set(recipe.log) - {"tensorboard"}:
            write_json(path, names)
    return {name: TRACKERS[name](folder, recipe, names, samples) for name in dict.fromkeys(recipe.log)}


def tensorboard_tag(name: str) -> str:
    """A metric's name with its group before it: "val/mean/R@1" -> "2_validation/val/mean/R@1"."""
    if "instance" in name.split("/"):
        return f"{BY_INSTANCE}/{name}"
    group = next((group for start, group in GROUPS.items() if name.startswith(start)), OTHER_WEIGHTS)
    return f"{group}/{name}"
