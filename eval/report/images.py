"""Images of samples for pages: small PNGs within the HTML, with their captions as titles."""

from typing import NamedTuple

from markupsafe import Markup

from data_prep.html import data_uri
from data_prep.shards import Shards
from train.data.decode import decode


class Thumbnail(NamedTuple):
    """Attributes:
    source: the value of <img src>.
    title: the first caption, or the key; and the image's path.
    """

    source: Markup
    title: str


def thumbnail(shards: Shards, number: int, side_px: int = 64) -> Thumbnail:
    """A sample's image, no larger than side_px."""
    sample = shards.read(number)
    title = (*sample.captions, sample.key)[0]
    title += f" ({sample.path})" if sample.path else ""
    with shards.naming(number):
        image = decode(sample.image)
    return Thumbnail(data_uri(image, side_px), title)
