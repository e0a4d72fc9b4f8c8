"""Heads on image features of a frozen model: fitted, written down, and read again.

    linear  image_features [n, d] -> class logits                              multinomial logistic regression
    mlp     image_features [n, d] -> zero-shot logits [n, C] -> class logits   C-980-980-C

The validation, a fifth of each class of the training pictures or a split of its own, chooses the linear
head's regularization; its accuracy after each epoch is the MLP's history.
Sources: linear probe, Radford et al. 2021 (arXiv:2103.00020), appendix A.3; the MLP's sizes are a tutorial's
    on Stanford Cars.
"""

import json
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.progress import progress
from eval.classify.features import Features
from eval.retrieval.score import write_json

HIDDEN, DROPOUTS, LR, EPOCHS, BATCH = 980, (0.25, 0.3), 2e-4, 6, 64
STRENGTHS = np.logspace(
    -2, 6, 9
)  # scikit-learn's C: the inverse of the regularization; the features are L2-normed
SEED = 0


class Head(nn.Module):
    """Class logits from image_features.

    Args:
        kind: "linear" or "mlp".
        classes: C names.
        width: d, of the features.
        weights: Clip.fingerprint() of the model that the features are of.
    """

    def __init__(self, kind: Literal["linear", "mlp"], classes: list[str], width: int, weights: str):
        super().__init__()
        self.about = {"kind": kind, "classes": classes, "width": width, "weights_sha256": weights}
        n = len(classes)
        if kind == "linear":
            self.layers = nn.Linear(width, n)
            return
        self.register_buffer("text_features", torch.zeros(n, width))
        self.register_buffer("logit_scale", torch.zeros(()))  # exponentiated
        first, second = DROPOUTS
        self.layers = nn.Sequential(
            *(nn.Linear(n, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(first)),
            *(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(second)),
            nn.Linear(HIDDEN, n),
        )

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """fp32 [b, d], L2-normed -> [b, C]."""
        if self.about["kind"] == "linear":
            return self.layers(image_features)
        return self.layers(self.logit_scale * image_features @ self.text_features.T)

    def logits(self, image_features: torch.Tensor) -> torch.Tensor:
        """The same for evaluation: without dropout and gradients."""
        self.eval()
        with torch.inference_mode():
            return self(image_features)

    def save(self, folder: Path) -> None:
        """Write KIND.safetensors and KIND.json, which load_head reads."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.about['kind']}.safetensors"
        with atomic_file(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, partial)
        write_json(path.with_suffix(".json"), self.about)


def load_head(path: Path) -> Head:
    """The head whose KIND.json is at `path`; `about["weights_sha256"]` says which model's features it wants.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        head = Head(about["kind"], about["classes"], about["width"], about["weights_sha256"])
        head.load_state_dict(load_file(path.with_suffix(".safetensors")))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a head ({error}); make one with: python -m eval probe MODEL --data DATA --save"
            " FOLDER"
        ) from None
    return head.eval()


class Split(NamedTuple):
    """Positions of training pictures, int64."""

    fit: np.ndarray
    val: np.ndarray


def validation_split(labels: np.ndarray, groups: np.ndarray, seed: int = SEED) -> Split:
    """A fifth of each class's groups for validation, at least one where it has two; a whole group is on one
    side.

    Args:
        labels, groups: int64 [n].

    Raises:
        UserError: no class has pictures of two groups.
    """
    rng, chosen = np.random.default_rng(seed), []
    for label in np.unique(labels):
        members = rng.permutation(np.unique(groups[labels == label]))
        chosen.append(members[: max(len(members) // 5, min(1, len(members) - 1))])
    val = np.flatnonzero(np.isin(groups, np.concatenate(chosen)))
    if not len(val):
        raise UserError(
            f"{len(labels)} training pictures, those of a class all of one group; at least two groups of a"
            " class are wanted, one of them for validation"
        )
    return Split(np.setdiff1d(np.arange(len(labels)), val), val)


def fit_linear(found: Features, classes: list[str], split: Split, weights: str) -> tuple[Head, list[dict]]:
    """The linear head, and validation accuracy by C; ties go to the stronger regularization. The best C is
    fitted to all pictures.

    A class without training pictures is never predicted: its bias is -1e4.

    Raises:
        UserError: fewer than two classes have training pictures.
    """
    features, labels = found.image_features.cpu().double().numpy(), found.labels
    if len(np.unique(labels[split.fit])) < 2:
        raise UserError("training pictures of fewer than two classes; at least two are wanted")
    history = []
    for strength in progress(STRENGTHS, desc="linear probe", unit="fit", leave=False, delay=1):
        fitted = _regression(features[split.fit], labels[split.fit], strength)
        accuracy = float((fitted.predict(features[split.val]) == labels[split.val]).mean())
        history.append({"C": float(strength), "val_accuracy": accuracy})
    best = max(history, key=lambda row: (row["val_accuracy"], -row["C"]))
    fitted = _regression(features, labels, best["C"])
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # of two classes scikit-learn keeps the second's logit
        weight, bias = np.concatenate([0 * weight, weight]), np.array([0, bias[0]])
    head = Head("linear", classes, features.shape[1], weights)
    with torch.no_grad():
        head.layers.weight.zero_()
        head.layers.bias.fill_(-1e4)
        head.layers.weight[fitted.classes_] = torch.from_numpy(weight).float()
        head.layers.bias[fitted.classes_] = torch.from_numpy(bias).float()
    return head, [{**row, "chosen": row is best} for row in history]


def _regression(features: np.ndarray, labels: np.ndarray, strength: float):
    from sklearn.exceptions import ConvergenceWarning  # here, because it takes a second
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # 1000 iterations are the paper's; validation judges the outcome
        return LogisticRegression(C=strength, max_iter=1000).fit(features, labels)


def fit_mlp(
    found: Features,
    texts: torch.Tensor,
    logit_scale: float,
    classes: list[str],
    split: Split,
    weights: str,
    seed: int = SEED,
) -> tuple[Head, list[dict]]:
    """The MLP on the class logits, and its history: losses and validation accuracy by epoch.

    Args:
        texts: text_features fp32 [C, d], L2-normed.
        logit_scale: exponentiated.
        seed: of weights, order and dropout.
    """
    features, labels = found.image_features.cpu(), torch.from_numpy(found.labels)
    fit, val = torch.from_numpy(split.fit), torch.from_numpy(split.val)
    history = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head("mlp", classes, features.shape[1], weights)
        head.text_features.copy_(texts)
        head.logit_scale.fill_(logit_scale)
        optimizer = torch.optim.Adam(head.parameters(), LR)
        for epoch in (bar := progress(range(1, EPOCHS + 1), desc="MLP", unit="epoch", leave=False, delay=1)):
            head.train()
            losses = []
            for rows in fit[torch.randperm(len(fit))].split(BATCH):
                if len(rows) == 1:  # one picture has no variance to normalize with
                    continue
                loss = F.cross_entropy(head(features[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            logits = head.logits(features[val])
            accuracy, loss = (
                (logits.argmax(1) == labels[val]).double().mean().item(),
                F.cross_entropy(logits, labels[val]).item(),
            )
            history.append(
                {"epoch": epoch, "loss": float(np.mean(losses)), "val_loss": loss, "val_accuracy": accuracy}
            )
            bar.set_postfix(val_accuracy=f"{accuracy:.3f}", refresh=False)
    return head.eval(), history
