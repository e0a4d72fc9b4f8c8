"""R@1 of one exported folder in each library, on the user's original files, opened as the model card shows.

    python -m train.export runs/demo --out exported --onnx
    python -m benchmarks.libraries exported data/icons/shards

The last row opens the files by `Image.open(...).convert("RGB")`, which ignores transparency and rotation.
"""

import io
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps

from data_prep.images import BadImage
from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.shards import Shards
from data_prep.tables import markdown_table
from eval.validation import features_metrics

BATCH_SIZE = 32


def originals(shards: Shards) -> list[bytes]:
    """The files that the shards were built from."""
    root = shards.manifest["read"]["images"]
    files = [read_local(ImageLocation(root, shards.meta(number)["image"])) for number in range(len(shards))]
    assert not any(isinstance(file, BadImage) for file in files), f"run this where {root} is a folder"
    return files


def as_in_the_card(data: bytes, background: tuple[int, int, int]) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def by_open_clip(folder: Path, images: list, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    pixels = torch.stack([preprocess(image) for image in images]).split(BATCH_SIZE)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts).split(BATCH_SIZE)
    with torch.no_grad():
        return (
            torch.cat([model.encode_image(batch, normalize=True) for batch in pixels]),
            torch.cat([model.encode_text(batch, normalize=True) for batch in tokens]),
        )


def by_transformers(folder: Path, images: list, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(
            **processor(images=images, text=texts, return_tensors="pt", padding=True, truncation=True)
        )
    return output.image_embeds, output.text_embeds


def by_sentence_transformers(
    folder: Path, images: list, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return torch.from_numpy(model.encode(images)), torch.from_numpy(model.encode(texts))


def by_onnxruntime(suffix: str):
    def features(folder: Path, images: list, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        import onnxruntime
        from transformers import CLIPProcessor

        inputs = CLIPProcessor.from_pretrained(folder)(
            images=images, text=texts, return_tensors="np", padding=True, truncation=True
        )
        vision, text = (
            onnxruntime.InferenceSession(folder / "onnx" / f"{name}_model{suffix}.onnx")
            for name in ("vision", "text")
        )
        (image_features,) = vision.run(None, {"pixel_values": inputs["pixel_values"]})
        (text_features,) = text.run(
            None, {name: inputs[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        )
        return torch.from_numpy(image_features), torch.from_numpy(text_features)

    return features


LIBRARIES = {
    "open_clip": by_open_clip,
    "transformers": by_transformers,
    "sentence-transformers": by_sentence_transformers,
    "onnxruntime, fp32": by_onnxruntime(""),
    "onnxruntime, int8": by_onnxruntime("_quantized"),
}


def main(folder: tyro.conf.Positional[Path], data: tyro.conf.Positional[Path], split: str = "test") -> None:
    """R@1 of an exported folder in each library.

    Args:
        folder: Exported with --onnx.
        data: Shards, whose original files are still there.
        split: Of the shards.
    """
    shards = Shards(data, split)
    files, captions = originals(shards), [shards.captions(number)[0] for number in range(len(shards))]
    texts = list(dict.fromkeys(captions))
    background = tuple(bytes.fromhex(shards.background[1:]))
    opened = [as_in_the_card(file, background) for file in files]
    naive = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    rows, first = [], None
    for name, images, library in (
        *((name, opened, library) for name, library in LIBRARIES.items()),
        ('open_clip, convert("RGB")', naive, by_open_clip),
    ):
        image_features, text_features = library(folder, images, texts)
        first = image_features if first is None else first
        metrics = features_metrics(image_features, text_features, captions, shards.groups)
        cosine = (image_features * first).sum(dim=1).min().item()
        recalls = [f"{100 * metrics[f'{way}/R@1']:.2f} %" for way in ("image_to_text", "text_to_image")]
        rows.append([name, *recalls, f"{cosine:.6f}"])
    print(f"{len(files)} files of {data}, {split}; {len(texts)} captions")
    print(
        markdown_table(
            ("library", "image to text R@1", "text to image R@1", "smallest cosine to open_clip"), rows
        )
    )


if __name__ == "__main__":
    tyro.cli(main)
