"""The rows of a list of suspects."""

import numpy as np

from data_prep.shards import Shards
from data_prep.tables import counted, percent
from eval.bases.projections import Pairs
from eval.suspects.score import (
    distances_of,
    features_of,
    hub_counts,
    knowledge,
    lemon,
    numbers_of,
    same_things,
)

REASONS = {
    "does not fit": "this caption does not fit this image, or its neighbours have others",
    "fits many": "this caption is near to images of many groups: it says too little",
    "same thing": "two groups with images and captions that are nearest to each other: one thing?",
}
LEAST_HUB = 5  # groups
LEAST_KNOWLEDGE = 0.55  # of knowledge(); random weights have 0.49 and 0.51, see benchmarks/suspects.md


def find(pairs: Pairs, shards: Shards, chosen: np.ndarray, most: int) -> tuple[list[dict], int, float | None]:
    """Rows of data_prep.suspects.COLUMNS, up to `most` for each of REASONS, the worst first; the number of
    pairs that were judged; and knowledge() of the model that judged.

    Args:
        chosen: int64 [n_images], the sample numbers of the images of `pairs`.
    """
    numbers = numbers_of(pairs)
    features = features_of(pairs, numbers)
    scores = lemon(features, numbers.image, distances_of(features)).cpu().numpy()

    def row(image: int, reason: str, score: float, text: str, other: int | None = None) -> dict:
        sample = int(chosen[image])
        about = {"key": shards.key(sample), "image": shards.meta(sample)["image"], "caption": text}
        more = {"other_key": "", "other": ""}
        if other is not None:
            meta = shards.meta(int(chosen[other]))
            more = {"other_key": shards.key(int(chosen[other])), "other": meta["captions"][0]}
        return {**about, "reason": reason, "score": f"{score:.4f}", **more}

    def caption(image: int, text: int) -> str:
        return shards.captions(int(chosen[image]))[pairs.texts[image].index(text)]

    rows = []
    for pair in np.argsort(-scores, kind="stable")[:most].tolist():
        image, text = int(numbers.image[pair]), int(numbers.text[pair])
        rows.append(row(image, "does not fit", scores[pair], caption(image, text)))
    hubs, first = hub_counts(pairs, numbers), dict(zip(numbers.text[::-1], numbers.image[::-1], strict=True))
    for text in np.argsort(-hubs, kind="stable")[:most].tolist():
        if hubs[text] >= LEAST_HUB:
            image = int(first[text])
            rows.append(row(image, "fits many", float(hubs[text]), caption(image, text)))
    for image, other, cosine in same_things(pairs, numbers)[:most]:
        rows.append(row(image, "same thing", cosine, shards.captions(int(chosen[image]))[0], other))
    return rows, len(scores), knowledge(features, numbers)


def remarks(n_pairs: int, known: float | None) -> list[str]:
    """How to read the list.

    Args:
        n_pairs, known: of find().
    """
    said = [
        f"The {counted(n_pairs, 'pair')} are sorted by how badly they fit, and the worst are listed, however"
        " many are wrong: look from the top, and stop where captions fit."
    ]
    if known is not None:
        said.append(
            f"This model has an image's own caption nearer than another one's in {percent(known)} % of the"
            " pairs (50 % is chance)."
        )
    if known is not None and known < LEAST_KNOWLEDGE:
        said.append(
            "warning: it hardly knows such images, so the list is little better than chance; pass a model"
            " that knows them, pretrained or fine-tuned on similar ones"
        )
    return said
