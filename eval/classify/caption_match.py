"""One image against captions: cosine and probability of each caption, by several models."""

from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.tables import markdown_table
from eval.classify.features import open_image, read_file
from eval.embed import load_for_eval
from eval.options import Inference
from eval.retrieval.ranking import check_finite
from train.world import World


def match_captions(
    image: Path, captions: Sequence[str], models: Sequence[str], inference: Inference, world: World
) -> dict:
    """{"image", "captions", "models": [{"model", "logit_scale", "cosine", "probability"}]}, lists by caption.

    Raises:
        UserError: The image cannot be read, or there is no such model.
        NotFinite: A feature is not finite.
    """
    data = read_file(image, "--image")
    results = []
    for name in models:
        clip = load_for_eval(name, inference, world)
        pixels = open_image(data, f"--image {image}", clip.background)
        with torch.inference_mode():
            image_features = clip.towers.image_features(clip.eval_transform(pixels)[None].to(world.device))
            text_features = clip.towers.text_features(clip.tokenize(list(captions)).to(world.device))
        check_finite(image_features, "image_features", lambda _: f"image {image}")
        check_finite(text_features, "text_features", lambda row: f"caption {captions[row]!r}")
        cosines = (text_features.double() @ image_features[0].double()).cpu()
        logit_scale = clip.towers.model.logit_scale.double().exp().item()
        values = {"cosine": cosines.tolist(), "probability": probabilities(cosines, logit_scale).tolist()}
        results.append({"model": name, "logit_scale": logit_scale, **values})
    return {"image": str(image), "captions": list(captions), "models": results}


def probabilities(cosines: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """softmax(logit_scale * cosines), float64 [n]; by log_softmax, so small ones keep their digits."""
    return (logit_scale * cosines.double()).log_softmax(-1).exp()


def table(result: dict) -> str:
    """A result of match_captions for the terminal, models side by side."""
    columns, rows = ["caption"], [[caption] for caption in result["captions"]]
    for model in result["models"]:
        columns += [f"{model['model']}: cosine", "probability"]
        for row, cosine, probability in zip(rows, model["cosine"], model["probability"], strict=True):
            row += [f"{cosine:.4f}", f"{probability:.3g}"]
    scales = ", ".join(f"{model['model']} {model['logit_scale']:.4g}" for model in result["models"])
    return f"{result['image']}\n\n{markdown_table(columns, rows)}\n\nexp(logit_scale): {scales}"
