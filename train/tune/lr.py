"""A learning rate for your data: a few short runs that differ in nothing else, and the rate to take.

  python -m train.lr train/recipes/icons.yaml --data SHARDS --out runs/lr
      a quarter of the recipe's epochs at a tenth, a third, once, three and ten times its rate; --optim.lr for
      the center
  ... --rates 1e-6 3e-6 1e-5 --part 0.5
      these rates, and half of the epochs; rates that were tried before with as many epochs count too

Each run has its whole warm-up and cosine, the same seed and data. The runs, their table and a plot (lr.png)
are in --out. The same command goes on, as `python -m train.sweep` does."""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data_prep.errors import NotFinite, UserError
from data_prep.shards import Shards
from train.bench.table import write_png
from train.recipe import Recipe, differences, parse
from train.tune.sweep import end, plan, train_all
from train.tune.table import CONTROL, SCORE, markdown, recipes_in, results, write

GRID = (0.1, 1 / 3, 1, 3, 10)


@dataclass(frozen=True)
class Search(Recipe):
    """A recipe, and the rates to try."""

    out: str = field(kw_only=True)
    """Folder for the runs, their table and the plot."""
    rates: tuple[float, ...] = ()
    """Peak learning rates; none is a tenth, a third, once, three and ten times optim.lr."""
    part: float = 0.25
    """Of the recipe's epochs, rounded; at least one."""
    nproc: int = 1
    """Processes of each run, one per GPU, as torchrun's --nproc_per_node."""


def main() -> None:
    words = sys.argv[1:]
    if not words:
        print(__doc__.strip())
        return
    settings = parse([*words, "--run", "unused"], Search)
    if not 0 < settings.part <= 1:
        raise UserError(
            f"--part {settings.part}: a part of the epochs is wanted, above 0, and 1 for all of them"
        )
    rates = settings.rates or [float(f"{settings.optim.lr * factor:.1e}") for factor in GRID]
    if len(set(rates)) < 2 or min(rates) <= 0:
        raise UserError(f"--rates {' '.join(map(str, rates))}: at least two are wanted, above 0")
    epochs = max(1, round(settings.part * settings.epochs))
    vary = [f"epochs={epochs}", f"optim.lr={','.join(f'{rate:g}' for rate in sorted(set(rates)))}"]
    search(
        Path(settings.out),
        plan([*words, "--run", "unused"], Search, vary, Path(settings.out)),
        settings.nproc,
    )


def search(folder: Path, recipes: dict[str, Recipe], nproc: int) -> None:
    """Train the runs that are not finished; print and write their table, the plot, and the rate to take.

    Args:
        recipes: by the names of their runs; they differ in optim.lr.

    Raises:
        UserError: there is no val split to judge by, or a run cannot begin.
        Fault: runs failed, and not because they diverged.
    """
    first = next(iter(recipes.values()))
    n = len(np.unique(Shards(first.data, "val").groups))
    failed, stopped = train_all(folder, recipes, nproc)
    known = {
        name: recipe
        for name, recipe in recipes_in(folder).items()
        if recipe and _is_comparable(recipe, first)
    } | recipes
    rows = results(folder, known, failed)
    text = markdown(rows)
    # A rate that diverges is a result, and no failure; where that was in the last steps, the run is over
    # without a validation.
    diverged = {name for name, code in failed.items() if code == NotFinite.exit_code}
    diverged |= {row["run"] for row in rows if row["state"] == "finished" and row["score"] is None}
    if over := [row for row in rows if row["state"] == "finished" and row["run"] not in diverged]:
        scores = {known[row["run"]].optim.lr: row["score"] for row in over}
        controls = {
            known[row["run"]].optim.lr: row["metrics"][CONTROL] for row in over if CONTROL in row["metrics"]
        }
        before = over[0]["before"][SCORE]
        rate, why = suggest(scores | {known[name].optim.lr: 0.0 for name in diverged}, before, n)
        if waiting := len(rows) - len(over) - len(diverged):
            why.append(f"{waiting} of {len(rows)} rates are not finished, and may change this.")
        write_png(folder / "lr.png", plot(scores, controls, before, rate, n))
        text += f"\n\n{' '.join(why)}\n\n    --optim.lr {rate:g}"
    print(text)
    write(folder, rows, text)
    end(folder, {name: code for name, code in failed.items() if name not in diverged}, stopped)


def _is_comparable(one: Recipe, other: Recipe) -> bool:
    return all(difference.startswith("optim.lr: ") for difference in differences(one, other))


def standard_error(score: float, n: int) -> float:
    """Of a share of `n` queries that stand for themselves: sqrt(p (1 - p) / n)."""
    return math.sqrt(score * (1 - score) / n)


def suggest(scores: dict[float, float], before: float, n: int) -> tuple[float, list[str]]:
    """The rate to take, and sentences that say why.

    It is the smallest in the row of rates that begins at the best one and goes down while the score stays
    within one standard error of the best (the rule of Breiman et al. 1984, section 3.4.3): where the figures
    cannot tell, less is forgotten at the smaller rate, and a whole run gives it more steps than this short
    one did.

    Args:
        scores: of each rate, in 0..1; 0 of one that diverged.
        before: the score of the weights before training.
        n: groups in the val split. The images of a group stand or fall together, so they count once; the
            rates are compared on the same images, so the error between them is smaller than this one.
    """
    rates = sorted(scores)
    best = max(rates, key=lambda rate: (scores[rate], -rate))
    error, chosen = standard_error(scores[best], n), best
    for rate in reversed(rates[: rates.index(best)]):
        if scores[best] - scores[rate] > error:
            break
        chosen = rate
    why = [
        f"The best by validation is {best:g}: mean R@1 {100 * scores[best]:.1f} %, ± {100 * error:.1f} for"
        f" {n} groups."
    ]
    if chosen != best:
        why.append(
            f"{chosen:g} is within that of it ({100 * scores[chosen]:.1f} %), and smaller rates forget less."
        )
    if best == rates[-1] and len(rates) > 1:
        why.append(
            f"{best:g} is the largest that was tried: try further, --rates {3 * best:.2g} {10 * best:.2g}."
        )
    if chosen == rates[0] and len(rates) > 1:
        why.append(
            f"{chosen:g} is the smallest that was tried: try further, --rates {chosen / 10:.2g}"
            f" {chosen / 3:.2g}."
        )
    if max(scores.values()) - min(scores.values()) <= error and len(rates) > 1:
        why.append(
            "All rates are within the error: this search cannot tell them apart; a larger --part, or more"
            " validation data, might."
        )
    if scores[best] <= before:
        why.append(
            f"None is better than the weights before training ({100 * before:.1f} %): a larger --part may"
            " show more."
        )
    return chosen, why


def plot(
    scores: dict[float, float], controls: dict[float, float], before: float, chosen: float, n: int
) -> Figure:
    """Mean R@1 over the rate, with its standard error; on the control set too, where there is one."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    rates = sorted(scores)
    errors = [100 * standard_error(scores[rate], n) for rate in rates]
    axis.errorbar(
        rates,
        [100 * scores[rate] for rate in rates],
        errors,
        marker="o",
        capsize=3,
        label="val, ± one standard error",
    )
    axis.axhline(100 * before, color="C0", linestyle="dotted", label="val before training")
    if controls:
        axis.plot(
            sorted(controls),
            [100 * controls[rate] for rate in sorted(controls)],
            marker="s",
            color="C1",
            label="control",
        )
    axis.axvline(chosen, color="gray", linestyle="dashed", label=f"--optim.lr {chosen:g}")
    axis.set_xscale("log")
    axis.set(xlabel="peak learning rate", ylabel="mean R@1 of both directions, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
