"""fit(): a recipe and shards become a run. Read this first.

    samples -> batch -> features -> loss -> gradients -> weights, and after each epoch: validation -> checkpoint

`samples`, the pairs seen so far, is the only state beside weights and moments: data order, captions, augmentation,
dropout and learning rate are functions of (seed, samples).
"""

import time
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import NotFinite, UserError
from data_prep.shards import Shards
from train.augment import train_transform
from train.loader import Batch, TrainPairs, train_loader
from train.logbook import Logbook
from train.model import Clip, clamp_logit_scale, load
from train.optim import build_optimizer, lr_at
from train.order import Order
from train.recipe import Recipe
from train.run import Run
from train.step import backward
from train.stop import Stop
from train.world import World

Validate = Callable[[Clip, World], dict[str, float]]
SCORE = "val/mean/R@1"  # what the best checkpoint is the best by; the mean of both directions


def fit(recipe: Recipe, world: World, validate: Validate) -> Run:
    """Train, or go on where the run in `recipe.run` was left.

    Args:
        validate: gives metrics of a model, the same on every rank; SCORE among them, or nothing to choose by.

    Raises:
        UserError: the shards, the model or the run folder do not fit the recipe; nothing was trained or written.
        NotFinite: the gradient is not; it never reached the weights.
    """
    run = world.together(lambda: Run(recipe, world))
    if run.is_finished:
        return run
    pairs, clip = world.together(lambda: prepare(recipe, run))
    clip.towers.bf16 = recipe.precision == "bf16"
    clip.towers.model.set_grad_checkpointing(recipe.grad_checkpointing)
    clip.towers.to(world.device)
    optimizer = build_optimizer(clip.towers, recipe.optim)
    run.restore(clip, optimizer)
    towers = DistributedDataParallel(clip.towers) if world.world_size > 1 else clip.towers

    order = Order(pairs.shard_sizes, recipe.batch, recipe.seed)
    steps, end = recipe.epochs * order.steps_per_epoch, recipe.epochs * order.samples_per_epoch
    data = TrainPairs(pairs, order, train_transform(clip.image_size, recipe.augment))
    batches = train_loader(data, clip.tokenizer, run.samples, end, world, recipe.workers)
    samples, saved_at = run.samples, time.monotonic()
    run.start(pairs.fingerprint)

    with Logbook(run.folder, samples, end, order.samples_per_epoch, recipe.log_every_steps, world) as log, Stop(run.stop_file) as stop:
        log.say(f"{recipe.model} on {len(pairs)} images, {world.world_size} x {world.device.type}: {steps} steps of {recipe.batch} pairs")
        if samples:
            log.say(f"going on after {samples} pairs, from {run.checkpoint}")
        else:
            log.validation(samples, validate(clip, world))
        towers.train()
        started = time.perf_counter()
        for batch in batches:
            data_s = time.perf_counter() - started
            lr = lr_at(samples // recipe.batch, steps, recipe.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = Batch(*(tensor.to(world.device, non_blocking=True) for tensor in batch))
            loss = backward(towers, batch, recipe.micro_batch, world, recipe.seed, samples)
            grad_norm = torch.nn.utils.clip_grad_norm_(clip.towers.parameters(), recipe.optim.clip)
            if not torch.isfinite(grad_norm):  # of the reduced gradient, so all ranks see it together
                raise NotFinite(
                    f"the gradient after {samples} pairs is not finite; nothing was overwritten: the same command goes on "
                    f"from the last checkpoint, and if it happens again, --optim.lr {lr:.1e} is too high"
                )
            optimizer.step()
            optimizer.zero_grad()
            clamp_logit_scale(clip.towers)
            samples += recipe.batch
            values = {"train/lr": lr, "train/grad_norm": grad_norm, "train/logit_scale": clip.towers.model.logit_scale.detach().exp()}
            log.step(samples, recipe.batch, loss, values, data_s, time.perf_counter() - started)

            epoch_ends = samples % order.samples_per_epoch == 0
            save_is_due = time.monotonic() - saved_at > 60 * recipe.save_every_minutes
            stopping, saving = world.any(stop.asked(), save_is_due)
            if epoch_ends or stopping or saving:
                metrics = validate(clip, world) if epoch_ends else {}
                log.validation(samples, metrics)
                log.sync()
                run.save(clip, optimizer, samples, metrics.get(SCORE))
                saved_at = time.monotonic()
                towers.train()
            if stopping:
                break
            started = time.perf_counter()
    run.finish("finished" if samples == end else "stopped", samples)
    return run


def prepare(recipe: Recipe, run: Run) -> tuple[Shards, Clip]:
    """The training pairs, their bytes verified (each rank its part), and the model as it was before training."""
    pairs = Shards(recipe.data, "train")
    run.check_data(pairs.fingerprint)
    check_batch(recipe, len(pairs), run.world)
    pairs.verify(run.world.rank, run.world.world_size)
    return pairs, load(recipe.model, seed=recipe.seed)


def check_batch(recipe: Recipe, n_pairs: int, world: World) -> None:
    """Refuse a batch that the data cannot fill or the ranks cannot share."""
    if recipe.batch > n_pairs:
        raise UserError(f"{recipe.data}: {n_pairs} training images are fewer than one batch of {recipe.batch}; pass a smaller --batch")
    if recipe.batch % world.world_size:
        fitting = recipe.batch - recipe.batch % world.world_size
        raise UserError(
            f"--batch {recipe.batch} cannot be shared evenly by {world.world_size} ranks; pass --batch {fitting or world.world_size}"
        )
