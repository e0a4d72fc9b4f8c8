"""fit(): a recipe and shards become a run. Read this first.

    samples -> batch -> features -> loss -> gradients -> weights, and after each epoch: validation ->
    checkpoint

`samples`, the pairs seen so far, is the only state beside the weights, their EMA and the optimizer's moments:
data order, captions, augmentation, dropout and learning rate are functions of (seed, samples).
"""

from typing import NamedTuple

from train.determinism import explained
from train.device import out_of_memory_advice
from train.model.activation_memory import less_memory
from train.recipe import Recipe
from train.retain.select import Selection, Validate, prefix
from train.run.folder import Run
from train.run.logger import Logger
from train.run.stop import Stop
from train.setup import setup
from train.step import TrainState, train_step
from train.world import World

FINISHED, STOPPED, ROLLED_BACK = "finished", "stopped", "rolled back"


class Outcome(NamedTuple):
    """How train() ended, after how many pairs, and for a stop by what: "file" or "signal"."""

    state: str
    samples: int
    requested_by: str = ""


def fit(recipe: Recipe, world: World, validate: Validate) -> Run:
    """Train, or resume the unfinished run in `recipe.run`.

    Args:
        validate: metrics of a model, the same on every rank; `best_metric` among them, or none at all.

    Raises:
        UserError: the shards, the model or the run folder do not fit the recipe; nothing was trained or
            written. Or an allocation failed.
        NotFinite: too many consecutive steps had a non-finite loss or gradient; none of them changed the
            weights.
        Fault, Fenced: the machine failed, or another attempt has taken over; the last checkpoint is whole.
    """
    while True:
        run = world.all_or_raise(lambda: Run(recipe, world))
        if run.is_finished:
            return run
        with explained():
            outcome = train(setup(recipe, run, world), run, validate)
        run.end(outcome.state, outcome.samples, outcome.requested_by)
        if outcome.state != ROLLED_BACK:
            return run


def train(state: TrainState, run: Run, validate: Validate) -> Outcome:
    """Take steps until the run is finished, asked to stop, or must roll back. All ranks return the same."""
    recipe, world, selector = state.recipe, state.world, state.selector
    run.start(state)
    advice = less_memory(state.activation_checkpointing, state.micro_batch_size)
    with out_of_memory_advice(advice), Logger(run, state) as log, Stop(run.stop_file) as stop, run:
        if state.samples:
            log.say(f"resuming after {state.samples} pairs from {run.checkpoint}")
        else:
            log.validation(selector.baseline(validate, world))
        state.towers.train()
        for batch in log.timed(state.batches):
            log.step(train_step(state, batch))

            epoch_ends = state.samples % state.order.samples_per_epoch == 0
            flags = stop.requested(), run.save_is_due, stop.file.exists(), bool(state.skipped)
            stopping, saving, by_file, skipping = world.any(*flags)
            if skipping:
                log.damaged(state.skipped)
            due = epoch_ends or stopping or saving
            if due or log.is_due:
                log.nonfinite(state.guard.flush())
            if state.guard.consecutive >= recipe.max_nonfinite_steps and not stopping:
                run.roll_back(state)
                return Outcome(ROLLED_BACK, state.samples)
            if due:
                metrics, selection = selector.validate(validate, world) if epoch_ends else ({}, Selection())
                log.validation(metrics, prefix(selection.weights))
                log.sync()  # before the checkpoint: a resumed run keeps the lines up to it
                run.save(state, selection)
                state.towers.train()
            if stopping and state.samples < state.end:
                return Outcome(STOPPED, state.samples, "file" if by_file else "signal")
    return Outcome(FINISHED, state.samples)
