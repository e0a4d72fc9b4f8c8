"""A new model searches an old index: the map is fitted, the model written, and both ends are measured.

INDEX -> its model: old, NEW MODEL: new        train, val -> fit_map -> fold -> OUT: aligned
test -> old, aligned, new -> evaluate_full -> what part of the gain is kept
"""

from pathlib import Path
from shlex import quote

from data_prep.atomic import atomic_folder, check_replaceable, local_paths
from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.tables import Table, counted
from eval.align.fit import fit_map
from eval.align.fold import check_foldable, fold
from eval.bases.rank import features_of_pairs
from eval.embed import embed, for_eval, load_for_eval, open_shards
from eval.options import Inference
from eval.retrieval.score import differences, evaluate_full
from eval.search.index import Index
from train.metrics import show_difference, show_of, title_of
from train.model.clip import Clip
from train.world import World

FIGURES = ("text_to_image/R@1", "text_to_image/R@10")
GAIN = "text_to_image/R@10"


def align_index(
    folder: Path,
    model: str,
    data: Path,
    out: Path,
    split: str,
    max_images: int,
    overwrite: bool,
    inference: Inference,
    world: World,
) -> dict:
    """Write the aligned model to `out`, and compare it with both ends; see eval.align.command.align."""

    def prepare() -> tuple[list[Shards], Clip, Clip]:
        """The cheap checks first, so that a mistake is reported before a model is loaded."""
        check_replaceable(out, "model", overwrite, local_paths(folder, model, data))
        index, shards = Index(folder), [open_shards(data, name, world) for name in ("train", "val", split)]
        old, new = for_eval(index.model(), inference, world), load_for_eval(model, inference, world)
        check_foldable(old, new)
        if old.fingerprint() == new.fingerprint():
            raise UserError(f"{model}: is the model of {folder}, so there is nothing to align")
        return shards, old, new

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out, "model") as partial:
            fold(old, new, fitted.matrix, partial)

    (*fitted_on, test), old, new = world.all_or_raise(prepare)
    pairs = [
        features_of_pairs(old, shards, max_images, world, inference, text_clip=new)[0] for shards in fitted_on
    ]
    fitted = fit_map(*pairs)
    world.all_or_raise(lambda: write() if world.is_first else None)
    aligned = world.all_or_raise(lambda: load_for_eval(f"local-dir:{out}", inference, world))
    result = {
        "index": str(folder),
        "aligned": str(out),
        "data": f"{data}, {split}",
        "data_sha256": test.fingerprint,
        "n_train_images": len(pairs[0].groups),
        "ridge": fitted.ridge,
    }
    return result | compare_ends({"old": old, "aligned": aligned, "new": new}, test, inference, world)


def compare_ends(clips: dict[str, Clip], shards: Shards, inference: Inference, world: World) -> dict:
    """What each model has, as `eval retrieval` counts it, paired differences, and the part of the gain in
    GAIN that is kept: None where the new model is not better.
    """
    results, scores = [], {}
    for name, clip in clips.items():
        figures, scores[name] = evaluate_full(embed(clip, shards, world, inference), shards.groups, world)
        results.append({"model": clip.name, "weights_sha256": clip.fingerprint(), **figures})
    old, aligned, new = (result["metrics"][GAIN] for result in results)
    return {
        "models": results,
        "aligned_from_old": differences(scores["old"], scores["aligned"]),
        "aligned_from_new": differences(scores["new"], scores["aligned"]),
        "new_from_old": differences(scores["old"], scores["new"]),
        "gain_kept": (aligned - old) / (new - old) if new > old else None,
    }


def parts(result: dict) -> list[str | Table]:
    """The table of both ends, and what to read from it."""
    rows = []
    for name in FIGURES:
        figures = [show_of(model, name) for model in result["models"]]
        changes = [show_difference(name, result[f"aligned_from_{end}"][name]) for end in ("old", "new")]
        rows.append([title_of(name), *figures, *changes])
    titles = ["", "old model, old vectors", "aligned, old vectors", "new model, new vectors"]
    n_images = result["models"][0]["n_images"]
    return [
        f"{counted(n_images, 'image')} ({result['data']}); fitted on"
        f" {counted(result['n_train_images'], 'training image')}. In brackets: 95 % intervals, of differences"
        " paired by query.",
        Table([*titles, "aligned from old", "aligned from new"], rows),
        verdict(result),
    ]


def verdict(result: dict) -> str:
    """The part of the gain that is kept, and what to do."""
    if result["new_from_old"][GAIN][1] <= 0:
        return "The new model is not measurably better than the old one here: keep the old one."
    if result["aligned_from_old"][GAIN][1] <= 0:
        return "The aligned model is not measurably better than the old one here: embed all images again."
    index, model = quote(result["index"]), quote(f"local-dir:{result['aligned']}")
    part = f"{100 * result['gain_kept']:.0f} % of the gain in R@10, text to image"
    return (
        f"{part}, is kept without touching a vector of the index.\n"
        f"search: python -m eval search {index} --model {model} --text '...'"
    )
