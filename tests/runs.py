"""What tests of training share: a recipe of a few steps, what a run has logged and saved, and faults."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import train.step
from data_prep.shards import sha256_of
from eval.validation import validator
from train.loop import fit
from train.recipe import Augment, Captions, Optim, Recipe, to_yaml
from train.retain.select import Validate
from train.run.folder import Run
from train.world import World

WEIGHTS = "open_clip_model.safetensors"
CANDIDATES = {"ema": 0.9, "wise_ft": (0.3, 0.7)}  # "trained", "ema", "wise_ft 0.30" and "wise_ft 0.70"


def recipe(model: str, data: Path | str, run: Path | str, **changes) -> Recipe:
    """24 steps in 4 epochs, a checkpoint after each step; every random operation is in use."""
    options = {
        "epochs": 4,
        "global_batch_size": 24,
        "micro_batch_size": 12,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "workers": 1,
        "log_every_steps": 1,
        "save_every_minutes": 0.0,
        "augment": Augment(flip_prob=0.3, blur_prob=0.3, downscale_prob=0.3),
        "captions": Captions(tag_dropout=0.3, templates=("an icon of {}", "{}")),
        "optim": Optim(lr=1e-3, warmup_fraction=0.2),
    }
    return Recipe(model, str(data), str(run), **(options | changes))


def flags(plan: Recipe, file: Path) -> list[str]:
    """The arguments of `call` that train `plan`, which is written to `file`."""
    file.write_text(to_yaml(plan))
    return ["train", str(file)]


def no_validation(clip, world) -> dict[str, float]:
    """As validator() gives where shards have no val split."""
    return {}


def trained(plan: Recipe, validate: Validate | None = None) -> Run:
    """The finished run of `plan`, trained in this process.

    Args:
        validate: None for that of eval, as `python -m train` has it.
    """
    run = fit(plan, World(), validate or validator(plan, World()))
    assert run.is_finished
    return run


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def nonfinite_steps(run: Path) -> list[dict]:
    """The lines of nonfinite_steps.jsonl."""
    return [json.loads(line) for line in (run / "nonfinite_steps.jsonl").read_text().splitlines()]


def checkpoint(run: Path, samples: int) -> Path:
    """The folder of the checkpoint after `samples` pairs."""
    return run / "checkpoints" / f"samples-{samples:012d}"


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint."""
    return max((run / "checkpoints").glob("samples-*"))


def exported(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint exports."""
    return load_file(checkpoint / WEIGHTS)


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def assert_equal_weights(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def assert_bit_equal(run: Path, other: Path) -> None:
    """Two runs end with the same weights, moments, log and best checkpoint."""
    assert newest(run).name == newest(other).name
    assert sha256_of(newest(run) / WEIGHTS) == sha256_of(newest(other) / WEIGHTS)
    moments, others = (torch.load(newest(path) / "optimizer.pt", weights_only=True) for path in (run, other))
    assert moments["param_groups"] == others["param_groups"]
    assert moments["state"].keys() == others["state"].keys()
    for number, values in moments["state"].items():
        assert_equal_weights(values, others["state"][number])
    assert metrics(run) == metrics(other)
    assert (run / "checkpoints" / "best").readlink() == (other / "checkpoints" / "best").readlink()


def poison(monkeypatch, is_bad: Callable[[int], bool]) -> None:
    """Make the gradient infinite in the steps for which `is_bad(pairs seen before the step)`."""
    real = train.step.backward

    def poisoned(state, batch):
        loss = real(state, batch)
        if is_bad(state.samples):
            state.clip.towers.model.visual.proj.grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(train.step, "backward", poisoned)
