"""Export of full-size models with random weights: time, peak memory, sizes and differences; and a model
card's snippets on one.

    python -m benchmarks.export                          the rows of export.md
    python -m benchmarks.export --only ViT-B-32          those with this in their name

Each row is a process of its own, which writes to a temporary folder. Nothing is downloaded.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROWS = [  # model, dtype, onnx
    ("ViT-B-32-quickgelu:openai", "fp16", False),
    ("ViT-L-14:laion2b_s32b_b82k", "fp32", True),
    ("ViT-L-14:laion2b_s32b_b82k", "fp16", False),
]


def row(model: str, dtype: str, onnx: bool) -> dict:
    """One export in this process; architecture and preprocessing are the tag's, the weights random."""
    from train.export.folder import export
    from train.model.clip import load

    clip = load(model, weights=False)
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "out", time.monotonic()
        record = export(clip, out, dtype, onnx)
        seconds, peak_gb = (
            time.monotonic() - started,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        )
        found = {
            "model": model,
            "dtype": dtype,
            "onnx": onnx,
            "seconds": round(seconds),
            "peak_gb": round(peak_gb, 1),
        }
        found["weights_gb"] = round(
            sum(weight.nbytes for weight in clip.towers.model.state_dict().values()) / 1e9, 2
        )
        found["gb"] = {
            name: round(file["bytes"] / 1e9, 2)
            for name, file in record["files"].items()
            if file["bytes"] > 1e8
        }
        found["differences"] = record["differences"]
        if "quickgelu" in model:
            found["snippets"] = snippets(out)
    return found


def snippets(out: Path) -> dict:
    """What the LEGO model's card shows: half precision, embeddings, zero-shot, pipeline; in transformers 4
    and 5.
    """
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor, pipeline

    model = CLIPModel.from_pretrained(out, torch_dtype=torch.float16)
    processor = CLIPProcessor.from_pretrained(out)
    image, labels = (
        Image.linear_gradient("L").convert("RGB"),
        ["a photo of a lego car", "a photo of a lego house", "a photo of a wheel"],
    )
    inputs = processor(text=labels, images=image, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        text = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)
        found = model.get_image_features(pixel_values=inputs.pixel_values.half())
        seen = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)
        together = model(**inputs)
    ask = pipeline("zero-shot-image-classification", model=str(out))
    answers = {
        answer["label"]: answer["score"]
        for answer in ask(image, candidate_labels=labels, hypothesis_template="{}")
    }
    probabilities = together.logits_per_image.softmax(dim=1)[0].float()
    assert abs(probabilities.sum() - 1) < 2e-3, probabilities
    return {
        "zero_shot": probabilities.tolist(),
        "pipeline": [answers[label] for label in labels],
        "embeddings_to_forward": max(
            (text - together.text_embeds).abs().max().item(),
            (seen - together.image_embeds).abs().max().item(),
        ),
    }


def main(only: str = "") -> None:
    """Time, memory, sizes and differences of exports, each in a process of its own.

    Args:
        only: A part of the models' names.
    """
    for model, dtype, onnx in ROWS:
        if only in model:
            code = (
                f"import json; from benchmarks.export import row; print(json.dumps(row({model!r}, {dtype!r},"
                f" {onnx})))"
            )
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
            print(json.dumps(json.loads(done.stdout.splitlines()[-1]), indent=1), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
