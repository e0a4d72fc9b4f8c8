"""Rank your own images by a sentence, and your own sentences by an image.

  python examples/find_images.py runs/mine "a bell with a slash" photos/*.png
  python examples/find_images.py ViT-B-32:laion2b_s34b_b79k "a bell with a slash" photos/*.png

Needs `pip install .` in the clone.
"""

import sys
from pathlib import Path

import cliptune


def main(name: str, sentence: str, *paths: str) -> None:
    model = cliptune.load(name)

    # Features are float32 arrays with a row for each image or text. Rows are L2-normed: products are cosines.
    images = model.encode_images(paths)
    text = model.encode_texts(sentence)
    best = (images @ text).argsort()[::-1][:5]
    print(f"{sentence!r} is nearest to:")
    for number in best:
        print(f"  {images[number] @ text:.3f}  {paths[number]}")

    # The same in one call, the other way round. As a query, a str is a sentence and a Path an image.
    print(f"{paths[best[0]]} is nearest to:")
    for caption, cosine in model.rank(Path(paths[best[0]]), texts=[sentence, "a photo", "a diagram"]):
        print(f"  {cosine:.3f}  {caption}")

    # Many images, searched often, belong in an index: cliptune embed MODEL --data photos/ --out index
    # cliptune.Index("index").search("a bell with a slash", k=5)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python examples/find_images.py MODEL SENTENCE IMAGE [IMAGE ...]")
    main(*sys.argv[1:])
