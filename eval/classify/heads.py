"""Classification heads on frozen image features: training, saving and loading.

    linear  image_features [n, d] -> class logits                              multinomial logistic regression
    mlp     image_features [n, d] -> zero-shot logits [n, C] -> class logits   C-980-980-C

Validation images are a fifth of each class of the training images, or a split of the data. They choose the
linear head's regularization; the MLP's history is its accuracy on them after each epoch.
Sources: the linear probe is from Radford et al. 2021 (arXiv:2103.00020), appendix A.3; the MLP's sizes are
from a tutorial on Stanford Cars.
"""

import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.atomic import atomic_file, write_json
from data_prep.errors import UserError
from data_prep.progress import progress
from data_prep.strict_json import read_json
from eval.classify.features import Features

HIDDEN, DROPOUTS, LR, EPOCHS, BATCH = 980, (0.25, 0.3), 2e-4, 6, 64
# scikit-learn's C, the inverse of the regularization; large values matter because features are L2-normed
C_VALUES = np.logspace(-2, 6, 9)
SEED = 0


# KIND.json
ABOUT = {"kind": lambda kind: kind in ("linear", "mlp"), "classes": [str], "weights_sha256": str}
ABOUT |= {"width": lambda width: type(width) is int and width > 0}


class Head(nn.Module):
    """Class logits from image_features.

    Args:
        kind: "linear" or "mlp".
        classes: Names of the C classes.
        width: Feature dimension d.
        weights: Clip.fingerprint() of the model that computes the features.
    """

    def __init__(self, kind: Literal["linear", "mlp"], classes: list[str], width: int, weights: str):
        super().__init__()
        self.kind = kind
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
        if self.kind == "linear":
            return self.layers(image_features)
        return self.layers(self.logit_scale * image_features @ self.text_features.T)

    def logits(self, image_features: torch.Tensor) -> torch.Tensor:
        """forward() for evaluation: without dropout and gradients."""
        self.eval()
        with torch.inference_mode():
            return self(image_features)

    def save(self, folder: Path) -> None:
        """Write KIND.safetensors and KIND.json for load_head."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.kind}.safetensors"
        with atomic_file(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, partial)
        write_json(path.with_suffix(".json"), self.about)


def load_head(path: Path) -> Head:
    """The head whose KIND.json is `path`; `about["weights_sha256"]` names the model that it needs.

    Raises:
        UserError: There is none, or it is damaged.
    """
    make = "make a head: python -m eval linear-probe MODEL --data DATA --out FOLDER"
    about, weights = read_json(path, ABOUT, make), path.with_suffix(".safetensors")
    try:
        state = load_file(weights)
        # The width sizes the layers: it must be what the file has, before memory is taken for it.
        head_width = state["layers.weight" if about["kind"] == "linear" else "text_features"].shape[-1]
        if head_width != about["width"]:
            raise ValueError(f"features of {head_width} numbers, but {path.name} says {about['width']}")
        head = Head(about["kind"], about["classes"], about["width"], about["weights_sha256"])
        head.load_state_dict(state)
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{weights}: not the weights of a head ({error}); {make}") from None
    return head.eval()


class Split(NamedTuple):
    """Positions of the images for fitting and for validation, int64."""

    fit: np.ndarray
    val: np.ndarray


def validation_split(labels: np.ndarray, groups: np.ndarray, seed: int = SEED) -> Split:
    """A fifth of each class's groups for validation, at least one of two. Groups are not divided.

    Args:
        labels, groups: int64 [n].

    Raises:
        UserError: No class has images of two groups.
    """
    rng, held_out = np.random.default_rng(seed), []
    for label in np.unique(labels):
        members = rng.permutation(np.unique(groups[labels == label]))
        held_out.append(members[: max(len(members) // 5, min(1, len(members) - 1))])
    val = np.flatnonzero(np.isin(groups, np.concatenate(held_out)))
    if not len(val):
        raise UserError(
            f"{len(labels)} training images, where each class is a single group; a class needs at least two"
            " groups, one of them for validation. Pass --val-split, or more data"
        )
    return Split(np.setdiff1d(np.arange(len(labels)), val), val)


def fit_linear(features: Features, classes: list[str], split: Split, weights: str) -> tuple[Head, list[dict]]:
    """The linear head, fitted to all images with the best C, and validation accuracy by C.

    Ties go to the stronger regularization. A class without training images gets the bias -1e4, so it is never
    predicted.

    Raises:
        UserError: Fewer than two classes have training images.
    """
    inputs, labels = features.image_features.cpu().double().numpy(), features.labels
    if len(np.unique(labels[split.fit])) < 2:
        raise UserError("the training images have fewer than two classes; a classifier needs at least two")
    history = []
    for c in progress(C_VALUES, desc="linear probe", unit="fit", leave=False, delay=1):
        fitted = _regression(inputs[split.fit], labels[split.fit], c)
        accuracy = float((fitted.predict(inputs[split.val]) == labels[split.val]).mean())
        history.append({"C": float(c), "val_accuracy": accuracy})
    best = max(history, key=lambda row: (row["val_accuracy"], -row["C"]))
    fitted = _regression(inputs, labels, best["C"])
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # of two classes, scikit-learn keeps only the second's logit
        weight, bias = np.concatenate([0 * weight, weight]), np.array([0, bias[0]])
    head = Head("linear", classes, inputs.shape[1], weights)
    with torch.no_grad():
        head.layers.weight.zero_()
        head.layers.bias.fill_(-1e4)
        head.layers.weight[fitted.classes_] = torch.from_numpy(weight).float()
        head.layers.bias[fitted.classes_] = torch.from_numpy(bias).float()
    return head, [{**row, "chosen": row is best} for row in history]


def _regression(features: np.ndarray, labels: np.ndarray, c: float):
    from sklearn.exceptions import ConvergenceWarning  # here, because the import takes a second
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # The paper uses 1000 iterations too; validation judges the result.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=1000).fit(features, labels)


def fit_mlp(
    features: Features,
    texts: torch.Tensor,
    logit_scale: float,
    classes: list[str],
    split: Split,
    weights: str,
    seed: int = SEED,
) -> tuple[Head, list[dict]]:
    """The MLP on zero-shot logits, and losses and validation accuracy by epoch.

    Args:
        texts: text_features fp32 [C, d], L2-normed.
        logit_scale: Exponentiated.
        seed: Of weights, order and dropout.
    """
    inputs, labels = features.image_features.cpu(), torch.from_numpy(features.labels)
    fit, val = torch.from_numpy(split.fit), torch.from_numpy(split.val)
    history = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head("mlp", classes, inputs.shape[1], weights)
        head.text_features.copy_(texts)
        head.logit_scale.fill_(logit_scale)
        optimizer = torch.optim.Adam(head.parameters(), LR)
        bar = progress(range(1, EPOCHS + 1), desc="MLP", unit="epoch", leave=False, delay=1)
        for epoch in bar:
            train_loss = _epoch(head, optimizer, inputs, labels, fit)
            logits = head.logits(inputs[val])
            val_loss = F.cross_entropy(logits, labels[val]).item()
            accuracy = (logits.argmax(1) == labels[val]).double().mean().item()
            history.append(
                {"epoch": epoch, "loss": train_loss, "val_loss": val_loss, "val_accuracy": accuracy}
            )
            bar.set_postfix(val_accuracy=f"{accuracy:.3f}", refresh=False)
    return head.eval(), history


def _epoch(
    head: Head,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    fit: torch.Tensor,
) -> float:
    """One epoch of training on the rows `fit`, int64; the mean loss."""
    head.train()
    losses = []
    for rows in fit[torch.randperm(len(fit))].split(BATCH):
        if len(rows) == 1:  # batch norm needs a variance
            continue
        loss = F.cross_entropy(head(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))
