"""Models as pages call them."""

from collections.abc import Sequence

from train.model.clip import public_name


def display_names(models: Sequence[str]) -> list[str]:
    """A run or folder by its name, "runs/icons" -> "icons"; as they are where two names would be equal."""
    names = [public_name(model) or model for model in models]
    return [name if names.count(name) == 1 else model for name, model in zip(names, models, strict=True)]


def with_display_names(results: Sequence[dict]) -> list[dict]:
    """Results of eval with their "model" by its display name."""
    names = display_names([result["model"] for result in results])
    return [{**result, "model": name} for result, name in zip(results, names, strict=True)]
