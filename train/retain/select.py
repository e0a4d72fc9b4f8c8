"""Which weights a checkpoint exports: trained, EMA or a WiSE-FT mixture.

after each epoch   candidates -> each validated -> the best one -> open_clip_model.safetensors, exported
                   training.safetensors, ema.safetensors, where these differ: what training resumes from
"""

import difflib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn

from data_prep.errors import UserError
from data_prep.shards import read_manifest
from data_prep.store.remote import place_of
from train.data.shares import first_of
from train.metrics import metric_of
from train.model.clip import CONFIG_FILE, WEIGHTS_FILE, Clip
from train.model.lora import ROWS, merged
from train.model.towers import Towers
from train.recipe import Recipe
from train.run.records import read_state
from train.world import World

State = dict[str, torch.Tensor]
Validate = Callable[[Clip, World], dict[str, float]]
TRAINED, EMA = "trained", "ema"
FILES = {TRAINED: "training.safetensors", EMA: "ema.safetensors"}
RETENTION = "retention/mean/R@1"


class Score(NamedTuple):
    """What candidates are compared by, from left to right.

    Attributes:
        retains: whether the retention score is at most `max_retention_drop` below the initial model's; always
            True without a retention set.
        value: of the metric `best_metric`, negated where lower is better; where `retains` is False, the
            retention score.
    """

    retains: bool
    value: float


NO_SCORE = Score(False, float("-inf"))


class Selection(NamedTuple):
    """Which weights are exported, and their score if they were validated."""

    weights: str = TRAINED
    score: Score | None = None


class Averages:
    """The tensors of an EMA and of its model, listed once: state_dict() takes milliseconds in each step."""

    def __init__(self, ema: nn.Module, model: nn.Module):
        pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self, weight: torch.Tensor) -> None:
        """Move each average by `weight`, fp32 [], of its distance to the model; counters are copied.

        timm's own foreach form copies the weight to the host, which would wait for the GPU in each step.
        """
        if self.averaged:
            averages, weights = zip(*self.averaged, strict=True)
            torch._foreach_lerp_(averages, weights, [weight] * len(averages))
        if self.copied:
            torch._foreach_copy_(*zip(*self.copied, strict=True))


class WeightSelector:
    """The candidates of one run: "trained", "ema" and "wise_ft 0.50", which mixes the EMA where there is one.

    Attributes:
        resumable: all weights that a run resumes from, as one module.
        initial_retention: the retention score of the initial model.
    """

    def __init__(self, clip: Clip, recipe: Recipe, base: Towers | None = None):
        """Args:
        clip: on its device, before training; the EMA starts from it.
        base: the frozen initial towers, needed for WiSE-FT.
        """
        self.clip, self.recipe, self.model = clip, recipe, clip.towers.model
        self.ema = ModelEmaV3(self.model, recipe.ema, use_warmup=True) if recipe.ema else None
        self.averages = Averages(self.ema.module, self.model) if self.ema else None
        self.alphas = {f"wise_ft {alpha:.2f}": alpha for alpha in recipe.wise_ft}
        initial = base.model.state_dict() if base and self.alphas else {}
        # Without LoRA's A: mixing B and keeping A mixes the product B A itself.
        self.initial = {name: tensor for name, tensor in initial.items() if not name.endswith(ROWS)}
        self.resumable = nn.ModuleDict({TRAINED: self.model} | ({EMA: self.ema.module} if self.ema else {}))
        self.initial_retention: float | None = None

    @torch.no_grad()
    def after_step(self, step: int, found_inf: torch.Tensor) -> None:
        """Update the EMA after step `step` (from 1).

        Args:
            found_inf: fp32 [], 1 where the step was skipped; then the EMA stays. It stays on the device.
        """
        if self.averages:
            self.averages.update(1.0 - torch.where(found_inf.bool(), 1.0, self.ema.get_decay(step)))

    def baseline(self, validate: Validate, world: World) -> dict[str, float]:
        """Validate the initial model.

        Raises:
            UserError: best_metric is not among its metrics.
        """
        metrics = validate(self.clip, world)
        check_best_metric(self.recipe, metrics)
        self.initial_retention = metrics.get(RETENTION)
        return metrics

    def validate(self, validate: Validate, world: World) -> tuple[dict[str, float], Selection]:
        """Validate all candidates; afterwards the weights in training are what they were, bit for bit.

        Returns:
            Metrics (val/mean/R@1 of the trained weights, ema/val/mean/R@1, wise_ft-0.50/val/mean/R@1), and
            the best candidate; of equal ones the first.
        """
        metrics = validate(self.clip, world)
        best = Selection(TRAINED, self.score(metrics))
        if candidates := [*([EMA] if self.ema else []), *self.alphas]:
            trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            ema = self.ema.module.state_dict() if self.ema else {}
            for name in candidates:
                copy_state_(self.model, self.weights(name, trained, ema))
                candidate_metrics = validate(self.clip, world)
                metrics |= {prefix(name) + metric: value for metric, value in candidate_metrics.items()}
                if (score := self.score(candidate_metrics)) and score > best.score:
                    best = Selection(name, score)
            copy_state_(self.model, trained)
        return metrics, best

    def score(self, metrics: dict[str, float]) -> Score | None:
        """The score of a candidate by its metrics; None where shards have no val split."""
        if self.recipe.best_metric not in metrics:
            return None
        if self.initial_retention is not None:
            drop = self.initial_retention - metrics[RETENTION]
            if drop > self.recipe.max_retention_drop + 1e-9:
                return Score(False, metrics[RETENTION])
        value = metrics[self.recipe.best_metric]
        return Score(True, value if metric_of(self.recipe.best_metric).higher_is_better else -value)

    def weights(self, name: str, trained: State, ema: State) -> State:
        """The weights of the candidate `name`."""
        if name in self.alphas:
            return wise_ft(self.initial, ema or trained, self.alphas[name])
        return {TRAINED: trained, EMA: ema}[name]

    def save(self, folder: Path, resumable: State, selected: str) -> None:
        """Write the candidate `selected` as a model, and beside it what training resumes from.

        Args:
            resumable: a copy of resumable.state_dict().
        """
        states = {name: substate(resumable, name) for name in (TRAINED, EMA)}
        exported = merged(self.weights(selected, states[TRAINED], states[EMA]))
        self.clip.save(folder, torch.float32, exported)
        for name, state in states.items():
            if state and (name != selected or self.recipe.lora_rank):
                save_file(self.clip.weights(torch.float32, state), folder / FILES[name])
                # safetensors makes files that only their owner can read.
                shutil.copymode(folder / CONFIG_FILE, folder / FILES[name])

    def restore(self, folder: Path) -> None:
        """Load what save() wrote."""
        for name, module in self.resumable.items():
            file = folder / FILES[name]
            module.load_state_dict(load_file(file if file.is_file() else folder / WEIGHTS_FILE))
        self.initial_retention = read_state(folder).get("initial_retention")


def check_best_metric(recipe: Recipe, metrics: Iterable[str]) -> None:
    """Check that best_metric is computed, and that nothing depends on a validation that does not exist.

    Args:
        metrics: names of what a validation computes; none where shards have no val split.

    Raises:
        UserError: not so.
    """
    if recipe.best_metric in metrics:
        return
    if names := ", ".join(metrics):
        near = difflib.get_close_matches(recipe.best_metric, metrics, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid: {names}"
        raise UserError(f"--best-metric {recipe.best_metric}: not a metric of this run's validation; {hint}")
    if recipe.ema or recipe.wise_ft or recipe.retention_set or recipe.best_metric != Recipe.best_metric:
        raise UserError(
            f"{first_of(recipe.data)}: has no val split, which --ema, --wise-ft, --retention-set and"
            " --best-metric need; leave them out, or build shards with one: python -m data_prep build ..."
            " --val 0.1"
        )


def check_retention(recipe: Recipe) -> None:
    """Check that the retention set has a split that can be scored: val, or else test.

    Raises:
        UserError: it has not, or is no folder of shards.
    """
    if not recipe.retention_set:
        return
    try:
        splits = read_manifest(place_of(recipe.retention_set))["splits"]
    except UserError as error:
        raise type(error)(f"--retention-set {error}") from None  # a store that is down is a Fault
    if not any(splits.get(split, {}).get("samples") for split in ("val", "test")):
        raise UserError(
            f"--retention-set {recipe.retention_set}: has no images in the splits val and test, one of which"
            " is scored; build the shards with one: python -m data_prep build ... --val 0.1"
        )


def wise_ft(initial: State, tuned: State, alpha: float) -> State:
    """(1 - alpha) * initial + alpha * tuned, in fp32 (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903,
    section 3).

    Non-float tensors and keys missing from `initial` are taken from `tuned`.
    """
    mixed = dict(tuned)
    for name, tensor in tuned.items():
        if name in initial and tensor.is_floating_point():
            mixed[name] = torch.lerp(initial[name].to(tensor.device).float(), tensor.float(), alpha)
    return mixed


@torch.no_grad()
def copy_state_(model: nn.Module, state: State) -> None:
    """Copy `state` into a model's parameters and buffers in place: DDP and compiled blocks hold these
    tensors.
    """
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


def substate(state: State, name: str) -> State:
    """The entries of one submodule, without its name: {"ema.x": t} -> {"x": t} for "ema"."""
    return {
        key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")
    }


def prefix(weights: str) -> str:
    """The prefix of a candidate's metrics: "wise_ft 0.50" -> "wise_ft-0.50/"; "" for trained weights."""
    return "" if weights == TRAINED else f"{weights.replace(' ', '-')}/"
