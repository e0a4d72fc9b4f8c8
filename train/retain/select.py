"""Which weights a run gives away: those in training, their moving average, or a mixture with the model that
it began with.

after each epoch   candidates -> each validated -> the best of them -> open_clip_model.safetensors, the weights to use
                   training.safetensors, ema.safetensors, where these are others: what to go on from
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn

from data_prep.errors import UserError
from train.model.clip import CONFIG_FILE, WEIGHTS_FILE, Clip
from train.model.lora import ROWS, merged
from train.recipe import Recipe
from train.world import World

State = dict[str, torch.Tensor]
Validate = Callable[[Clip, World], dict[str, float]]
TRAINED, EMA = "trained", "ema"
FILES = {TRAINED: "training.safetensors", EMA: "ema.safetensors"}
CONTROL = "retention/mean/R@1"
LOWER_IS_BETTER = ("mean_rank", "median_rank", "tied", "R@1_gap")


class Score(NamedTuple):
    """What candidates are compared by, from left to right.

    Attributes:
        keeps: whether the control score is at most `max_retention_drop` below the base's; always, where there is no
            control set.
        value: of the metric `best_metric`, negative where lower is better; of weights that do not keep, the
            control score.
    """

    keeps: bool
    value: float


NO_SCORE = Score(False, float("-inf"))


class Selection(NamedTuple):
    """Which weights are to be used, and their score if they were validated."""

    weights: str = TRAINED
    score: Score | None = None


class WeightSelector:
    """The candidates of one run: "trained", "ema" and "wise_ft 0.50", which is a mixture of the average where
    there is one.

    Attributes:
        kept: all weights that a run goes on from, as one module.
        base_control: the control score of the model that the run began with.
    """

    def __init__(self, clip: Clip, recipe: Recipe):
        """Args:
        clip: on its device, as it was before training; both the average and the mixtures begin with it.
        """
        self.clip, self.recipe, self.model = clip, recipe, clip.towers.model
        # foreach=False: that one takes a weight which is still on its way on the device; see after_step().
        self.ema = ModelEmaV3(self.model, recipe.ema, use_warmup=True, foreach=False) if recipe.ema else None
        self.shares = {f"wise_ft {share:.2f}": share for share in recipe.wise_ft}
        # Without LoRA's A: a part of B A is a part of B times the A that it was trained with.
        before = {name: tensor for name, tensor in self.model.state_dict().items() if not name.endswith(ROWS)}
        self.base = (
            {name: tensor.to("cpu", copy=True) for name, tensor in before.items()} if self.shares else {}
        )
        self.kept = nn.ModuleDict({TRAINED: self.model} | ({EMA: self.ema.module} if self.ema else {}))
        self.base_control: float | None = None

    @torch.no_grad()
    def after_step(self, step: int, left_out: torch.Tensor) -> None:
        """Move the average towards the weights after step `step` (from 1), by nothing where the step was left
        out.

        Args:
            left_out: fp32 [], not 0 for a bad step (train.run.nonfinite); it stays on the device.
        """
        if self.ema:
            self.ema.apply_update_(self.model, torch.where(left_out.bool(), 1.0, self.ema.get_decay(step)))

    def baseline(self, validate: Validate, world: World) -> dict[str, float]:
        """Validate the model before training.

        Raises:
            UserError: there is nothing to choose by.
        """
        metrics = validate(self.clip, world)
        check_best_metric(self.recipe, metrics)
        self.base_control = metrics.get(CONTROL)
        return metrics

    def validate(self, validate: Validate, world: World) -> tuple[dict[str, float], Selection]:
        """Validate all candidates; the weights in training are then what they were, bit for bit.

        Returns:
            Metrics: val/mean/R@1 of the weights in training, ema/val/mean/R@1, wise_ft-0.50/val/mean/R@1; and
                the best candidate,
            of equals the first.
        """
        metrics = validate(self.clip, world)
        best = Selection(TRAINED, self.score(metrics))
        if others := [*([EMA] if self.ema else []), *self.shares]:
            trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            ema = self.ema.module.state_dict() if self.ema else {}
            for name in others:
                put(self.model, self.weights(name, trained, ema))
                found = validate(self.clip, world)
                metrics |= {prefix(name) + metric: value for metric, value in found.items()}
                if (score := self.score(found)) and score > best.score:
                    best = Selection(name, score)
            put(self.model, trained)
        return metrics, best

    def score(self, metrics: dict[str, float]) -> Score | None:
        if self.recipe.best_metric not in metrics:
            return None
        if (
            self.base_control is not None
            and self.base_control - metrics[CONTROL] > self.recipe.max_retention_drop + 1e-9
        ):
            return Score(False, metrics[CONTROL])
        value = metrics[self.recipe.best_metric]
        return Score(True, -value if self.recipe.best_metric.endswith(LOWER_IS_BETTER) else value)

    def weights(self, name: str, trained: State, ema: State) -> State:
        """The candidate `name` of these weights in training and this average."""
        if name in self.shares:
            return mixture(self.base, ema or trained, self.shares[name])
        return {TRAINED: trained, EMA: ema}[name]

    def enough(self, best: Score, best_samples: int, samples: int, samples_per_epoch: int) -> str:
        """Why the run should end here though its epochs are not over, or nothing; a function of what a
        checkpoint holds.
        """
        patience = self.recipe.patience_epochs
        if not patience or best == NO_SCORE or samples - best_samples < patience * samples_per_epoch:
            return ""
        return f"no new best in {patience} epochs (patience_epochs)"

    def save(self, folder: Path, kept: State, chosen: str) -> None:
        """Write the candidate `chosen` as a model, and beside it what training goes on from.

        Args:
            kept: what kept.state_dict() was.
        """
        states = {name: part(kept, name) for name in (TRAINED, EMA)}
        self.clip.save(folder, torch.float32, merged(self.weights(chosen, states[TRAINED], states[EMA])))
        for name, state in states.items():
            if state and (name != chosen or self.recipe.lora_rank):
                save_file(self.clip.weights(torch.float32, state), folder / FILES[name])
                shutil.copymode(
                    folder / CONFIG_FILE, folder / FILES[name]
                )  # safetensors writes for its user alone

    def restore(self, folder: Path) -> None:
        """Go on from what save() wrote."""
        for name, module in self.kept.items():
            file = folder / FILES[name]
            module.load_state_dict(load_file(file if file.is_file() else folder / WEIGHTS_FILE))
        self.base_control = json.loads((folder / "state.json").read_text()).get("base_control")


def check_best_metric(recipe: Recipe, metrics: Iterable[str]) -> None:
    """Refuse to choose by what no validation finds.

    Args:
        metrics: names of what one finds; none where shards have no val split.
    """
    if recipe.best_metric in metrics:
        return
    if names := ", ".join(metrics):
        raise UserError(
            f"--best_metric {recipe.best_metric}: no metric of this run's validation; it can be {names}"
        )
    if (
        recipe.ema
        or recipe.wise_ft
        or recipe.patience_epochs
        or recipe.retention_set
        or recipe.best_metric != Recipe.best_metric
    ):
        raise UserError(
            f"{recipe.data}: has no val split, and --ema, --wise_ft, --patience_epochs, --retention_set and"
            " --best_metric choose by that; leave them out, or build shards with one: python -m data_prep build"
            " ... --val 0.1"
        )


def mixture(base: State, tuned: State, share: float) -> State:
    """(1 - share) * base + share * tuned, in fp32; what is no floating-point number, or not in `base`, is
    that of `tuned`.

    WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903, section 3): often better than either, on their data and
    on other."""
    mixed = dict(tuned)
    for name, tensor in tuned.items():
        if name in base and tensor.is_floating_point():
            mixed[name] = torch.lerp(base[name].to(tensor.device).float(), tensor.float(), share)
    return mixed


@torch.no_grad()
def put(model: nn.Module, state: State) -> None:
    """Copy `state` into the parameters and buffers of a model, which stay the objects that DDP and compiled
    blocks know.
    """
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


def part(kept: State, name: str) -> State:
    """The entries of one module of WeightSelector.kept, with the names that it gives them."""
    return {
        key.removeprefix(f"{name}."): tensor for key, tensor in kept.items() if key.startswith(f"{name}.")
    }


def prefix(weights: str) -> str:
    """What stands before a candidate's metrics: "wise_ft 0.50" -> "wise_ft-0.50/"; nothing for the weights in
    training.
    """
    return "" if weights == TRAINED else f"{weights.replace(' ', '-')}/"
