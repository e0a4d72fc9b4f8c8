"""Parameters that no feature depends on: CoCa's text decoder, the pooling of some towers.

DDP would wait for their gradients, and a person would take them for trained.
"""

import sys

from open_clip.coca_model import CoCa

from data_prep.terminal import say
from train.model.activation_memory import dummy_batch, dummy_loss
from train.model.clip import Clip
from train.model.towers import tower_of
from train.world import World


def freeze_unused(clip: Clip, world: World) -> list[str]:
    """Freeze the parameters that no loss reaches, and name them once.

    They are found by one backward pass, of one pair: in which order a tower calls its parts, only the tower
    knows.

    Args:
        clip: on the device, with locked towers and adapters.

    Returns:
        The names of parameters that would be trained and that no loss reaches.
    """
    towers, training, bf16 = clip.towers, clip.towers.training, clip.towers.bf16
    towers.eval()  # changes no statistics
    towers.bf16 = False  # slow on CPUs without its instructions
    dummy_loss(towers(*dummy_batch(towers, 1, world.device))).backward()
    trained = {name: p for name, p in towers.model.named_parameters() if p.requires_grad and tower_of(name)}
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    towers.zero_grad()
    towers.bf16 = bf16
    towers.train(training)
    for name in unused:
        trained[name].requires_grad_(False)
    if unused and world.is_first:
        why = "; CoCa's caption loss is not trained" if isinstance(towers.model, CoCa) else ""
        say(
            f"{clip.name}: no loss reaches {', '.join(_modules(unused, list(trained)))} ({len(unused)} of"
            f" {len(trained)} parameters), so their weights stay as they are{why}",
            file=sys.stderr,
        )
    return unused


def _modules(unused: list[str], trained: list[str]) -> list[str]:
    """The largest modules whose parameters are all unused, and single parameters: "text_decoder"."""
    modules: dict[str, None] = {}
    used = [name for name in trained if name not in set(unused)]
    for name in unused:
        parts = name.split(".")
        paths = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        modules[
            next(path for path in paths if not any(f"{other}.".startswith(f"{path}.") for other in used))
        ] = None
    return list(modules)
