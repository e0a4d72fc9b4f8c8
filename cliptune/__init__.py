"""CLIP models in your own code: load one, encode images and texts, rank them, search an index."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors
    from eval.api import Index, Model, UserError, load

__all__ = ["Index", "Model", "UserError", "load"]


def __getattr__(name: str):
    """The API is imported when it is first used: it needs torch, and `cliptune` alone prints a guide."""
    if name not in __all__:
        raise AttributeError(f"module 'cliptune' has no attribute {name!r}; it has {', '.join(__all__)}")
    from eval import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
