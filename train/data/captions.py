"""Which of a sample's captions the model sees, and in which form: drawn, tags dropped, put into a template.

Everything is drawn from one number that belongs to the sample's position, as in train.data.augment.
"""

from train.data.order import random_bits
from train.recipe import Captions


def draw(n: int, recipe: Captions, bits: int) -> int:
    """The number of the caption that is drawn.

    Args:
        n: captions of the sample.
        bits: 64 random bits, the only source of randomness.
    """
    return 0 if recipe.sample == "first" else bits % n


def caption(text: str, recipe: Captions, bits: int) -> str:
    """A caption, with tag dropout and a template as the recipe says.

    Args:
        bits: see draw().
    """
    if recipe.tag_dropout:
        text = drop_tags(text, recipe.tag_dropout, bits)
    if recipe.templates:
        # Bits of another stream: with the same ones each caption would always get the same template.
        template = recipe.templates[int(random_bits(1, bits, 0)[0]) % len(recipe.templates)]
        text = template.replace("{}", text)
    return text


def drop_tags(text: str, dropout: float, bits: int) -> str:
    """A comma-separated list of tags with each tag dropped with probability `dropout`; order kept, one tag at
    least.

    A text without a comma is not a list and is returned as it is.
    """
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    if "," not in text or not tags:
        return text
    drawn = random_bits(len(tags), bits, 1)
    kept = drawn / 2.0**64 >= dropout
    # one tag always stays; if all would be dropped, each is equally likely to stay
    kept[drawn.argmax()] = True
    return ", ".join(tag for tag, keep in zip(tags, kept, strict=True) if keep)
