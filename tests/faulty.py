"""python -m train with a fault in it, for test_bad_steps.py: the last rank's gradient is not finite at the
steps of BAD_STEPS.

BAD_STEPS="96 120" python tests/faulty.py RECIPE.yaml: the steps that begin after 96 and after 120 pairs.
"""

import os

import train.loop
from data_prep.errors import exit_on_user_error
from train.__main__ import main

BAD_STEPS = {int(samples) for samples in os.environ["BAD_STEPS"].split()}
honest = train.loop.backward


def poisoned(towers, batch, micro_batch_size, world, seed, samples, loss):
    if samples in BAD_STEPS and world.rank == world.world_size - 1:
        parameter = getattr(towers, "module", towers).model.logit_scale
        hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return honest(towers, batch, micro_batch_size, world, seed, samples, loss)
        finally:
            hook.remove()
    return honest(towers, batch, micro_batch_size, world, seed, samples, loss)


if __name__ == "__main__":
    train.loop.backward = poisoned
    exit_on_user_error(main)
