"""Which of a sample's captions the model is shown this time, and how: another choice, fewer tags, a sentence
around it.

Everything is drawn from one number that belongs to the sample's position, as in train.data.augment.
"""

from train.data.order import random_bits
from train.recipe import Captions


def caption(captions: list[str], recipe: Captions, bits: int) -> str:
    """One of `captions`, with what the recipe does to it: tags left out, then a template filled.

    Args:
        bits: 64 random bits; they alone decide.
    """
    text = captions[bits % len(captions) if recipe.pick == "any" else 0]
    if recipe.tag_dropout:
        text = fewer_tags(text, recipe.tag_dropout, bits)
    if recipe.templates:
        # Bits of another stream: those above have decided which caption it is, and would tie templates to
        # captions.
        template = recipe.templates[int(random_bits(1, bits, 0)[0]) % len(recipe.templates)]
        text = template.replace("{}", text)
    return text


def fewer_tags(text: str, dropout: float, bits: int) -> str:
    """A list of tags, parted by commas, without some of them: each stays with 1 - `dropout`, or else one of
    all; in their order.

    A text without a comma is no list, and stays as it is.
    """
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    if "," not in text or not tags:
        return text
    drawn = random_bits(len(tags), bits, 1)
    stays = drawn / 2.0**64 >= dropout
    stays[drawn.argmax()] = (
        True  # stays in any case, unless all are below; then it is each with the same chance
    )
    return ", ".join(tag for tag, kept in zip(tags, stays, strict=True) if kept)
