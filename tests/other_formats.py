"""SVG and HEIC files, made anew."""

from evil import encoded
from PIL import Image

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{w}"'
    ' height="{h}">{body}</svg>'
)
HALF = '<rect width="25" height="50" fill="#0000ff"/>'
RECT = '<rect width="50" height="50" fill="#ff0000"/>'


def drawing(body: str = RECT, w: str = "50", h: str = "50", before: str = "") -> bytes:
    return (before + SVG.format(w=w, h=h, body=body)).encode()


def heic(image: Image.Image, **options) -> bytes:
    import pillow_heif

    pillow_heif.register_heif_opener()
    return encoded(image, "HEIF", **options)
