"""setup(): a recipe becomes a TrainState, new or resumed. The order of what happens here matters; comments
say why.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.store.cache import choose, chosen
from train.data.augment import Augmentation
from train.data.loader import TrainPairs, train_loader
from train.data.order import WINDOW_SHARDS
from train.data.sets import DataSets, check_val, open_pairs, order_of
from train.determinism import compile_first, set_deterministic
from train.device import use_bf16
from train.loss import loss_of, train_logit_bias
from train.model.activation_memory import apply_checkpointing, fit_micro_batch, should_compile
from train.model.clip import Clip, load
from train.model.lora import adapt
from train.model.patch_dropout import PatchDropout
from train.model.unused import freeze_unused
from train.optim import build_optimizer
from train.recipe import OWN, SKIP, Recipe
from train.retain.base import frozen_copy
from train.retain.l2sp import L2SP
from train.retain.replay import Replay, check_replay, read_texts
from train.retain.select import WeightSelector
from train.run.folder import Run
from train.run.nonfinite import NonFiniteGuard
from train.run.trackers import check_installed
from train.step import TrainState
from train.world import World


def setup(recipe: Recipe, run: Run | None, world: World) -> TrainState:
    """The state in which training begins, or in which the run's last checkpoint left it.

    Args:
        run: the opened run; None for measurements: random weights, unverified shards, nothing restored.

    Raises:
        UserError: shards, model or run do not fit the recipe; the same on all ranks.
    """
    set_deterministic(recipe.deterministic)  # before the first product
    inputs = world.all_or_raise(lambda: prepare(recipe, run, world))
    pairs, clip = inputs.pairs, inputs.clip
    order = order_of(recipe, pairs)
    samples, end = run.samples if run else 0, recipe.epochs * order.samples_per_epoch
    clip.towers.bf16 = use_bf16(recipe.precision, world.device)
    clip.towers.to(world.device)
    freeze_unused(clip, world)  # before all that asks which parameters are trained
    # The copy of the initial weights comes before a checkpoint is restored and before blocks are compiled.
    # That, EMA and replay come before the micro batch is fitted, which measures what memory is left.
    base = frozen_copy(clip.towers, recipe, world.device)
    selector = WeightSelector(clip, recipe, base)
    l2_sp = L2SP(clip.towers, base, recipe.l2_sp) if recipe.l2_sp else None
    replayed, skipped = (inputs.replay_pairs, inputs.replay_texts), []
    replay = Replay(*replayed, base, clip, recipe, world, samples, end, skipped) if recipe.replay else None
    mode, micro_batch_size = fit_micro_batch(clip.towers, run.with_fitted(recipe) if run else recipe, world)
    apply_checkpointing(clip.towers.model, mode, should_compile(recipe, world.device))
    optimizer = world.all_or_raise(lambda: build_optimizer(clip.towers, recipe.optim))
    if run:
        run.restore(selector, optimizer)  # before DDP, which broadcasts the first rank's weights
    chunked = micro_batch_size * world.world_size < recipe.global_batch_size or replay is not None
    stream = pairs, order, clip.image_size, recipe.augment, recipe.captions, recipe.on_damage == SKIP
    train_pairs = TrainPairs(*stream)
    state = TrainState(
        recipe=recipe,
        world=world,
        clip=clip,
        towers=wrap_ddp(clip.towers, world, chunked),
        optimizer=optimizer,
        augmentation=Augmentation(recipe.augment),
        loss=loss_of(recipe),
        order=order,
        pairs=train_pairs,
        batches=train_loader(train_pairs, clip.tokenize, samples, end, world, recipe.workers, skipped),
        samples=samples,
        end=end,
        activation_checkpointing=mode,
        micro_batch_size=micro_batch_size,
        selector=selector,
        guard=NonFiniteGuard(),
        l2_sp=l2_sp,
        replay=replay,
        skipped=skipped,
    )
    if recipe.deterministic:
        compile_first(state)
    return state


class Inputs(NamedTuple):
    """What a run is made of, checked."""

    pairs: Shards | DataSets
    replay_pairs: Shards | None
    replay_texts: list[str]
    clip: Clip


def prepare(recipe: Recipe, run: Run | None, world: World) -> Inputs:
    """The training and replay pairs, and the initial model on the CPU.

    Ranks do not communicate here. Each rank verifies its part of the shards that have no hash per sample.

    Raises:
        UserError: the data, the model or what the run was started with do not fit.
    """
    choose(recipe.cache_dir, recipe.cache_gb)
    pairs = open_pairs(recipe)
    check_batch(recipe, len(pairs), world)
    check_groups(recipe, pairs)
    if not pairs.weight_range[1]:
        raise UserError(
            f"{pairs.folder}, {pairs.split}: all weights are 0, so there is nothing to learn; build with"
            " others"
        )
    is_own, replay_pairs = recipe.replay == OWN, None
    texts, texts_fingerprint = read_texts(recipe.replay_texts)
    if recipe.replay:
        replay_pairs = pairs if is_own else Shards(recipe.replay, "train")
        check_replay(recipe, len(replay_pairs), world)
    check_cache([pairs, *filter(None, [replay_pairs])])
    if run:
        check_val(pairs)
        check_installed(recipe.log)
        run.check_data(pairs.fingerprint)
        run.check_data(OWN if is_own else replay_pairs and replay_pairs.fingerprint, "replay")
        run.check_data(texts_fingerprint, "replay_texts")
        for shards in filter(None, dict.fromkeys((pairs, replay_pairs))):
            shards.verify(world.rank, world.world_size)
    clip = load(recipe.model, weights=run is not None, seed=recipe.seed)
    if run and (recipe.replay or recipe.l2_sp):  # these need the same initial weights after a resume
        run.check_data(clip.fingerprint(), "model")
    clip.config["preprocess_cfg"]["background"] = pairs.background
    if recipe.lora_rank:
        adapt(clip.towers, recipe.lora_rank, recipe.seed)
    clip.towers.lock(recipe.lock)  # after adapt(), so that adapters of a locked tower are locked too
    train_logit_bias(clip, recipe.loss)
    if recipe.patch_dropout:
        PatchDropout.install(clip.towers.model.visual)
    return Inputs(pairs, replay_pairs, texts, clip)


def check_cache(streams: Sequence[Shards | DataSets]) -> None:
    """Check that the cache holds what batches read at once, where shards are behind a URL.

    Args:
        streams: each has an order, and so a window, of its own.

    Raises:
        UserError: it does not.
    """
    needed = 0
    for part in itertools.chain(*(each.parts if isinstance(each, DataSets) else [each] for each in streams)):
        sizes = sorted((file.size for file in part.remote_files() if file), reverse=True)
        needed += sum(sizes[:WINDOW_SHARDS])
    cache = chosen()
    if needed > (limit := cache.limit()):
        raise UserError(
            f"--cache-gb {limit / 1e9:.3g}: batches read {WINDOW_SHARDS} shards of each data set at once,"
            f" and of replay's, here {needed / 1e9:.3g} GB; pass at least that, or twice it to fetch ahead,"
            " or --cache-dir on a larger disk"
        )


def check_batch(recipe: Recipe, n_pairs: int, world: World) -> None:
    """Check that the data fills a batch and that the ranks can share it.

    Raises:
        UserError: they cannot.
    """
    if recipe.global_batch_size > n_pairs:
        raise UserError(
            f"{recipe.data}: {n_pairs} training images are fewer than one batch of"
            f" {recipe.global_batch_size}; pass a smaller --global-batch-size"
        )
    if recipe.global_batch_size % world.world_size:
        fitting = recipe.global_batch_size - recipe.global_batch_size % world.world_size
        raise UserError(
            f"--global-batch-size {recipe.global_batch_size}: cannot be divided evenly among"
            f" {world.world_size} ranks; pass --global-batch-size {fitting or world.world_size}"
        )


def check_groups(recipe: Recipe, pairs: Shards | DataSets) -> None:
    """Check that there are negatives.

    Raises:
        UserError: all pairs share a group, and pairs of a group are positives.
    """
    if recipe.same_group == "positive" and len(np.unique(pairs.groups)) == 1:
        raise UserError(
            f"{pairs.folder}: all {len(pairs)} training images are of one group, so with --same-group"
            " positive every pair of a batch is a positive and nothing can be learned; pass --same-group"
            " negative, or build the shards with another --group-column"
        )


def wrap_ddp(towers: nn.Module, world: World, chunked: bool = False) -> nn.Module:
    """`towers` so that a backward pass leaves the mean gradient of all ranks.

    Args:
        chunked: whether a step has several backward passes, for which DDP's static graph cannot be used.
    """
    if world.world_size == 1:
        return towers
    wrapped = DistributedDataParallel(towers, static_graph=not chunked, gradient_as_bucket_view=True)
    # Other buffers are constants, equal on all ranks, and sending them costs a collective per forward. As an
    # attribute, because torch 2.14 warns of the argument, and 2.11 does not know its new name.
    wrapped.broadcast_buffers = any(isinstance(module, _BatchNorm) for module in towers.modules())
    return wrapped
