"""What in a report deserves attention: the same sentences on the terminal and at the top of report.html."""

from collections.abc import Mapping

from data_prep.build.decisions import DROPPED, REMOVED
from data_prep.build.groups import MAX_SHARERS
from data_prep.build.plan import NEAR_HELD_OUT
from data_prep.build.records import REPEATED
from data_prep.images import UNSEEN, WHOLLY_TRANSPARENT
from data_prep.tables import are, counted

ASKED = (DROPPED, REMOVED, NEAR_HELD_OUT)  # reasons of rows that are left out because the user asked for it
HARMLESS = (*ASKED, REPEATED)  # reasons that do not count to --max-rejects
LARGE_GROUP, LARGE_SHARE, MANY_IMAGES = 20, 1 / 20, 1000
MIN_IMAGES_FOR_SHARES = 200  # of fewer, a split's share is a matter of chance
MIN_CHANCE = 0.01  # that a hash leaves a split empty; below it, few groups are not the cause
SHOWN_CHARACTERS = 160


def shorten(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def warnings(summary: dict, settings: dict) -> list[str]:
    """What deserves attention, the gravest first.

    Args:
        summary: the content of report.json.
        settings: see data_prep.build.pipeline.
    """
    messages, again = [], f"{settings['command']} again with"
    if settings["check"]["skip_decode"]:
        messages.append(
            "Images were not decoded (--skip-decode): damaged and near-identical images, and sizes, are not"
            " known."
        )
    if settings["check"].get("unread"):
        messages.append(
            "Images behind URLs were not read (--full-check reads them): damaged, equal and near-identical"
            " images, and sizes, are not known."
        )
    messages += _of_groups(summary, settings)
    messages += _of_splits(summary, settings)
    if summary["leaks"] and not settings["split"]["drop_leaks"]:
        messages.append(
            f"{counted(summary['leaks'], 'near-identical pair')} across splits (leaks.csv), which makes"
            f" metrics too good: {again} --drop-leaks --overwrite, which leaves one of each pair out."
        )
    messages += transparent(
        summary["reasons"], settings["check"]["background"], f"{again} another --background and --overwrite"
    )
    if cut := summary["captions_truncated"]:
        length = settings["read"]["context_length"]
        messages.append(
            f"{counted(cut, 'caption')} ({cut / summary['records']:.1%}) will be truncated: longer than the"
            f" --context-length of {length} tokens."
        )
    if settings["read"]["decisions"] and not settings["split"]["keep_splits"]:
        messages.append(
            "Decisions change groups, so images may be in another split than in the shards that were"
            f" reviewed, which a model may be trained on: {again} --keep-splits and those shards, and"
            " --overwrite."
        )
    if unused := summary["decisions"]["unused"]:
        match, were = ("matches", "was") if unused == 1 else ("match", "were")
        messages.append(
            f"{counted(unused, 'decision')} {match} no image or caption of the inputs, and {were} not"
            " applied; see unused_decisions.csv."
        )
    for what, number in summary["too_common"].items():
        if number:
            text, images = summary["most_common"][what]
            messages.append(
                f"{counted(number, what[:-1])} of more than {MAX_SHARERS} images each: too general to group"
                f" images by; “{shorten(text)}” is of the most images, {images:,}."
            )
    return messages


def _of_groups(summary: dict, settings: dict) -> list[str]:
    """A group that holds much of the data."""
    group, images = summary["largest_group"], summary["images"]
    if group["images"] < max(LARGE_GROUP, min(images * LARGE_SHARE, MANY_IMAGES)):
        return []
    column = settings["read"]["group_column"]
    joined = f"the cells of --group-column {column}, " if column else ""
    joined += "equal captions or equal pixels"
    joined += ", or names (--group-by-name)" if settings["split"]["group_by_name"] else ""
    return [
        f"The group “{shorten(group['name'])}” has {group['images']:,} of {images:,} images"
        f" ({group['images'] / images:.1%}), all in {group['split']}: check what joins them, {joined}."
    ]


def _of_splits(summary: dict, settings: dict) -> list[str]:
    """Splits that are empty, or far from their share."""
    messages, images, splitting = [], summary["images"], settings["split"]
    is_by_hash = not settings["read"]["split_column"]
    for split, counts in summary["splits"].items():
        expected, share = splitting.get(split, 0), counts["images"] / images
        if not counts["images"]:
            if not is_by_hash:
                messages.append(f"{split} is empty: the split column gives it no image.")
            elif splitting.get(split, 1):
                messages.append(f"{split} is empty: {_remedy(summary, settings, split)}.")
        elif not is_by_hash or not expected or images < MIN_IMAGES_FOR_SHARES:
            continue
        elif not expected / 2 <= share <= 2 * expected:
            largest = counted(summary["largest_group"]["images"], "image")
            messages.append(
                f"{split} has {share:.1%} of the images, not {expected:.1%}: a group stays whole, and there"
                f" are {summary['groups']:,} of up to {largest}; another --seed gives another split."
            )
    return messages


def _remedy(summary: dict, settings: dict, split: str) -> str:
    """Why the hash assigned no group to a split, and what fills it."""
    groups = summary["groups"]
    share = settings["split"].get(split, 1 - settings["split"]["val"] - settings["split"]["test"])
    if settings["split"]["keep_splits"]:
        why = f"none of {counted(groups, 'group')} was in it before, or is hashed to it"
    elif (1 - share) ** groups >= MIN_CHANCE:
        why = f"{counted(groups, 'group')} only"
    else:
        why = (
            f"none of {counted(groups, 'group')} is hashed to it; the inputs may be one split of earlier"
            " shards, whose names this --seed has assigned before"
        )
    if seed := summary["seed_that_fills_splits"]:
        return f"{why}; {settings['command']} again with --seed {seed} --overwrite"
    return f"{why}; it needs more data, or a --split-column"


def transparent(reasons: Mapping[str, int], background: str, advice: str) -> list[str]:
    """On images of which nothing is seen, and what shows them.

    Args:
        advice: how to change the background.
    """
    messages = []
    if unseen := reasons.get(UNSEEN, 0):
        messages.append(
            f"{counted(unseen, 'image')} with transparency {are(unseen)} one color on the"
            f" --background {background}: {advice}."
        )
    if nothing := reasons.get(WHOLLY_TRANSPARENT, 0):
        messages.append(
            f"{counted(nothing, 'image')} {are(nothing)} wholly transparent: no --background shows anything."
        )
    return messages
