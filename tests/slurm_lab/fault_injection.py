"""`python -m train` with slower steps and with the faults that environment variables ask for; the drills
submit it in place of `train`.

LAB_STEP_S      seconds by which each step is slowed
LAB_SAVE_S      seconds by which a save is slowed while RUN/stop exists
LAB_NAN         samples seen before the steps whose gradient is NaN on the last rank: "320 960"
LAB_CRASH_STEP  the step, counted from the start of the process, before which it exits with CRASH_CODE
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train.loop
from data_prep.errors import exit_on_user_error
from train.__main__ import main
from train.model.clip import Clip

CRASH_CODE = 9


def faulty_step(train_step: Callable, environment: dict[str, str]) -> Callable:
    """A training step that does the same as `train_step`, with the faults that `environment` asks for."""
    step_s = float(environment.get("LAB_STEP_S", 0))
    crash_step = int(environment.get("LAB_CRASH_STEP", 0))
    nan_samples = {int(samples) for samples in environment.get("LAB_NAN", "").split()}
    n_steps = 0

    def step(state, batch):
        nonlocal n_steps
        n_steps += 1
        time.sleep(step_s)
        if n_steps == crash_step:
            os._exit(CRASH_CODE)
        is_last_rank = state.world.rank == state.world.world_size - 1
        if state.samples not in nan_samples or not is_last_rank:
            return train_step(state, batch)
        # A hook, so that this depends on nothing inside of the step but that it computes gradients.
        weight = next(weight for weight in state.towers.parameters() if weight.requires_grad)
        hook = weight.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        try:
            return train_step(state, batch)
        finally:
            hook.remove()

    return step


def slow_save(save: Callable, environment: dict[str, str], run: Path) -> Callable:
    """A save that takes LAB_SAVE_S seconds longer while the run is being stopped."""
    save_s = float(environment.get("LAB_SAVE_S", 0))

    def save_slowly(*arguments, **options):
        if (run / "stop").exists():
            time.sleep(save_s)
        return save(*arguments, **options)

    return save_slowly


def inject(environment: dict[str, str], run: Path) -> None:
    """Make training in this process use the faulty step and save."""
    train.loop.train_step = faulty_step(train.loop.train_step, environment)
    Clip.save = slow_save(Clip.save, environment, run)


if __name__ == "__main__":
    inject(dict(os.environ), Path(sys.argv[sys.argv.index("--run") + 1]))
    exit_on_user_error(main)
