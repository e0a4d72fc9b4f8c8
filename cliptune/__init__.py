"""CLIP models in your own code: load one, encode images and texts, rank them, search an index."""

_API = ("Index", "Model", "UserError", "load")
__all__ = list(_API)


def __getattr__(name: str):
    """The API is imported when it is first used: it needs torch, and `cliptune` alone prints a guide."""
    if name not in _API:
        raise AttributeError(f"module 'cliptune' has no attribute {name!r}; it has {', '.join(_API)}")
    from eval import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
