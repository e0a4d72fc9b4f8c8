"""A linear map of text features becomes a part of a model, which is an ordinary one then.

    normalize(normalize(h P) M) = normalize(h P M), so P M is the text projection of the aligned model

Its image tower is that of the index, bit for bit: the vectors of the index are its image features.
"""

from pathlib import Path

import torch
from open_clip.model import CLIP, CustomTextCLIP

from data_prep.errors import UserError
from train.model.clip import Clip
from train.model.towers import tower_of

State = dict[str, torch.Tensor]


def check_foldable(old: Clip, new: Clip) -> None:
    """Refuse two models of which one cannot be made; cheap.

    Raises:
        UserError: one of them is no plain pair of towers, the text tower of `new` has no linear projection,
            or their activations differ.
    """
    for clip in (old, new):
        if type(clip.towers.model) not in (CLIP, CustomTextCLIP):
            raise UserError(
                f"{clip.name}: is of open_clip's class {type(clip.towers.model).__name__}; align takes towers"
                " apart in CLIP and CustomTextCLIP (SigLIP's) alone; embed the images with the new model"
                " instead: python -m eval embed"
            )
    if not _projection(new.towers.model.state_dict()):
        raise UserError(
            f"{new.name}: its text tower does not end in a linear projection, which is what the map is"
            " multiplied into; embed the images with this model instead: python -m eval embed"
        )
    quick = [bool(clip.config["model_cfg"].get("quick_gelu")) for clip in (old, new)]
    if quick[0] != quick[1]:
        names = [{True: "QuickGELU", False: "GELU"}[each] for each in quick]
        raise UserError(
            f"{old.name} has {names[0]} and {new.name} has {names[1]}, and open_clip's configuration has one"
            " activation for both towers; align models of one activation"
        )


def fold(old: Clip, new: Clip, matrix: torch.Tensor, folder: Path) -> None:
    """Write the aligned model: the image tower and preprocessing of `old`; the text tower, tokenizer and
    logit_scale of `new`, with the map in the text projection.

    Args:
        matrix: [d_new, d_old], applied to text features of `new`.
        folder: exists, and becomes what open_clip loads as `local-dir:FOLDER`.
    """
    base = old.config["model_cfg"]
    model_cfg = new.config["model_cfg"] | {key: base[key] for key in ("embed_dim", "vision_cfg")}
    config = {"model_cfg": model_cfg, "preprocess_cfg": old.config["preprocess_cfg"]}
    images, texts = (clip.towers.model.state_dict() for clip in (old, new))
    state = {name: tensor for name, tensor in texts.items() if tower_of(name) != "image"}
    state |= {name: tensor for name, tensor in images.items() if tower_of(name) == "image"}
    name = _projection(state)
    matrix = matrix.to(state[name].device, torch.float64)
    if name.endswith(".weight"):  # of a torch.nn.Linear, [out, in]
        state[name] = (matrix.T @ state[name].double()).float()
        if (bias := f"{name.removesuffix('weight')}bias") in state:
            state[bias] = (state[bias].double() @ matrix).float()
    else:
        state[name] = (state[name].double() @ matrix).float()
    Clip(new.name, new.towers, new.tokenizer, config).save(folder, state=state)


def _projection(state: State) -> str:
    """The name of the last weight of a text tower, "" where it is not a linear projection: a matrix of
    open_clip's towers, a Linear of theirs (SigLIP) or of Hugging Face's.
    """
    names = [
        f"{tower}{name}" for tower in ("", "text.") for name in ("text_projection", "text_projection.weight")
    ]
    return next((name for name in (*names, "text.proj.weight") if name in state), "")
