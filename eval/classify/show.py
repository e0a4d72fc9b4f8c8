"""One picture against captions: how near each is, and which one a model would choose."""

from collections.abc import Iterable
from pathlib import Path

import torch

from eval.classify.features import picture_of, read_file
from eval.retrieval.ranking import check_finite
from train.model.clip import Clip


def shown(image: Path, captions: tuple[str, ...], clips: Iterable[Clip]) -> dict:
    """{"image", "captions", "models": [{"model", "logit_scale", "cosine", "probability"}]}, the lists by
    caption.

    Raises:
        UserError: the picture cannot be read.
        NotFinite: a feature is not finite.
    """
    picture = picture_of(read_file(image, "--show"), f"--show {image}")
    models = []
    for clip in clips:
        clip.towers.eval()
        device = clip.towers.mean.device
        with torch.inference_mode():
            image_features = clip.towers.image_features(clip.eval_transform(picture)[None].to(device))
            text_features = clip.towers.text_features(clip.tokenize(list(captions)).to(device))
        check_finite(image_features, "image_features", lambda _: f"image {image}")
        check_finite(text_features, "text_features", lambda row: f"caption {captions[row]!r}")
        cosines = (text_features.double() @ image_features[0].double()).cpu()
        logit_scale = clip.towers.model.logit_scale.double().exp().item()
        values = {"cosine": cosines.tolist(), "probability": probabilities(cosines, logit_scale).tolist()}
        models.append({"model": clip.name, "logit_scale": logit_scale, **values})
    return {"image": str(image), "captions": list(captions), "models": models}


def probabilities(cosines: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """softmax(logit_scale * cosines), float64 [n]; through its logarithm, so that small ones keep their
    digits.
    """
    return (logit_scale * cosines.double()).log_softmax(-1).exp()


def shown_table(result: dict) -> str:
    """A result of shown() for people, models side by side."""
    left = max(map(len, result["captions"])) + 2
    width = max(26, *(len(found["model"]) + 2 for found in result["models"]))
    lines = [f"{result['image']}: cosine and probability of each caption"]
    lines.append(" " * left + "".join(found["model"].rjust(width) for found in result["models"]))
    for at, caption in enumerate(result["captions"]):
        cells = (f"{found['cosine'][at]:.4f}  {found['probability'][at]:>9.3g}" for found in result["models"])
        lines.append(caption.ljust(left) + "".join(cell.rjust(width) for cell in cells))
    scales = "".join(f"{found['logit_scale']:.4g}".rjust(width) for found in result["models"])
    return "\n".join([*lines, "exp(logit_scale)".ljust(left) + scales])
