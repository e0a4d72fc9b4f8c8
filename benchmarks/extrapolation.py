"""Which curve `train.forecast` extends, and how wide its interval must be: candidates on simulated trainings.

    python -m benchmarks.extrapolation --surfaces 60     the tables of forecast.md: ten minutes on two cores

A surface is a two-tower model, pretrained on one domain and fine-tuned on nested parts of another one. A
thing is three words of 400, of which some are frequent; its texts name them, its images are noisy nonlinear
mixtures of their features. So a new group is recognised by words that other groups had, as in real data.
Noise, images per group, number of groups, learning rate, pretraining and epochs are drawn for each surface.
What is forecast is then trained: all groups, half of them, and, from parts of that half, twice as many.
"""

import copy
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.special import expit, logit
from torch import nn

from data_prep.cli import CONFIG
from data_prep.cores import cores
from data_prep.tables import markdown_table
from train.tune import extrapolate
from train.tune.extrapolate import effective_data, line_through, logits, score_at

WORDS, IN_A_THING, FEATURES, PIXELS, DIMENSIONS = 400, 3, 32, 96, 48
FRACTIONS = (1 / 8, 1 / 4, 1 / 2)
SHORT_EPOCHS = {4: 2, 8: 5, 16: 10}  # of the full run's, what train.forecast takes
BATCH, VAL_GROUPS = 64, 300


class Setting(NamedTuple):
    """What is drawn for a surface."""

    seed: int
    noise: float
    images_per_group: int
    n_groups: int
    lr: float
    base_epochs: int
    epochs: int


class Things(NamedTuple):
    images: torch.Tensor  # [n, PIXELS]
    words: torch.Tensor  # int64 [n, IN_A_THING]
    groups: torch.Tensor  # int64 [n]

    def first(self, n_groups: int) -> "Things":
        return Things(*(each[self.groups < n_groups] for each in self))

    def last(self, n_groups: int) -> "Things":
        return Things(*(each[self.groups >= self.groups.max() + 1 - n_groups] for each in self))


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.images = nn.Sequential(
            nn.Linear(PIXELS, 160), nn.GELU(), nn.Linear(160, 160), nn.GELU(), nn.Linear(160, DIMENSIONS)
        )
        self.words = nn.Embedding(WORDS, 64)
        self.texts = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, DIMENSIONS))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(14.0)))

    def forward(self, images: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        texts = self.texts(self.words(words).mean(1))
        return F.normalize(self.images(images), dim=1), F.normalize(texts, dim=1)


def make_things(setting: Setting) -> tuple[Things, Things]:
    """The domain of the base, and the one to fine-tune on, which shares its words and half of its look."""
    rng, generator = np.random.default_rng(setting.seed), torch.Generator().manual_seed(setting.seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features = draw(WORDS, FEATURES)
    looks = [(draw(FEATURES, PIXELS) / FEATURES**0.5, draw(PIXELS, PIXELS) / PIXELS**0.5) for _ in range(2)]
    found = []
    for domain, n_groups in enumerate((4000, setting.n_groups + VAL_GROUPS)):
        frequency = rng.permutation(1 / np.arange(1, WORDS + 1) ** 0.8)
        things: dict[tuple, None] = {}
        while len(things) < n_groups:
            words = rng.choice(WORDS, IN_A_THING, replace=False, p=frequency / frequency.sum())
            things[tuple(sorted(words))] = None
        n = setting.images_per_group if domain else 2
        words = torch.tensor(list(things)).repeat_interleave(n, 0)
        meaning = features[words].sum(1) / IN_A_THING**0.5
        mixed = [torch.tanh(1.5 * meaning @ one + 0.3 * draw(len(words), PIXELS)) @ two for one, two in looks]
        images = mixed[domain] + (0.5 * mixed[0] if domain else 0)
        images = images + setting.noise * draw(len(words), PIXELS)
        found.append(Things(images, words, torch.arange(n_groups).repeat_interleave(n)))
    return found[0], found[1]


def fit(towers: Towers, things: Things, epochs: int, batch: int, lr: float, seed: int, val: Things | None):
    """Train as the project does: AdamW, warm-up and cosine, mates are positives, the best epoch by val.

    Returns:
        What each query of val scores at the best epoch, float [queries]; None without val.
    """
    n, generator, best = len(things.groups), torch.Generator().manual_seed(seed), None
    optimizer = torch.optim.AdamW(towers.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.98))
    steps, step = epochs * (n // batch), 0
    for _ in range(epochs):
        for chosen in torch.randperm(n, generator=generator)[: n // batch * batch].split(batch):
            rate = min((step + 1) / (0.1 * steps + 1), 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.param_groups[0]["lr"] = lr * rate
            images = things.images[chosen] + 0.3 * torch.randn(batch, PIXELS, generator=generator)
            one, other = towers(images, things.words[chosen])
            scores = towers.logit_scale.exp().clamp(max=100) * one @ other.T
            mates = (things.groups[chosen][:, None] == things.groups[chosen]).float()
            target = mates / mates.sum(1, keepdim=True)
            loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
            optimizer.step()
            step += 1
        if val:
            hits = evaluate(towers, val)
            best = hits if best is None or hits.mean() > best.mean() else best
    return best


@torch.no_grad()
def evaluate(towers: Towers, val: Things) -> np.ndarray:
    """What each image and each group's text scores, so weighted that the mean is that of both directions."""
    names, first = np.unique(val.groups.numpy(), return_index=True)
    images, _ = towers(val.images, val.words)
    _, texts = towers(val.images[first], val.words[first])
    scores, names = images @ texts.T, torch.from_numpy(names)
    hits = names[scores.argmax(1)] == val.groups, val.groups[scores.argmax(0)] == names
    n = len(hits[0]) + len(hits[1])
    return np.concatenate([each.double().numpy() * n / 2 / len(each) for each in hits])


def query_groups(val: Things) -> np.ndarray:
    return np.concatenate([val.groups.numpy(), np.unique(val.groups.numpy())])


class Case(NamedTuple):
    """Three short runs and the run that they forecast.

    Attributes:
        hits: float [3, queries], of the short runs.
        before: the base's score.
        short_epochs, epochs: of the short runs, and of the other.
        times: its groups, in those that the short runs are parts of.
        measured: its score.
    """

    hits: np.ndarray
    groups: np.ndarray
    before: float
    short_epochs: int
    epochs: int
    times: int
    measured: float


def draw_setting(seed: int) -> Setting:
    rng = np.random.default_rng(seed)
    epochs = int(rng.choice(list(SHORT_EPOCHS)))
    return Setting(
        seed,
        float(rng.choice((0.3, 0.6, 1.0))),
        int(rng.choice((1, 2))),
        int(rng.choice((1200, 1800, 2400))),
        float(rng.choice((3e-4, 1e-3, 2e-3))),
        int(rng.choice((2, 6, 12))),
        epochs,
    )


def cases(seed: int) -> list[Case]:
    """What one surface gives: all groups and half of them, each forecast; and all from parts of the half."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    setting = draw_setting(seed)
    base_things, things = make_things(setting)
    val, base = things.last(VAL_GROUPS), Towers()
    fit(base, base_things, setting.base_epochs, 256, 2e-3, seed, None)

    def run(fraction: float, epochs: int) -> np.ndarray:
        part = things.first(int(fraction * setting.n_groups))
        return fit(copy.deepcopy(base), part, epochs, BATCH, setting.lr, seed, val)

    short_epochs, before = SHORT_EPOCHS[setting.epochs], evaluate(base, val).mean()
    short = {fraction: run(fraction, short_epochs) for fraction in (1 / 16, *FRACTIONS)}
    measured = {fraction: run(fraction, setting.epochs).mean() for fraction in (1 / 2, 1.0)}
    return [
        Case(
            np.stack([short[all_ * fraction] for fraction in FRACTIONS]),
            query_groups(val),
            before,
            short_epochs,
            setting.epochs,
            times,
            measured[all_ * times],
        )
        for all_, times in ((1.0, 1), (0.5, 1), (0.5, 2))
    ]


def straight(x: np.ndarray, y: np.ndarray, to: float, weights: tuple) -> float:
    slope, height = np.polyfit(x, y, 1, w=np.sqrt(weights))
    return height + slope * to


def power_law(x: np.ndarray, y: np.ndarray, to: float) -> float:
    """Of the error: 1 - R@1 = a * data ** -b."""
    return -logit(min(np.exp(straight(x, np.log(expit(-y)), to, (1, 1, 1))), 0.999))


def from_base(x: np.ndarray, y: np.ndarray, to: float, before: float) -> float:
    """before + a * log(1 + data / b): no gain without data; the mean over b, weighted by how well it fits."""
    data, errors, values = 2.0**x, [], []
    for b in 2.0 ** np.arange(-8, 5) * data.max():
        growth = np.log1p(data / b)
        a = max(0.0, growth @ (y - before) / (growth @ growth))
        errors.append(((y - before - a * growth) ** 2).sum())
        values.append(before + a * np.log1p(2.0**to / b))
    weights = np.exp((min(errors) - np.array(errors)) / (2 * 0.06**2))
    return float(weights @ values / weights.sum())


Curve = Callable[[np.ndarray, np.ndarray, float, float], float]
CURVES: dict[str, Curve] = {
    "the largest short run": lambda x, y, to, before: y[-1],
    "line through the last two": lambda x, y, to, before: straight(x[1:], y[1:], to, (1, 1)),
    "line": lambda x, y, to, before: straight(x, y, to, (1, 1, 1)),
    "line, weights 1, 2, 4": lambda x, y, to, before: straight(x, y, to, (1, 2, 4)),
    "power law of the error": lambda x, y, to, before: power_law(x, y, to),
    "logarithmic growth from the base": from_base,
}
REUSES = {"nothing": lambda epochs: 1.0, "Muennighoff et al.": lambda epochs: effective_data(1, epochs)}
REUSES |= {"as much as new data": lambda epochs: float(epochs)}


def errors_of(found: list[Case], curve: Curve, reuse: Callable[[int], float]) -> np.ndarray:
    """Forecast minus measured, in points."""
    errors = []
    for case in found:
        x = np.log2([fraction * reuse(case.short_epochs) for fraction in FRACTIONS])
        n_queries = case.hits.shape[1]
        y, before = logits(case.hits.mean(1), n_queries), logits(np.array(case.before), n_queries)
        value = expit(curve(x, y, np.log2(case.times * reuse(case.epochs)), float(before)))
        errors.append(100 * (value - case.measured))
    return np.array(errors)


def curves_table(found: list[Case]) -> str:
    rows = []
    for name, curve in CURVES.items():
        for reuse_name, reuse in REUSES.items():
            cells = []
            for times in (1, 2):
                errors = errors_of([case for case in found if case.times == times], curve, reuse)
                cells += [
                    f"{errors.mean():+.1f}",
                    f"{np.abs(errors).mean():.1f}",
                    f"{(errors**2).mean() ** 0.5:.1f}",
                ]
            rows.append([name, reuse_name, *cells])
    columns = ["curve", "worth of a repeated pair"]
    columns += [f"{of}: {what}" for of in ("all", "twice") for what in ("mean error", "absolute", "rms")]
    return markdown_table(columns, rows, left=2)


def interval_table(found: list[Case]) -> str:
    """Coverage and width of the interval at several model errors."""
    rows, kept = [], extrapolate.MODEL_ERROR
    for model_error in (0.0, 0.05, 0.1, 0.12, 0.15, 0.2, 0.3):
        extrapolate.MODEL_ERROR, cells = model_error, []
        for times in (1, 2):
            covered, widths = [], []
            for case in (case for case in found if case.times == times):
                data = np.array([effective_data(fraction, case.short_epochs) for fraction in FRACTIONS])
                line = line_through(case.hits, case.groups, data)
                interval = score_at(line, effective_data(times, case.epochs)).interval()
                covered.append(interval.low <= case.measured <= interval.high)
                widths.append(interval.high - interval.low)
            cells += [f"{100 * np.mean(covered):.0f}", f"{100 * np.mean(widths):.1f}"]
        rows.append([f"{model_error:g}", *cells])
    extrapolate.MODEL_ERROR = kept
    return markdown_table(
        ["model error", "all: covered, %", "width, points", "twice: covered, %", "width, points"], rows
    )


def main(surfaces: int = 60, jobs: int = 0) -> None:
    """Print the tables.

    Args:
        surfaces: How many are drawn.
        jobs: At a time; 0 is one per core.
    """
    with ProcessPoolExecutor(jobs or cores(), multiprocessing.get_context("spawn")) as pool:
        found = [case for each in pool.map(cases, range(surfaces)) for case in each]
    print(curves_table(found))
    print()
    print(interval_table(found))


if __name__ == "__main__":
    tyro.cli(main, config=CONFIG)
