"""Marks of search results become decisions, for images of train alone.

  right    the text becomes a caption of the image                  add
  wrong    the text is a caption of the image no more               remove

Images of val and test keep their captions, and their captions become none of train: so what they measure
stays the same. A wrong mark on a text that is no caption of the image changes nothing, as hard negatives did
not help (benchmarks/quality.md); it is counted and listed.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from data_prep.build.decisions import KEY, Decision, Subject
from data_prep.build.groups import normal_caption
from data_prep.build.records import is_visible
from data_prep.build.split import SPLITS
from data_prep.errors import UserError
from data_prep.inputs.names import key_of
from data_prep.marks import NONE, RIGHT, read_marks
from data_prep.progress import progress
from data_prep.shards import Shards, read_manifest
from data_prep.store.remote import place_of
from data_prep.terminal import say

TRAIN, FEEDBACK = SPLITS[0], "feedback:"  # how the note of a decision begins
UNKNOWN, HELD_OUT_TEXT = "no such image in --keep-splits", "a caption of val or test"
REVIEWED, INVISIBLE = "--decisions has one about this caption", "nothing visible"


class Feedback(NamedTuple):
    """What marks ask for.

    Attributes:
        decisions: to apply.
        unused: those that are not applied; their note says why.
        sha256: of the file.
    """

    decisions: list[Decision]
    unused: list[Decision]
    sha256: str


def read_feedback(path: Path, keep_splits: str, decided: Mapping[Subject, Decision]) -> Feedback:
    """The decisions that the last mark of each text and image asks for.

    Args:
        keep_splits: Folder of the shards that were searched, whose splits the build keeps.
        decided: Decisions of a person, which win.

    Raises:
        UserError: the file or the shards cannot be read, or there are no shards.
    """
    marks, sha256 = read_marks(path)
    if not keep_splits:
        raise UserError(
            f"--feedback {path}: pass --keep-splits as well, with the folder of shards that was searched:"
            " marks change captions of train alone, and no image may change its split"
        )
    # An index of a folder has paths as keys; the key in shards follows from the path.
    last = {(mark.text, mark.key if KEY.fullmatch(mark.key) else key_of(mark.path)): mark for mark in marks}
    asked = [
        Decision(key, mark.path, "add", "", text, f"{FEEDBACK} right")
        if mark.mark == RIGHT
        else Decision(key, mark.path, "remove", text, "", f"{FEEDBACK} wrong")
        for (text, key), mark in last.items()
        if mark.mark != NONE
    ]
    texts = {normal_caption(decision.new_caption) for decision in asked} - {""}
    splits, held_out = _of_shards(place_of(keep_splits), {decision.key for decision in asked}, texts)
    decisions, unused, reasons = [], [], Counter()
    for decision in asked:
        if why := _refusal(decision, splits, held_out, decided):
            reasons[why] += 1
            unused.append(decision._replace(note=f"{decision.note}, {why}"))
        else:
            decisions.append(decision)
    actions = Counter(decision.action for decision in asked)
    counts = "".join(f"; not used: {count} x {why}" for why, count in reasons.most_common())
    say(f"{path}: {actions['add']} results are right, {actions['remove']} wrong{counts}")
    return Feedback(decisions, unused, sha256)


def _refusal(
    decision: Decision, splits: dict[str, str], held_out: set[str], decided: Mapping[Subject, Decision]
) -> str:
    """Why a decision is not applied; "" if it is."""
    text, split = decision.caption or decision.new_caption, splits.get(decision.key)
    # An image that lost its only caption in an earlier round is not in the shards of that round any more.
    if split is None and decision.action == "add":
        return UNKNOWN
    if split not in (TRAIN, None):
        return f"an image of {split}"
    if any(Subject(decision.key, kind, text) in decided for kind in ("caption", "add")):
        return REVIEWED
    if normal_caption(decision.new_caption) in held_out:
        return HELD_OUT_TEXT
    return "" if is_visible(text) else INVISIBLE


def _of_shards(folder: Path | str, keys: set[str], texts: set[str]) -> tuple[dict[str, str], set[str]]:
    """The splits of the images with these keys; and those of `texts` that val or test has."""
    splits, held_out = {}, set()
    for split in SPLITS:
        if not read_manifest(folder)["splits"][split]["samples"]:
            continue
        shards = Shards(folder, split)
        for number in progress(range(len(shards)), desc=f"reading {split}", unit="image", delay=2):
            if (key := shards.key(number)) in keys:
                splits[key] = split
            if split != TRAIN and texts:
                held_out.update(texts.intersection(map(normal_caption, shards.captions(number))))
    return splits, held_out
