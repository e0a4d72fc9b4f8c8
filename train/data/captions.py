"""Which of a sample's captions the model sees, and in which form: drawn, tags dropped, put into a template.

Everything is drawn from one number that belongs to the sample's position, as in train.data.augment.
"""

from itertools import accumulate
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from data_prep.shards import Shards
from train.data.order import random_bits
from train.recipe import Captions

if TYPE_CHECKING:
    from train.data.sets import DataSets


def draw(kinds: list[str], recipe: Captions, bits: int) -> int:
    """The number of the caption that is drawn.

    Args:
        kinds: of the captions of a sample.
        bits: 64 random bits, the only source of randomness.
    """
    if recipe.sample == "first":
        return 0
    if recipe.weights:
        weights = [recipe.weight_of_kind.get(kind, 1.0) for kind in kinds]
        if len(set(weights)) > 1:  # else as without weights: of equal frequency, by the same bits
            *ends, total = accumulate(weights)
            point = bits / 2.0**64 * total
            return next((number for number, end in enumerate(ends) if point < end), _last(weights))
    return bits % len(kinds)


def _last(weights: list[float]) -> int:
    """The last caption that can be drawn: rounding may put the point at the end of all."""
    return max(number for number, weight in enumerate(weights) if weight)


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


def check_captions(recipe: Captions, pairs: "Shards | DataSets") -> None:
    """Check that the pairs have captions of the kinds that are weighted, and that some pair counts.

    Raises:
        UserError: not so.
    """
    place = f"{pairs.folder}, {pairs.split}"
    if not pairs.weight_range[1]:
        raise UserError(f"{place}: all weights are 0, so there is nothing to learn; build with others")
    missing = [kind for kind in recipe.weight_of_kind if kind not in pairs.kinds]
    if missing and pairs.kinds:
        known = ", ".join(f"{kind} ({n:,})" for kind, n in pairs.kinds.items())
        raise UserError(
            f"--captions.weights: {place} has no captions of the kind {', '.join(missing)}; it has {known}"
        )
    if missing:
        raise UserError(
            f"--captions.weights: the captions of {place} have no kinds; leave it out, or build from a table"
            " with a column for each kind: --caption-column name,sentence"
        )


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
