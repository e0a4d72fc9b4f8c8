"""fit(): a recipe and shards become a run. Read this first.

    samples -> batch -> features -> loss -> gradients -> weights, and after each epoch: validation ->
    checkpoint

`samples`, the pairs seen so far, is the only state beside weights, their average and moments: data order,
captions, augmentation, dropout and learning rate are functions of (seed, samples)."""

import time

import torch

from data_prep.errors import UserError
from data_prep.shards import Shards
from train.data.loader import Batch, TrainPairs, train_loader
from train.data.order import Order
from train.loss import loss_of, train_logit_bias
from train.model.activation_memory import apply_checkpointing, fit_micro_batch, should_compile
from train.model.clip import Clip, clamp_logit_scale, load
from train.model.layers import lock
from train.model.lora import adapt
from train.model.patch_dropout import drop, install
from train.optim import build_optimizer, lr_at, set_lr
from train.recipe import Recipe
from train.retain.l2sp import L2SP
from train.retain.replay import Replay, replay_pairs
from train.retain.select import Selection, Validate, WeightSelector, prefix
from train.run.folder import Run
from train.run.logger import Logger
from train.run.nonfinite import NonFiniteGuard
from train.run.stop import Stop
from train.step import backward
from train.world import World


def fit(recipe: Recipe, world: World, validate: Validate) -> Run:
    """Train, or go on where the run in `recipe.run` was left.

    Args:
        validate: gives metrics of a model, the same on every rank; `best_metric` among them, or none at all.

    Raises:
        UserError: the shards, the model or the run folder do not fit the recipe; nothing was trained or
            written.
        NotFinite: too many steps in a row had a loss or gradient that is not; none reached the weights.
        Fault, Fenced: the machine failed, or another attempt has taken over; the last whole checkpoint is
            safe.
    """
    run = world.all_or_raise(lambda: Run(recipe, world))
    if run.is_finished:
        return run
    pairs, to_replay, clip = world.all_or_raise(lambda: prepare(recipe, run))
    order = Order(
        pairs.shard_sizes,
        recipe.global_batch_size,
        recipe.seed,
        pairs.groups if recipe.spread_mates else None,
    )
    steps, end = recipe.epochs * order.steps_per_epoch, recipe.epochs * order.samples_per_epoch
    clip.towers.bf16 = recipe.precision == "bf16"
    clip.towers.to(world.device)
    choice = WeightSelector(clip, recipe)
    anchor = L2SP(
        clip.towers, recipe.l2_sp
    )  # while the weights are those of the base, and before fit_micro_batch() counts memory
    replay = Replay(to_replay, clip, recipe, world, run.samples, end) if to_replay else None
    memory, micro_batch_size = fit_micro_batch(clip.towers, recipe, world)
    apply_checkpointing(clip.towers.model, memory, should_compile(recipe, world.device))
    optimizer = world.all_or_raise(lambda: build_optimizer(clip.towers, recipe.optim))
    run.restore(choice, optimizer)
    chunked = micro_batch_size * world.world_size < recipe.global_batch_size or replay is not None
    towers = wrap_ddp(clip.towers, world, chunked, recipe.compress_gradients)

    data = TrainPairs(pairs, order, clip.image_size, recipe.augment, recipe.captions)
    batches = train_loader(data, clip.tokenize, run.samples, end, world, recipe.workers)
    samples, saved_at = run.samples, time.monotonic()
    run.start(choice, optimizer)
    enough = choice.enough(run.best, run.best_samples, samples, order.samples_per_epoch)

    rolled_back, log = False, Logger(run, samples, end, order.samples_per_epoch, world)
    bad = NonFiniteGuard(
        run.folder,
        samples,
        lambda start: [
            pairs.key(order.sample_at(at)) for at in range(start, start + recipe.global_batch_size)
        ],
        world,
    )
    with log, bad, Stop(run.stop_file) as stop, run:
        log.say(
            f"{recipe.model} on {len(pairs)} images, {world.world_size} x {world.device.type}: {steps} steps"
            f" of {recipe.global_batch_size} pairs"
        )
        log.say(
            f"memory: {memory}, micro_batch_size: {micro_batch_size},"
            f" {'compiled' if should_compile(recipe, world.device) else 'not compiled'}"
        )
        if samples:
            log.say(f"going on after {samples} pairs, from {run.checkpoint}")
        else:
            log.validation(samples, choice.baseline(validate, world))
        towers.train()
        started = time.perf_counter()
        for batch in () if enough else batches:
            data_s = time.perf_counter() - started
            if recipe.patch_dropout:
                drop(clip.towers.model.visual, recipe.patch_dropout, samples / end)
            lr = lr_at(samples // recipe.global_batch_size, steps, recipe.optim)
            set_lr(optimizer, lr)
            values = {"train/lr": lr}
            if replay:
                values["train/replay_loss"] = (
                    world.sum(replay.backward(towers, micro_batch_size)) / world.world_size
                )
            batch = Batch(*(tensor.to(world.device, non_blocking=True) for tensor in batch))
            loss = backward(towers, batch, micro_batch_size, world, recipe.seed, samples, loss_of(recipe))
            loss = world.sum(loss) / world.world_size
            grad_norm = torch.nn.utils.clip_grad_norm_(clip.towers.parameters(), recipe.optim.max_grad_norm)
            bad.judge(optimizer, samples, loss, grad_norm)
            run.writer.wait_for_snapshot()
            optimizer.step()
            anchor.pull(optimizer)
            optimizer.zero_grad()
            if recipe.loss == "clip":  # SigLIP's are above 100 from the start
                clamp_logit_scale(clip.towers)
            samples += recipe.global_batch_size
            choice.after_step(samples // recipe.global_batch_size, optimizer.found_inf)
            values |= {
                "train/grad_norm": grad_norm,
                "train/logit_scale": clip.towers.model.logit_scale.detach().exp(),
            }
            log.step(samples, recipe.global_batch_size, loss, values, data_s, time.perf_counter() - started)

            epoch_ends = samples % order.samples_per_epoch == 0
            save_is_due = run.has_failed or time.monotonic() - saved_at > 60 * recipe.save_every_minutes
            stopping, saving, by_file = world.any(stop.asked(), save_is_due, stop.file.exists())
            is_due = epoch_ends or stopping or saving
            n_bad = bad.look() if is_due or log.is_due(samples, recipe.global_batch_size) else 0
            if n_bad >= recipe.max_nonfinite_steps and not stopping:
                run.roll_back(samples, n_bad)
                rolled_back = True
                break
            if is_due:
                metrics, pick = choice.validate(validate, world) if epoch_ends else ({}, Selection())
                log.validation(samples, metrics, prefix(pick.weights))
                log.sync()
                run.save(choice, optimizer, samples, pick)
                enough = choice.enough(run.best, run.best_samples, samples, order.samples_per_epoch)
                saved_at = time.monotonic()
                towers.train()
            if enough:
                log.say(f"the run ends here: {enough}")
            if stopping or enough:
                break
            started = time.perf_counter()
    if rolled_back:
        run.close()
        del (
            clip,
            choice,
            towers,
            optimizer,
            anchor,
            replay,
            batches,
            batch,
        )  # or memory would have to hold two of each
        return fit(recipe, world, validate)
    if samples == end or enough:
        run.finish("finished", samples, **({"reason": enough} if enough else {}))
    else:
        run.finish("stopped", samples, asked_by="file" if by_file else "signal")
    return run


def prepare(recipe: Recipe, run: Run) -> tuple[Shards, Shards | None, Clip]:
    """The training pairs and those to replay, their bytes verified (each rank its part), and the model as it
    was before training.
    """
    pairs = Shards(recipe.data, "train")
    run.check_data(pairs.fingerprint)
    check_batch(recipe, len(pairs), run.world)
    to_replay = replay_pairs(recipe, run.world)
    run.check_data(to_replay and to_replay.fingerprint, "replay")
    pairs.verify(run.world.rank, run.world.world_size)
    clip = load(recipe.model, seed=recipe.seed)
    if to_replay or recipe.l2_sp:
        run.check_data(clip.fingerprint(), "model")
    if recipe.lora_rank:
        adapt(clip.towers, recipe.lora_rank, recipe.seed)
    lock(clip.towers, recipe.lock)
    train_logit_bias(clip, recipe.loss)
    if recipe.patch_dropout:
        install(clip.towers.model.visual)
    return pairs, to_replay, clip


def check_batch(recipe: Recipe, n_pairs: int, world: World) -> None:
    """Refuse a batch that the data cannot fill or the ranks cannot share."""
    if recipe.global_batch_size > n_pairs:
        raise UserError(
            f"{recipe.data}: {n_pairs} training images are fewer than one batch of {recipe.global_batch_size}; pass a"
            " smaller --global_batch_size"
        )
    if recipe.global_batch_size % world.world_size:
        fitting = recipe.global_batch_size - recipe.global_batch_size % world.world_size
        raise UserError(
            f"--global_batch_size {recipe.global_batch_size} cannot be shared evenly by {world.world_size} ranks; pass --global_batch_size"
            f" {fitting or world.world_size}"
        )
