"""A model gets its numbers.

  python -m eval retrieval runs/icons --data data/icons/shards --json out.json
      R@1, 5, 10, ranks, MRR, mAP, nDCG with intervals: image to text, text to image, image to image
  python -m eval zeroshot runs/icons ViT-B-32:laion2b_s34b_b79k --data images/ --templates icons
      zero-shot classification of labelled images; with --image IMAGE --captions ..., one image
  python -m eval linear-probe runs/icons --data images/ --out head/
      trains a linear head and an MLP on the frozen image features
  python -m eval confusion runs/icons demo-vit:none --data data/icons/shards --page out.html
      each image's caption among others, heatmaps, and hubs: captions that rank first for many images
  python -m eval compare demo-vit:none runs/icons --data data/icons/shards --out comparison
      a page and a table: paired differences, what got better and worse, retention, WiSE-FT
  python -m eval bases ViT-B-32:laion2b_s34b_b79k ViT-B-16-SigLIP2:webli --data data/icons/shards
      which model to start from: each as it is, and after a two-minute fit on its features
  python -m eval suspects ViT-B-32:laion2b_s34b_b79k --data data/icons/shards --csv suspects.csv
      captions that are probably wrong, for `python -m data_prep review --suspects`
  python -m eval compositionality runs/icons --data data/icons/shards
      counting, binding, relations and swapped words, on images that are drawn on the spot
  python -m eval leaks ViT-B-32:laion2b_s34b_b79k --data data/icons/shards --csv leaks.csv
      images of val and test that are nearly the same as a training image, as this model sees them

  python -m eval embed runs/icons --data data/icons/shards --out indexes/icons
      makes an index of a corpus, for the commands below; also under torchrun
  python -m eval search indexes/icons --text "a bell with a slash"
      finds images by a sentence, by an image (--image FILE), or many (--queries-csv FILE --out found.csv)
  python -m eval serve indexes/base indexes/icons
      serves a search page: sentences, images, filters, models side by side
  python -m eval site indexes/icons --out site
      writes the search page as static files for any web server; the browser runs the model
  python -m eval compress indexes/icons --out indexes/small
      a smaller index, with fewer dimensions at int8, and its loss on the captions of val
  python -m eval export indexes/icons --out icons.sql
      writes an index for pgvector (.sql), as .parquet or as .npy
  python -m eval align indexes/base runs/icons --data data/icons/shards --out aligned
      searches an index of the base with the tuned text tower, without embedding its images again
  python -m eval cluster indexes/icons --page clusters.html --label-column set
      clusters of a corpus with names, a map of them, and near duplicates

MODEL is a run folder (its best checkpoint), NAME:PRETRAINED as open_clip knows them (ViT-B-32:none for random
weights), hf-hub:ID or local-dir:PATH. Under torchrun the ranks share the work. Each command has --help.
"""

from data_prep.cli import run_commands
from data_prep.errors import exit_on_user_error

COMMANDS = {
    "retrieval": "eval.retrieval.command:retrieval",
    "zeroshot": "eval.classify.command:zeroshot",
    "linear-probe": "eval.classify.command:linear_probe",
    "confusion": "eval.compare.command:confusion",
    "compare": "eval.compare.command:compare",
    "bases": "eval.bases.command:bases",
    "suspects": "eval.suspects.command:suspects",
    "compositionality": "eval.compositionality.command:compositionality",
    "leaks": "eval.retrieval.command:leaks",
    "embed": "eval.search.command:embed",
    "search": "eval.search.command:search",
    "serve": "eval.search.command:serve",
    "site": "eval.search.command:site",
    "compress": "eval.search.command:compress",
    "export": "eval.search.command:export",
    "align": "eval.align.command:align",
    "cluster": "eval.cluster.command:cluster",
}


def main() -> None:
    run_commands("python -m eval", __doc__, COMMANDS)


if __name__ == "__main__":
    exit_on_user_error(main)
