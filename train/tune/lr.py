"""Search for a learning rate (train.lr): short runs, then a rate by the one-standard-error rule."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.atomic import atomic_file
from data_prep.errors import NotFinite
from data_prep.shards import Shards
from data_prep.tables import counted
from data_prep.terminal import say
from train.data.shares import first_of
from train.recipe import Recipe, differences
from train.retain.select import RETENTION
from train.tune.sweep import check_runs, report_rest, train_all
from train.tune.table import SCORE, markdown, recipes_in, results, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def find_rate(folder: Path, recipes: dict[str, Recipe], nproc: int) -> None:
    """Train the runs that are not finished; print and write their table, the plot and the rate to use.

    Args:
        recipes: by the names of their runs; they differ in optim.lr alone.

    Raises:
        UserError: there is no val split to compare on, or a run cannot start.
        Fault: runs failed for another reason than divergence.
    """
    first = next(iter(recipes.values()))
    n_groups = len(np.unique(Shards(first_of(first.data), "val").groups))
    failed, stopped = train_all(folder, recipes, check_runs(folder, recipes, nproc), nproc)
    known = {
        name: recipe
        for name, recipe in recipes_in(folder).items()
        if recipe and _is_comparable(recipe, first)
    } | recipes
    rows = results(folder, known, failed)
    diverged = {name for name, code in failed.items() if code == NotFinite.exit_code}
    # A run that diverges in its last steps finishes without a validation.
    diverged |= {row["run"] for row in rows if row["state"] == "finished" and row["score"] is None}
    finished = [row for row in rows if row["state"] == "finished" and row["run"] not in diverged]
    done = {row["run"] for row in finished} | diverged
    n_done = len(done & set(recipes))
    text = markdown(rows)
    if n_done < len(recipes):
        text += (
            f"\n\nThe search is unfinished: {n_done} of {len(recipes)} rates are trained. The same command"
            " resumes it and then recommends a rate."
        )
    elif not finished:
        text += "\n\nEvery rate diverged; try smaller ones with --rates."
    else:
        text += f"\n\n{_recommend(folder, finished, diverged, known, n_groups)}"
    say(text)
    write(folder, rows, text)
    report_rest(folder, {name: code for name, code in failed.items() if name not in diverged}, stopped)


def _recommend(
    folder: Path, finished: list[dict], diverged: set[str], recipes: dict[str, Recipe], n_groups: int
) -> str:
    """Draw lr.png; the reasons and the rate to use, as text."""
    rates = {name: recipe.optim.lr for name, recipe in recipes.items()}
    scores = {rates[row["run"]]: row["score"] for row in finished}
    retention = {
        rates[row["run"]]: row["metrics"][RETENTION] for row in finished if RETENTION in row["metrics"]
    }
    before = finished[0]["before"][SCORE]
    rate, reasons = suggest(scores | {rates[name]: 0.0 for name in diverged}, before, n_groups)
    with atomic_file(folder / "lr.png") as partial:
        plot(scores, retention, before, rate, n_groups).savefig(partial, format="png", dpi=150)
    return f"{' '.join(reasons)}\n\n    --optim.lr {rate:g}"


def _is_comparable(recipe: Recipe, reference: Recipe) -> bool:
    return all(difference.startswith("optim.lr: ") for difference in differences(recipe, reference))


def standard_error(score: float, n: int) -> float:
    """Standard error of a proportion over `n` independent queries: sqrt(p (1 - p) / n)."""
    return math.sqrt(score * (1 - score) / n)


def suggest(scores: dict[float, float], before: float, n_groups: int) -> tuple[float, list[str]]:
    """The rate to use, and the reasons as sentences.

    Starting from the best rate, go to smaller rates while the score stays within one standard error of the
    best (the one-standard-error rule, Breiman et al. 1984, section 3.4.3). Where scores cannot be told apart,
    the smaller rate forgets less, and the full run gives it more steps than the short one did.

    Args:
        scores: mean R@1 in 0..1 by rate; 0 for a rate that diverged.
        before: the score of the weights before training.
        n_groups: groups in the val split; queries of one group are correlated and count once. All rates are
            compared on the same images, so the true error of a difference is smaller.
    """
    rates = sorted(scores)
    best = max(rates, key=lambda rate: (scores[rate], -rate))
    error, chosen = standard_error(scores[best], n_groups), best
    for rate in reversed(rates[: rates.index(best)]):
        if scores[best] - scores[rate] > error:
            break
        chosen = rate
    reasons = [
        f"Best on val: {best:g}, mean R@1 {100 * scores[best]:.1f} % (standard error {100 * error:.1f},"
        f" {counted(n_groups, 'group')})."
    ]
    if chosen != best:
        reasons.append(
            f"{chosen:g} is within one standard error ({100 * scores[chosen]:.1f} %); the smaller rate"
            " forgets less."
        )
    if best == rates[-1] and len(rates) > 1:
        reasons.append(
            f"{best:g} is the largest rate tried; try larger ones: --rates {3 * best:.2g} {10 * best:.2g}."
        )
    if chosen == rates[0] and len(rates) > 1:
        reasons.append(
            f"{chosen:g} is the smallest rate tried; try smaller ones: --rates {chosen / 10:.2g}"
            f" {chosen / 3:.2g}."
        )
    if max(scores.values()) - min(scores.values()) <= error and len(rates) > 1:
        reasons.append(
            "All rates are within one standard error, so this search cannot rank them; use a larger"
            " --epochs-fraction or more validation data."
        )
    if scores[best] <= before:
        reasons.append(
            f"No rate is better than the weights before training ({100 * before:.1f} %); try a larger"
            " --epochs-fraction."
        )
    return chosen, reasons


def plot(
    scores: dict[float, float], retention: dict[float, float], before: float, chosen: float, n_groups: int
) -> "Figure":
    """Mean R@1 over the rate with its standard error, and on the retention set where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    rates = sorted(scores)
    axis.errorbar(
        rates,
        [100 * scores[rate] for rate in rates],
        [100 * standard_error(scores[rate], n_groups) for rate in rates],
        marker="o",
        capsize=3,
        label="val, ± one standard error",
    )
    axis.axhline(100 * before, color="C0", linestyle="dotted", label="val before training")
    if retention:
        rates = sorted(retention)
        percents = [100 * retention[rate] for rate in rates]
        axis.plot(rates, percents, marker="s", color="C1", label="retention set")
    axis.axvline(chosen, color="gray", linestyle="dashed", label=f"--optim.lr {chosen:g}")
    axis.set_xscale("log")
    axis.set(xlabel="peak learning rate", ylabel="mean R@1 of both directions, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
