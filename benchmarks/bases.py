"""Whether `eval bases` names the base that is best after full training.

    python -m benchmarks.quality --out OUT --ground clipart --arms "ours"   makes the ground and its base
    python -m benchmarks.bases --out OUT                                     17 minutes on two CPU cores

Six bases of one architecture and of different pretraining; the order of `eval bases` on the val split of
domain B, as they are and after its fit, beside the order after full training with the seed's recipe on the
test split. The same command continues after an interruption.
"""

import csv
import json
from pathlib import Path

from scipy.stats import kendalltau, spearmanr

from benchmarks.quality import BASE, CPU, EPOCHS, MODEL, SEED, SEED_RECIPE, keep
from benchmarks.quality_data import build, call
from data_prep.cli import CONFIG
from data_prep.errors import exit_on_user_error
from data_prep.tables import markdown_table
from train.model.clip import load

# Pretraining of each base: the folder of domain A's images, all for "", and epochs; the last is the ground's
# own.
BASES = {
    "random weights": ("", 0),
    "all of A, 1 epoch": ("", 1),
    "all of A, 6 epochs": ("", 6),
    "icons of A, 3 epochs": ("icons", 3),
    "clip art of A, 8 epochs": ("debian", 8),
    "the ground's base": ("", None),
}
LR = 3e-4  # of the seed's recipe on this ground, in benchmarks.quality


def main(out: Path) -> None:
    """Print the table.

    Args:
        out: Folder of benchmarks.quality with the ground of clip art and its base; bases and runs are written
            to OUT/bases.
    """
    out = out.absolute()
    models = {name: pretrained(out, name) for name in BASES}
    ranked = out / "bases" / "ranked.json"
    if not ranked.is_file():
        names = [f"local-dir:{folder}" for folder in models.values()]
        call("eval", "bases", *names, "--data", out / "B", "--json", ranked)
    before = {base["model"]: base for base in json.loads(ranked.read_text())["bases"]}
    rows = []
    for name, folder in models.items():
        base = before[f"local-dir:{folder}"]
        figures = [base["zero_shot_R@1"][0], base["fitted_R@1"][0], trained(out, folder)]
        rows.append([name, *(100 * figure for figure in figures)])
    rows.sort(key=lambda row: -row[3])
    titles = ["base", "R@1 %, val", "fitted R@1 %, val", "R@1 % after full training, test"]
    print(markdown_table(titles, [[row[0], *(f"{figure:.1f}" for figure in row[1:])] for row in rows]))
    _, zero_shot, fitted, full = zip(*rows, strict=True)
    for name, order in (("as it is", zero_shot), ("fitted", fitted)):
        rho, tau = spearmanr(order, full).statistic, kendalltau(order, full).statistic
        print(f"{name}: rank correlation with full training: Spearman {rho:.2f}, Kendall {tau:.2f}")


def pretrained(out: Path, name: str) -> Path:
    """The folder of a base's model, trained unless it is there."""
    folder_of_a, epochs = BASES[name]
    if epochs is None:
        return out / "base" / "model"
    folder = out / "bases" / name.replace(" ", "_").replace(",", "")
    if (folder / "model").is_dir():
        return folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if not epochs:
        keep(load(MODEL), folder / "model")
        return folder / "model"
    data = part(out, folder_of_a) if folder_of_a else out / "A"
    call("train", "--model", MODEL, "--data", data, "--run", folder / "run", "--epochs", epochs, *CPU, *BASE)
    keep(load(str(folder / "run")), folder / "model")
    return folder / "model"


def part(out: Path, folder: str) -> Path:
    """Shards of the images of domain A that are in a folder."""
    name = f"A-{folder}"
    if not (out / name / "manifest.json").is_file():
        with open(out / "A.csv", newline="") as file, open(out / f"{name}.csv", "w", newline="") as partial:
            header, *rows = csv.reader(file)
            csv.writer(partial).writerows([header, *(row for row in rows if row[0].startswith(f"{folder}/"))])
        build(out, name, "clipart")
    return out / name


def trained(out: Path, model: Path) -> float:
    """R@1 on B's test split after the seed's recipe, the mean of both directions."""
    result = model.parent / "tuned.json"
    if not result.is_file():
        run = model.parent / "tuned"
        words = [SEED_RECIPE, "--model", f"local-dir:{model}", "--data", out / "B", "--run", run]
        call("train", *words, "--epochs", EPOCHS, "--optim.lr", LR, *CPU, *SEED)
        call("eval", "retrieval", run, "--data", out / "B", "--split", "test", "--json", result)
    return json.loads(result.read_text())["metrics"]["mean/R@1"]


if __name__ == "__main__":
    import tyro

    exit_on_user_error(lambda: tyro.cli(main, config=CONFIG))
