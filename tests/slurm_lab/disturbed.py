"""`python -m train`, slower, and with faults that the environment asks for; what the drills submit in its
place.

LAB_STEP_S      seconds that each step takes longer
LAB_SAVE_S      seconds that a save takes longer while RUN/stop is there
LAB_NAN         pairs seen, after which a step's gradient is not a number: "320 960"
LAB_CRASH_STEP  the step, counted from the start of the process, at which it dies
"""

import os
import sys
import time
from pathlib import Path

import train.step
from data_prep.errors import exit_on_user_error
from train.model.clip import Clip


def disturb(environment: dict[str, str], run: Path) -> None:
    """Replace the step and the save by ones that do the same, and what `environment` says."""
    honest_step, honest_save, steps = train.step.backward, Clip.save, []
    step_s, save_s, crash_step = (
        float(environment.get(f"LAB_{name}", 0)) for name in ("STEP_S", "SAVE_S", "CRASH_STEP")
    )

    bad = {int(samples) for samples in environment.get("LAB_NAN", "").split()}

    def step(towers, *arguments):
        steps.append(time.sleep(step_s))
        if len(steps) == crash_step:
            os._exit(9)
        loss, samples = honest_step(towers, *arguments), arguments[-1]
        if samples in bad:
            next(towers.parameters()).grad.fill_(float("nan"))
        return loss

    def save(*arguments):
        if (run / "stop").exists():
            time.sleep(save_s)
        return honest_save(*arguments)

    train.step.backward, Clip.save = step, save


if __name__ == "__main__":
    disturb(dict(os.environ), Path(sys.argv[sys.argv.index("--run") + 1]))
    from train.__main__ import main  # after the change, or the loop has the honest step

    exit_on_user_error(main)
