"""Models and indexes for Python code of one's own; what `import cliptune` offers.

    model = load("runs/mine")
    images = model.encode_images(["bell.png", "house.png"])    float32 [2, d], L2-normed
    texts = model.encode_texts(["a bell", "a house"])          float32 [2, d], L2-normed
    images @ texts.T                                           cosines [2, 2]

Images take the path that they take in `python -m eval embed`: the same decoder, EXIF orientation, background
and resizing, so features compare with those of an index.
"""

import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.progress import progress
from eval.classify.features import in_rgb
from eval.embed import batches, embed_texts, load_for_eval, pixel_bytes
from eval.options import Inference
from eval.retrieval.ranking import check_finite
from eval.search.index import filter_rows, open_index
from eval.search.nearest import Nearest
from eval.search.query import described
from eval.search.words import Words, top
from train.data.loader import loader
from train.device import own_device
from train.model.clip import Clip
from train.model.preprocessing import CONFIG_FILE
from train.model.transformers_clip import is_transformers
from train.world import World

ImageLike = str | Path | Image.Image
# A str is a sentence, a Path or an Image an image, an array float32 [d] the features of either.
Query = str | Path | Image.Image | np.ndarray
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # Pillow writes others as TIFF alone


def load(model: str | Path, device: str = "", precision: Literal["auto", "fp32", "bf16"] = "auto") -> "Model":
    """Load a model for evaluation.

    Args:
        model: a run folder (its best checkpoint), a folder of weights (open_clip's, as `export` writes it, or
            of transformers' CLIPModel), hf-hub:USER/NAME, or NAME:PRETRAINED (ViT-B-32:laion2b_s34b_b79k).
        device: "cuda:1", "cpu", ...; by default torch's accelerator if there is one.
        precision: of the towers; auto is bf16 on a GPU and fp32 on a CPU. Features are float32 in both.

    Raises:
        UserError: no such model.
    """
    folder = Path(model)
    is_folder = (folder / CONFIG_FILE).is_file() or is_transformers(folder)
    name = f"local-dir:{model}" if is_folder else str(model)
    world = World(device=torch.device(device) if device else own_device())
    return Model(load_for_eval(name, Inference(precision=precision), world), world.device)


class Model:
    """A CLIP model.

    Attributes:
        clip: the model with its preprocessing and tokenizer; clip.towers.model is open_clip's own.
        device: of the model. Features are on the CPU.
    """

    def __init__(self, clip: Clip, device: torch.device):
        self.clip, self.device = clip, device

    def __repr__(self) -> str:
        return f"cliptune.Model({self.clip.name!r} on {self.device})"

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before a softmax over texts or images."""
        return self.clip.towers.model.logit_scale.exp().item()

    def encode_images(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = 64, workers: int = 0
    ) -> np.ndarray:
        """Features of images, with a progress bar after a second.

        Args:
            images: paths or PIL images, in any mode; of one image alone, the features are [d].
            batch_size: images embedded at once; of no effect on features but rounding.
            workers: processes that read images; 0 reads them in this one.

        Returns:
            float32 [n, d], L2-normed, in the order of the images.

        Raises:
            UserError: an image cannot be read, is damaged, or of a single color; the first one is named.
        """
        if isinstance(images, (str, Path, Image.Image)):
            return self.encode_images([images])[0]
        images = _sequence(images, "images")
        _check_at_least("batch_size", batch_size, 1)
        _check_at_least("workers", workers, 0)
        dataset, numbers = _Images(images, self.clip), batches(len(images), batch_size)
        batch_bytes = pixel_bytes(self.clip, batch_size)
        inputs = loader(dataset, numbers, workers, World(device=self.device), _stack, batch_bytes)
        bar = progress(inputs, total=len(numbers), desc="encoding images", unit="batch", leave=False, delay=1)
        parts = [np.zeros((0, self.clip.config["model_cfg"]["embed_dim"]), np.float32)]
        with torch.inference_mode(), bar:
            for pixels in bar:
                if isinstance(pixels, str):
                    raise UserError(
                        f"{pixels}; leave this image out. For many files: python -m eval embed MODEL --data"
                        " FOLDER --out INDEX lists such images and embeds the others"
                    )
                features = self.clip.towers.image_features(pixels.to(self.device, non_blocking=True))
                first = sum(map(len, parts))
                check_finite(features, "image_features", lambda row, at=first: dataset.name(at + row))
                parts.append(features.cpu().numpy())
        return np.concatenate(parts)

    def encode_texts(self, texts: str | Iterable[str], batch_size: int = 64) -> np.ndarray:
        """Features of texts.

        Args:
            texts: of one text alone, the features are [d]. What exceeds the model's context is cut off.
            batch_size: texts embedded at once.

        Returns:
            float32 [n, d], L2-normed, in the order of the texts.

        Raises:
            UserError: something is not a text.
        """
        if isinstance(texts, str):
            return self.encode_texts([texts])[0]
        texts = _sequence(texts, "texts")
        _check_at_least("batch_size", batch_size, 1)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{number}] is {type(text).__name__}, not a str: {text!r:.80}")
        if not len(texts):
            return np.zeros((0, self.clip.config["model_cfg"]["embed_dim"]), np.float32)
        world = World(device=self.device)
        return embed_texts(self.clip, list(texts), world, Inference(batch_size=batch_size)).cpu().numpy()

    def rank(
        self,
        query: Query,
        *,
        images: Iterable[ImageLike] | None = None,
        texts: Iterable[str] | None = None,
        k: int | None = None,
    ) -> list[tuple[ImageLike, float]]:
        """Images or texts by their similarity to a query: (the image or text, cosine), best first.

        Args:
            query: a str is a sentence, a Path or a PIL image an image, an array the features of either.
            images, texts: what is ranked; one of the two.
            k: how many are returned; all by default.

        Raises:
            UserError: both or neither of images and texts; see encode_images() and encode_texts().
        """
        if (images is None) == (texts is None):
            raise UserError("rank: pass images=[...] or texts=[...], one of the two")
        name, items = ("images", images) if texts is None else ("texts", texts)
        if isinstance(items, (str, Path, Image.Image)):
            raise UserError(f"rank: {name} is one {type(items).__name__}; pass a list")
        items = _sequence(items, name)
        features = self.encode_images(items) if texts is None else self.encode_texts(items)
        scores = features @ self.encode(query)
        return [(items[number], float(scores[number])) for number in np.argsort(-scores, kind="stable")[:k]]

    def encode(self, query: Query) -> np.ndarray:
        """float32 [d] of a query; see rank().

        Raises:
            UserError: it is no query, as a list of sentences, or it cannot be encoded.
        """
        if isinstance(query, np.ndarray):
            if query.ndim != 1:
                raise UserError(f"a query is one row of features [d], but this array is {list(query.shape)}")
            return query.astype(np.float32, copy=False)
        if not isinstance(query, (str, Path, Image.Image)):
            raise UserError(
                f"a query is one sentence (str), one image (Path or PIL image) or one row of features [d],"
                f" not {type(query).__name__}; pass them one at a time"
            )
        return self.encode_texts(query) if isinstance(query, str) else self.encode_images(query)


class Index:
    """An index that `python -m eval embed` made, opened for search.

    Args:
        folder: of the index.
        model: what load() takes, if the index's own model has moved.
        device: see load().

    Raises:
        UserError: there is no index, or it is damaged or empty.
    """

    def __init__(self, folder: str | Path, model: str | Path = "", device: str = "cpu"):
        self.index = open_index(Path(folder))
        self._name, self._device = str(model), torch.device(device)
        self._nearest, self._words = Nearest(self.index), Words(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"cliptune.Index({str(self.index.folder)!r}: {len(self)} images)"

    @property
    def features(self) -> np.ndarray:
        """fp16 [n, d], L2-normed, memory-mapped; of a compressed index [n, dims], see Index.features."""
        return self.index.features

    @cached_property
    def model(self) -> Model:
        """The model that made the index; loaded when it is first needed.

        Raises:
            UserError: it is not there any more, or its weights differ.
        """
        clip = self.index.model(self._name)
        clip.towers.to(self._device)
        return Model(clip, self._device)

    def search(
        self,
        query: Query,
        k: int = 10,
        filters: Sequence[str] = (),
        all_variants: bool = False,
        vectors_only: bool = False,
    ) -> list[dict]:
        """The k nearest images by cosine, best first, as `python -m eval search` finds them.

        Args:
            query: a str is a sentence, a Path or a PIL image an image, an array the features of either.
            filters: "COLUMN=VALUE"; only images that match all of them are searched.
            all_variants: return all images of a group, not only the best one.
            vectors_only: rank by cosine alone; otherwise images come first that have the part numbers, or the
                words in quotation marks, of a sentence.

        Returns:
            {"rank" (from 1), "score", "path" (relative to the folder or URL of images), "key", "captions",
            "split", "group", "variants", "words" (that matched), "columns", ...} each.

        Raises:
            UserError: no such column or value; the query cannot be encoded.
        """
        _check_at_least("k", k, 1)
        rows = filter_rows(self.index, filters)
        is_array = isinstance(query, np.ndarray)
        features = np.asarray(query, np.float32) if is_array else self.model.encode(query)
        d = self.index.manifest["d"]
        if features.shape != (d,):
            raise UserError(f"{self!r}: the features of a query are [{d}], not {list(features.shape)}")
        text, words = query if isinstance(query, str) else "", None if vectors_only else self._words
        [hits] = top(
            self._nearest, words, torch.from_numpy(features)[None], [text], k, rows, not all_variants
        )
        return described(self.index, hits)


class _Images(Dataset):
    """uint8 [3, H, W] of an image by its number, or a sentence on why it cannot be used."""

    def __init__(self, images: Sequence[ImageLike], clip: Clip):
        self.images, self.transform, self.background = images, clip.eval_transform, clip.background

    def name(self, number: int) -> str:
        image = self.images[number]
        return str(image) if isinstance(image, (str, Path)) else f"images[{number}]"

    def __getitem__(self, number: int) -> torch.Tensor | str:
        try:
            return self.transform(in_rgb(_bytes_of(self.images[number]), self.background))
        except OSError as error:
            return f"{self.name(number)}: cannot be read ({error.strerror or error})"
        except BadImage as bad:
            return f"{self.name(number)}: {bad}"


def _sequence(items: Iterable, name: str) -> Sequence:
    """`items` with a length and numbers, as a generator has not.

    Args:
        name: of the parameter, for the message.
    """
    if not isinstance(items, Iterable):
        raise UserError(f"{name}={items!r:.80}: must be a list")
    return items if hasattr(items, "__getitem__") and hasattr(items, "__len__") else list(items)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name}={value}: must be at least {least}")


def _bytes_of(image: ImageLike) -> bytes:
    """An encoded image; a PIL image without loss, so that it takes the path of a file.

    Raises:
        BadImage: neither a path nor a PIL image.
    """
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    if not isinstance(image, Image.Image):
        raise BadImage(f"{type(image).__name__} is neither a path nor a PIL image")
    buffer, exif = io.BytesIO(), image.getexif()
    if image.mode in PNG_MODES:
        image.save(buffer, "PNG", compress_level=1, exif=exif)
    else:
        image.save(buffer, "TIFF", exif=exif)
    return buffer.getvalue()


def _stack(images: list[torch.Tensor | str]) -> torch.Tensor | str:
    """uint8 [b, 3, H, W], or the first sentence on an image that cannot be used."""
    problems = [image for image in images if isinstance(image, str)]
    return problems[0] if problems else torch.stack(images)
